"""HumanEval (arXiv 2107.03374) and MBPP (2108.07732): programs that a model writes, run against their tests.

Greedy decoding, one program an item. Each is run by a process of its own with little memory, time and disk and no
environment; that keeps mistakes small, but does not keep a program from reading files or the network. Whoever does not
trust the model runs the command in a container.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minitron.errors import UserError
from minitron.harness.answers import Answerer, kept
from minitron.harness.judge import Judge
from minitron.harness.task_files import located, read_items
from minitron.progress import Progress

SECONDS = 10
PASSED = 77
"""The exit status of a program that was run to its end: one that exits by itself has not passed its tests."""
LAUNCHER = f"""\
import resource as r, runpy, sys
for what, most in ((r.RLIMIT_AS, 2**30), (r.RLIMIT_CPU, {SECONDS}), (r.RLIMIT_FSIZE, 2**20), (r.RLIMIT_NPROC, 0),
                   (r.RLIMIT_CORE, 0)):
    r.setrlimit(what, (most, most))
runpy.run_path("program.py", run_name="__main__")
sys.exit({PASSED})
"""
"""Runs a program under limits that it cannot take back (that on further processes does not bind root)."""

HUMANEVAL_ENDS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
HUMANEVAL_TOKENS, MBPP_TOKENS = 1024, 256
"""Of a program, as lm-eval has them."""
MBPP_EXAMPLES = (2, 3, 4)
MBPP_TEST = range(11, 511)


def missing_humaneval(data: Path | None) -> str | None:
    """Why it cannot be run with these files."""
    return _missing(data, "HumanEval.jsonl")


def missing_mbpp(data: Path | None) -> str | None:
    """Why it cannot be run with these files."""
    return _missing(data, "mbpp.jsonl")


def run_humaneval(
    answerer: Answerer, data: Path | None, folder: Path, limit: int | None, judge: Judge | None
) -> dict[str, Any]:
    """The share of functions that pass their tests, each continued from its signature and what it is for."""
    items = _rows(data, "HumanEval.jsonl", ("openai/openai_humaneval", None, ("test",)))[:limit]
    prompts = [item["prompt"] for item in items]
    bodies = _written("HumanEval", answerer, folder, prompts, HUMANEVAL_ENDS, HUMANEVAL_TOKENS)
    return _passed("HumanEval", [
        f"{item['prompt']}{body}\n{item['test']}\ncheck({item['entry_point']})"
        for item, body in zip(items, bodies, strict=True)
    ])  # fmt: skip


def run_mbpp(
    answerer: Answerer, data: Path | None, folder: Path, limit: int | None, judge: Judge | None
) -> dict[str, Any]:
    """The share of programs that pass their tests, after three examples."""
    rows = _rows(data, "mbpp.jsonl", ("google-research-datasets/mbpp", "full", ("prompt", "test")))
    by_number = {row["task_id"]: row for row in rows}
    examples = "".join(f"{_task(by_number[i])}{by_number[i]['code']}\n[DONE]\n\n" for i in MBPP_EXAMPLES)
    items = [by_number[i] for i in MBPP_TEST if i in by_number][:limit]
    prompts = [examples + _task(item) for item in items]
    codes = _written("MBPP", answerer, folder, prompts, ("[DONE]",), MBPP_TOKENS)
    return _passed("MBPP", [
        "\n".join([item.get("test_setup_code", ""), code, *item["test_list"]])
        for item, code in zip(items, codes, strict=True)
    ])  # fmt: skip


def passes(program: str) -> bool:
    """Whether it comes to its end without an error, in time and within its limits."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "program.py").write_text(program, encoding="utf-8", errors="replace")
        try:
            done = subprocess.run(
                [sys.executable, "-I", "-c", LAUNCHER], cwd=folder, env={}, stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=SECONDS, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return False
    return done.returncode == PASSED


def _missing(data: Path | None, name: str) -> str | None:
    return None if data is None or located(data, name) else f"{data} holds no {name}"


def _rows(data: Path | None, name: str, hub: tuple[str, str | None, Sequence[str]]) -> list[dict[str, Any]]:
    if data is not None:
        path = located(data, name)
        return read_items(path) if path else []
    from datasets import load_dataset

    repository, part, splits = hub
    try:
        return [dict(row) for split in splits for row in load_dataset(repository, part, split=split)]
    except (OSError, ValueError) as error:
        raise UserError(f"{repository} cannot be read: {error}") from error


def _task(row: dict[str, Any]) -> str:
    tests = "\n".join(row["test_list"][:3])
    return (
        f"You are an expert Python programmer, and here is your task: {row['text']} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )


def _written(
    name: str, answerer: Answerer, folder: Path, prompts: list[str], ends: tuple[str, ...], most: int
) -> list[str]:
    def written(numbers: list[int], stage: str) -> list[dict[str, Any]]:
        told = answerer.continuations([prompts[i] for i in numbers], ends, most, stage)
        return [{"item": i, "program": text} for i, text in zip(numbers, told, strict=True)]

    rows = kept(name, folder / "programs.jsonl", list(range(len(prompts))), "item", written)
    return [rows[i]["program"] for i in range(len(prompts))]


def _passed(name: str, programs: list[str]) -> dict[str, Any]:
    passed = 0
    with Progress(f"{name} tests", len(programs), "programs") as progress:
        for program in programs:
            passed += passes(program)
            progress.advance(1)
    return {"metrics": {"pass@1": passed / len(programs)}, "items": len(programs)}
