"""Runs the Berkeley Function-Calling Leaderboard: answers in its prompt format, checked by its own checker.

The questions and prompts come from the package bfcl-eval (`pip install --no-deps bfcl-eval`). The checker is the
package's command `bfcl`, which needs bfcl-eval with all of its dependencies, in any environment on the PATH.
"""

import importlib.util
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from minitron.harness.answers import Answerer, Messages, Request, cached_rows
from minitron.harness.interface import Benchmark, Inputs

MAX_NEW_TOKENS = 512
LIVE = ("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple", "live_irrelevance", "live_relevance")
"""The single-turn categories with questions of real users."""
NON_LIVE = (
    "simple_python",
    "simple_java",
    "simple_javascript",
    "multiple",
    "parallel",
    "parallel_multiple",
    "irrelevance",
)
"""The other single-turn categories; with `LIVE`, they form the leaderboard's version 2, which the papers report."""
REGISTERED = "google/gemma-3-1b-it"
"""A model that the checker knows by name and whose answers it reads in the prompt format, as it must read ours."""


def obstacle(inputs: Inputs) -> str | None:
    """Return the reason why the benchmark cannot be run, or None."""
    if importlib.util.find_spec("bfcl_eval") is None:
        return "its questions are in the package bfcl-eval: pip install --no-deps bfcl-eval"
    return None


def run(answerer: Answerer, inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Return accuracies in per cent by category, over all live questions and over all others.

    The answers are cached in `folder` in the leaderboard's format; the limit applies to each category.
    """
    items = 0
    for category, entries in _questions().items():
        questions = {entry["id"]: entry for entry in entries[: inputs.limit]}
        group = "live" if category in LIVE else "non_live"
        path = folder / "result" / REGISTERED.replace("/", "_") / group / f"BFCL_v4_{category}_result.json"

        def make(ids: list[str], stage: str, questions: Any = questions) -> list[dict[str, Any]]:
            answers = answerer.answers([_request(questions[each]) for each in ids], stage)
            return [{"id": key, "result": answer} for key, answer in zip(ids, answers, strict=True)]

        cached_rows(f"BFCL {category}", path, list(questions), "id", make)
        items += len(questions)
    metrics, problem = _check(folder)
    return {"metrics": metrics, "items": items, **({"note": problem} if problem else {})}


BENCHMARK = Benchmark(obstacle, run, package="bfcl-eval", longest_answer=MAX_NEW_TOKENS)


@cache
def _questions() -> dict[str, list[dict[str, Any]]]:
    """Return the questions by category.

    The package makes folders for its locks when it is imported; BFCL_PROJECT_ROOT sends them to a temporary folder.
    """
    with TemporaryDirectory() as folder:
        os.environ["BFCL_PROJECT_ROOT"] = folder
        from bfcl_eval.utils import load_dataset_entry

        questions = {category: load_dataset_entry(category) for category in (*LIVE, *NON_LIVE)}
        del os.environ["BFCL_PROJECT_ROOT"]
    return questions


def _request(entry: dict[str, Any]) -> Request:
    """Return the first turn of a question, after the leaderboard's default system prompt."""
    messages: Messages = [dict(message) for message in entry["question"][0]]
    prompt = _system_prompt(entry["function"])
    if messages[0]["role"] == "system":
        messages[0]["content"] = f"{prompt}\n\n{messages[0]['content']}"
    else:
        messages.insert(0, {"role": "system", "content": prompt})
    return Request(messages, MAX_NEW_TOKENS)


def _system_prompt(functions: list[dict[str, Any]]) -> str:
    from bfcl_eval.constants import default_prompts as prompts

    style = prompts.PROMPT_STYLE_TEMPLATES["classic"]
    parts = {
        **{name: style[name] for name in ("persona", "task", "multiturn_behavior")},
        "tool_call_format": style["tool_call_no_tag"].format(
            output_format=prompts.OUTPUT_FORMAT_MAPPING["python"], param_types=prompts.PARAM_TYPE_MAPPING["python"]
        ),
        "available_tools": style["available_tools"].format(format="json", functions=json.dumps(functions, indent=4)),
    }
    return str(prompts.PROMPT_TEMPLATE_MAPPING["plaintext"].format(**parts))


def _check(folder: Path) -> tuple[dict[str, float], str | None]:
    """Run `bfcl evaluate` on the answers; return accuracies in per cent, and the reason if there are none."""
    command = shutil.which("bfcl")
    if command is None:
        return {}, f"not judged: `bfcl`, the command of bfcl-eval, is not on the PATH; the answers are in {folder}"
    categories = ",".join((*LIVE, *NON_LIVE))
    process = subprocess.run(
        [command, "evaluate", "--model", REGISTERED, "--test-category", categories, "--partial-eval"],
        env={**os.environ, "BFCL_PROJECT_ROOT": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    scores = dict(_scores(folder / "score"))
    if process.returncode or not scores:
        lines = (process.stderr or process.stdout).strip().splitlines() or ["no output"]
        return {}, f"not judged: bfcl evaluate failed ({lines[-1]}); the answers are in {folder}"
    metrics = {}
    for name, group in (("live", LIVE), ("non_live", NON_LIVE)):
        counts = [scores[category] for category in group if category in scores]
        num_correct, num_total = (sum(count[key] for count in counts) for key in ("correct_count", "total_count"))
        if num_total:
            metrics[name] = 100 * num_correct / num_total
    return metrics | {category: 100 * score["accuracy"] for category, score in scores.items()}, None


def _scores(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the category and the first line of each score file, which holds the accuracy and the counts."""
    for path in sorted(folder.rglob("BFCL_v4_*_score.json")):
        with path.open(encoding="utf-8") as file:
            yield path.name.removeprefix("BFCL_v4_").removesuffix("_score.json"), json.loads(file.readline())
