"""Measures the peak memory of a model that reads a prompt and generates, in a process of its own."""

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
from minitron.runtime import Runtime

STATUS, CLEAR_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_memory(folder: Path, batch: int, context: int, runtime: Runtime) -> int:
    """Return the peak memory of a model folder in bytes: torch's allocations on CUDA, the process's growth on a CPU.

    Raises:
        UserError: the process died, most likely because memory ran out.
    """
    # A new process, because memory that this one used earlier would be counted too.
    processes = multiprocessing.get_context("spawn")
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=_measure, args=(sender, folder, batch, context, runtime))
    process.start()
    sender.close()
    try:
        return int(receiver.recv())
    except EOFError as error:
        process.join()
        raise UserError(
            f"the process that ran {folder} on {batch} × {context} tokens died with exit code {process.exitcode}, "
            "probably because memory ran out: lower --batch or --context"
        ) from error
    finally:
        process.join()


def _measure(sender: Connection, folder: Path, batch: int, context: int, runtime: Runtime) -> None:
    before = resident("VmRSS")
    if CLEAR_PEAK.exists():  # the peak of importing packages is not the model's
        CLEAR_PEAK.write_text("5")
    device = runtime.device
    model = load_model(open_checkpoint(folder), device, runtime.dtype, runtime.attention)
    measure_speed(model, batch, context)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident("VmHWM") - before
    sender.send(peak)


def resident(entry: str) -> int:
    """Return the bytes of resident memory, now (`VmRSS`) or at most (`VmHWM`); without /proc, both are the peak."""
    if not STATUS.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{entry}:"))
    return int(line.split()[1]) * 1024
