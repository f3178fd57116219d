"""Defines what a benchmark that lm-eval lacks provides, and what it receives."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.harness.answers import Answerer
from minitron.harness.judge import Judge


@dataclass(frozen=True)
class Inputs:
    """What all tasks of one run share."""

    data: Path | None = None
    """A folder with local files of the tasks; None: their data is read from the hub."""
    limit: int | None = None
    """Use only the first `limit` items of each task, or of each part of a task that has parts."""
    shots: int | None = None
    """The number of examples in each prompt; None: the papers' number for each task."""
    samples: int | None = None
    """The number of programs that are sampled for each item; None: the papers' number for each task."""
    judge: Judge | None = None
    """Rates answers; None: benchmarks that need a judge return answers without metrics."""


@dataclass(frozen=True)
class Benchmark:
    """One benchmark: two functions, and the facts that decide whether it can be run."""

    obstacle: Callable[[Inputs], str | None]
    """Returns the reason why the benchmark cannot be run, or None if it can."""
    run: Callable[[Answerer, Inputs, Path], dict[str, Any]]
    """Runs the benchmark, with answers cached in a folder of its own; returns `metrics`, `items` and perhaps `note`."""
    runs_code: bool = False
    """Whether it executes programs that the model writes."""
    examples: int = 0
    """The most examples that a prompt may hold; by default it holds none."""
    longest_answer: int = 0
    """The most tokens of an answer; 0: as many as the context has room for."""
    package: str | None = None
    """The Python package that holds the data, if it is not read from a folder or the hub."""
