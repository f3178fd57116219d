"""Generates programs with a model and runs them against their tests, under limits; humaneval.py and mbpp.py use it.

Decoding is greedy, with one program per item. Each program runs in a process of its own with little memory, time and
disk space and no environment variables. That contains mistakes, but it does not stop a program from reading files or
using the network: run the command in a container if you do not trust the model.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.errors import UserError
from minitron.harness.answers import Answerer, cached_rows
from minitron.harness.local_files import find_path, read_rows
from minitron.progress import Progress

SECONDS = 10
"""The most time that a program may run."""
PASSED = 77
"""The exit status of a program that ran to its end; a program that exits by itself has not passed its tests."""
LAUNCHER = f"""\
import resource as r, runpy, sys
for what, most in ((r.RLIMIT_AS, 2**30), (r.RLIMIT_CPU, {SECONDS}), (r.RLIMIT_FSIZE, 2**20), (r.RLIMIT_NPROC, 0),
                   (r.RLIMIT_CORE, 0)):
    r.setrlimit(what, (most, most))
runpy.run_path("program.py", run_name="__main__")
sys.exit({PASSED})
"""
"""Runs a program under hard limits, which it cannot raise. The limit on further processes does not bind root."""


@dataclass(frozen=True)
class Source:
    """Where the items of a benchmark are: a file below the folder of local data, or a data set on the hub."""

    file: str
    repository: str
    config: str | None
    splits: Sequence[str]

    def obstacle(self, data: Path | None) -> str | None:
        """Return the reason why the items cannot be read from a folder, or None."""
        return None if data is None or find_path(data, self.file) else f"{data} holds no {self.file}"

    def rows(self, data: Path | None) -> list[dict[str, Any]]:
        """Read the items from a folder, or from the hub without one.

        Raises:
            UserError: see `read_rows`; or the hub cannot be reached.
        """
        if data is not None:
            path = find_path(data, self.file)
            return read_rows(path) if path else []
        from datasets import load_dataset

        try:
            return [
                dict(row) for split in self.splits for row in load_dataset(self.repository, self.config, split=split)
            ]
        except (OSError, ValueError) as error:
            raise UserError(f"{self.repository} cannot be read: {' '.join(str(error).split())}") from error


@dataclass(frozen=True)
class Generation:
    """How the model writes the programs of a benchmark."""

    name: str
    stops: tuple[str, ...]
    """Texts that end a program."""
    max_new_tokens: int

    def generate(self, answerer: Answerer, prompts: list[str], folder: Path) -> list[str]:
        """Generate one program per prompt, greedily; programs are cached in `folder`."""

        def make(numbers: list[int], stage: str) -> list[dict[str, Any]]:
            programs = answerer.continuations([prompts[i] for i in numbers], self.stops, self.max_new_tokens, stage)
            return [{"item": i, "program": program} for i, program in zip(numbers, programs, strict=True)]

        rows = cached_rows(self.name, folder / "programs.jsonl", list(range(len(prompts))), "item", make)
        return [rows[i]["program"] for i in range(len(prompts))]

    def score(self, programs: list[str]) -> dict[str, Any]:
        """Run programs with their tests; return the share that passes as `pass@1`, and the number of programs."""
        num_passed = 0
        with Progress(f"{self.name} tests", len(programs), "programs") as progress:
            for program in programs:
                num_passed += passes(program)
                progress.advance(1)
        return {"metrics": {"pass@1": num_passed / len(programs)}, "items": len(programs)}


def passes(program: str) -> bool:
    """Return whether a program runs to its end without an error, in time and within its limits."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "program.py").write_text(program, encoding="utf-8", errors="replace")
        try:
            process = subprocess.run(
                [sys.executable, "-I", "-c", LAUNCHER],
                cwd=folder,
                env={},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                timeout=SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return process.returncode == PASSED
