"""Benchmarks beside those of lm-eval: of models that follow instructions, and of those that write programs."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from minitron.errors import UserError
from minitron.files import read_json, write_json
from minitron.harness import bfcl, chatrag, mt_bench, programs
from minitron.harness.answers import Answerer
from minitron.harness.judge import Judge

Run = Callable[[Answerer, Any, Path, int | None, Judge | None], dict[str, Any]]


@dataclass(frozen=True)
class Bench:
    """Why it cannot be run with some folder of data (None: it can), and running it."""

    missing: Callable[[Path | None], str | None]
    run: Run
    runs_code: bool = False
    shots: int = 0
    longest_answer: int = 0
    """Tokens that it lets a model write; 0: as many as a context has room for."""
    package: str | None = None
    """Where its data comes from, if not from a folder."""


BENCHES = {
    "mt_bench": Bench(mt_bench.missing, mt_bench.run),
    "chatrag": Bench(chatrag.missing, chatrag.run, longest_answer=chatrag.MAX_NEW_TOKENS),
    "bfcl": Bench(bfcl.missing, bfcl.run, package="bfcl-eval", longest_answer=bfcl.MAX_NEW_TOKENS),
    "humaneval": Bench(
        programs.missing_humaneval, programs.run_humaneval, runs_code=True, longest_answer=programs.HUMANEVAL_TOKENS
    ),
    "mbpp": Bench(
        programs.missing_mbpp, programs.run_mbpp, runs_code=True, shots=3, longest_answer=programs.MBPP_TOKENS
    ),
}


def run_benches(
    names: Sequence[str], answerer: Answerer, data: Path | None, answers: Path | None, identity: dict[str, Any],
    limit: int | None, judge: Judge | None,
) -> dict[str, Any]:  # fmt: skip
    """By benchmark its metrics, the number of items, and what there is to say of them.

    Answers and judgements are kept in the folder `answers`, if one is given, and are not asked for again.

    Raises:
        UserError: the answers in that folder are not of this `identity` and data.
    """
    identity = {**identity, "data": str(data)}
    with nullcontext(answers) if answers else TemporaryDirectory() as place:
        folder = Path(place)
        folder.mkdir(parents=True, exist_ok=True)
        if (of := folder / "answers.json").exists() and (found := read_json(of)) != identity:
            differing = ", ".join(key for key in identity if found.get(key) != identity[key])
            raise UserError(f"the answers in {folder} are others' ({differing}): choose another folder for --answers")
        write_json(of, identity)
        return {
            name: {
                **BENCHES[name].run(answerer, data, (folder / name).absolute(), limit, judge),
                "shots": BENCHES[name].shots, "data": BENCHES[name].package or str(data or "hub"),
            }
            for name in names
        }  # fmt: skip
