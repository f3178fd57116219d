"""The most memory that a model takes while it reads a prompt and goes on from it: in a process of its own."""

import multiprocessing
import resource
import sys
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from minitron.errors import UserError
from minitron.measure.speed import measure_speed
from minitron.model.causal import load_model
from minitron.model.checkpoint import open_checkpoint

MAXRSS_UNIT = 1 if sys.platform == "darwin" else 1024


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
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    model = load_model(open_checkpoint(folder), device, dtype)
    measure_speed(model, batch, context)
    if device.type == "cuda":
        results.send(torch.cuda.max_memory_allocated(device))
    else:
        results.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * MAXRSS_UNIT)
