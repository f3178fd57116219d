"""Processes that tests start and kill: forked from one that has imported everything, which saves each its imports."""

import multiprocessing
import os
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import tests.conftest  # noqa: F401 - for its settings
from minitron.progress import Progress

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["tests.preloaded"])


def start(
    function: Callable[..., object], *arguments: Any, log: Path, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """Start a function of a test module in a process of its own; standard output and error go to the file `log`."""
    process = _FORKS.Process(target=_run, args=(function, arguments, log, environment or {}))
    process.start()
    return process


def exit_code(process: BaseProcess, seconds: float = 300) -> int:
    """Wait for a process and return its exit code, which is -N for the signal N."""
    process.join(seconds)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"the process did not end within {seconds} seconds")
    return process.exitcode


def _run(
    function: Callable[..., object], arguments: tuple[Any, ...], log: Path, environment: Mapping[str, str]
) -> None:
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    function(*arguments)


def kill_in(stage: str, times: int, number: int) -> None:
    """From now on, send the own process a signal when a stage of its progress has advanced so many times."""
    advance, seen = Progress.advance, 0

    def counted(self: Progress, units: int) -> None:
        nonlocal seen
        advance(self, units)
        seen += self.stage == stage
        if seen == times:
            os.kill(os.getpid(), number)

    Progress.advance = counted  # type: ignore[method-assign]
