"""The most memory that a model takes while it reads a prompt and goes on from it: in a process of its own."""

import multiprocessing
import resource
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from minitron.errors import UserError
from minitron.evaluation.speed import measure_speed
from minitron.model.checkpoint import open_checkpoint
from minitron.model.language_model import load_model

STATUS, CLEAR_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(folder: Path, batch: int, context: int, device: torch.device, dtype: torch.dtype) -> int:
    """Bytes: on CUDA what torch allocated at most, on a CPU what the process grew by.

    Raises:
        UserError: the process died, of want of memory most likely.
    """
    # A fresh process: what this one once held would count as well.
    context_of_processes = multiprocessing.get_context("spawn")
    here, there = context_of_processes.Pipe(duplex=False)
    process = context_of_processes.Process(target=_measure, args=(there, folder, batch, context, device, dtype))
    process.start()
    there.close()
    try:
        return int(here.recv())
    except EOFError as error:
        process.join()
        raise UserError(
            f"the process that ran {folder} on {batch} × {context} tokens died ({process.exitcode}): out of memory?"
        ) from error
    finally:
        process.join()


def _measure(
    results: Connection, folder: Path, batch: int, context: int, device: torch.device, dtype: torch.dtype
) -> None:
    before = _held("VmRSS")
    if CLEAR_PEAK.exists():  # what importing took at most is not the model's
        CLEAR_PEAK.write_text("5")
    model = load_model(open_checkpoint(folder), device, dtype)
    measure_speed(model, batch, context)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _held("VmHWM") - before
    results.send(peak)


def _held(what: str) -> int:
    """Bytes of resident memory, now (`VmRSS`) or at most (`VmHWM`); at most in either case where Linux does not say."""
    if not STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{what}:"))
    return int(line.split()[1]) * 1024
