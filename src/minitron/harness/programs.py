"""Generates programs with a model and runs them against their tests, under limits; humaneval.py and mbpp.py use it.

Programs are sampled at the temperature and top-p of the papers, several per item where the papers sample several, and
rated by the unbiased estimate of pass@k. Each program runs in a process of its own with little memory, time and
disk space and no environment variables. That contains mistakes, but it does not stop a program from reading files or
using the network: run the command in a container if you do not trust the model.
"""

import math
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.errors import UserError
from minitron.harness.answers import Answerer, Decoding, cached_rows
from minitron.harness.interface import Inputs
from minitron.harness.local_files import find_path, in_one_line, read_rows
from minitron.progress import Progress

TEMPERATURE, TOP_P = 0.2, 0.95
"""How the papers sample programs (arXiv 2407.14679 and 2408.11796, section 4)."""
REPORTED = (1, 10, 100)
"""The numbers of programs k for which pass@k is reported, as far as that number is sampled (arXiv 2107.03374)."""
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
        except Exception as error:  # of several libraries, which share no class of errors
            raise UserError(
                f"{self.repository} cannot be read from the hub ({in_one_line(error)}); from a folder: --tasks-data"
            ) from error


@dataclass(frozen=True)
class Generation:
    """How the model writes the programs of a benchmark."""

    name: str
    stops: tuple[str, ...]
    """Texts that end a program."""
    max_new_tokens: int
    samples: int = 1
    """The number of programs per item in the papers."""

    def generate(self, answerer: Answerer, prompts: list[str], inputs: Inputs, folder: Path) -> list[list[str]]:
        """Sample programs for each prompt, as many as the inputs ask for; programs are cached in `folder`.

        A program is cached by the number of its item and the number of its sample, so that an interrupted run continues
        and a later one adds items or samples.
        """
        decoding = Decoding(self.stops, self.max_new_tokens, TEMPERATURE, TOP_P)
        samples = range(inputs.samples or self.samples)
        places = {f"{i}-{sample}": i for sample in samples for i in range(len(prompts))}

        def make(keys: list[str], stage: str) -> list[dict[str, Any]]:
            texts = [prompts[places[key]] for key in keys]
            programs = answerer.continuations(texts, decoding, draw=f"{self.name} {keys[0]}", stage=stage)
            return [{"sample": key, "program": program} for key, program in zip(keys, programs, strict=True)]

        path = folder / f"programs-{inputs.shots or 0}-shots.jsonl"
        rows = cached_rows(self.name, path, list(places), "sample", make)
        return [[rows[f"{i}-{sample}"]["program"] for sample in samples] for i in range(len(prompts))]

    def score(self, programs: list[list[str]]) -> dict[str, Any]:
        """Run the programs of each item with their tests; return pass@k, the number of items, and how they were made.

        Equal programs run once.
        """
        results: dict[str, bool] = {}
        with Progress(f"{self.name} tests", sum(map(len, programs)), "programs") as progress:
            for program in (program for item in programs for program in item):
                if program not in results:
                    results[program] = passes(program)
                progress.advance(1)
        num_samples = len(programs[0])
        counts = [sum(results[program] for program in item) for item in programs]
        metrics = {
            f"pass@{k}": sum(pass_at(k, num_samples, count) for count in counts) / len(counts)
            for k in REPORTED
            if k <= num_samples
        }
        note = f"{num_samples} sampled per item, temperature {TEMPERATURE}, top-p {TOP_P}"
        return {"metrics": metrics, "items": len(programs), "samples": num_samples, "note": note}


def pass_at(k: int, num_samples: int, num_passed: int) -> float:
    """Return the unbiased estimate of the chance that one of k programs passes: 1 − C(n − c, k) / C(n, k).

    It is the share of all choices of k out of the n samples that hold one of the c that passed (arXiv 2107.03374,
    section 2.1).
    """
    return 1 - math.comb(num_samples - num_passed, k) / math.comb(num_samples, k)


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
