"""The Berkeley Function-Calling Leaderboard: answers in its prompt format, judged by its own checker.

The questions and the words around them come from the package bfcl-eval (`pip install --no-deps bfcl-eval`); the checker
is its command `bfcl`, which needs the package with all that it depends on, in any environment on the PATH.
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

from minitron.harness.answers import Answerer, Messages, Request, kept
from minitron.harness.judge import Judge

MAX_NEW_TOKENS = 512
LIVE = ("live_simple", "live_multiple", "live_parallel", "live_parallel_multiple", "live_irrelevance", "live_relevance")
NON_LIVE = (
    "simple_python",
    "simple_java",
    "simple_javascript",
    "multiple",
    "parallel",
    "parallel_multiple",
    "irrelevance",
)
"""The categories of one turn: what the leaderboard's second version, that of the papers, consists of."""
REGISTERED = "google/gemma-3-1b-it"
"""The checker knows models by name; this one's answers are read as they are in the prompt format, as ours are."""


def missing(data: Path | None) -> str | None:
    """Why it cannot be run."""
    found = importlib.util.find_spec("bfcl_eval")
    return None if found else "its questions are in the package bfcl-eval: pip install --no-deps bfcl-eval"


def run(answerer: Answerer, data: Path | None, folder: Path, limit: int | None, judge: Judge | None) -> dict[str, Any]:
    """Accuracies by category, and over all questions of real users (live) and all others.

    The answers are kept in `folder` as the leaderboard's results; `limit` is that of each category.
    """
    items = 0
    for category, entries in _questions().items():
        questions = {entry["id"]: entry for entry in entries[:limit]}
        group = "live" if category in LIVE else "non_live"
        path = folder / "result" / REGISTERED.replace("/", "_") / group / f"BFCL_v4_{category}_result.json"

        def answered(ids: list[str], stage: str, questions: Any = questions) -> list[dict[str, Any]]:
            told = answerer.answers([_request(questions[each]) for each in ids], stage)
            return [{"id": key, "result": answer} for key, answer in zip(ids, told, strict=True)]

        kept(f"BFCL {category}", path, list(questions), "id", answered)
        items += len(questions)
    metrics, problem = _checked(folder)
    return {"metrics": metrics, "items": items, **({"note": problem} if problem else {})}


@cache
def _questions() -> dict[str, list[dict[str, Any]]]:
    """By category; the package makes folders for its locks when it is imported, for as long as it is given here."""
    with TemporaryDirectory() as folder:
        os.environ["BFCL_PROJECT_ROOT"] = folder
        from bfcl_eval.utils import load_dataset_entry

        found = {category: load_dataset_entry(category) for category in (*LIVE, *NON_LIVE)}
        del os.environ["BFCL_PROJECT_ROOT"]
    return found


def _request(entry: dict[str, Any]) -> Request:
    """The first turn of a question, under the leaderboard's default system prompt."""
    messages: Messages = [dict(message) for message in entry["question"][0]]
    prompt = _system_prompt(entry["function"])
    if messages[0]["role"] == "system":
        messages[0]["content"] = f"{prompt}\n\n{messages[0]['content']}"
    else:
        messages.insert(0, {"role": "system", "content": prompt})
    return Request(messages, MAX_NEW_TOKENS)


def _system_prompt(functions: list[dict[str, Any]]) -> str:
    from bfcl_eval.constants import default_prompts as words

    style = words.PROMPT_STYLE_TEMPLATES["classic"]
    form = {"output_format": words.OUTPUT_FORMAT_MAPPING["python"], "param_types": words.PARAM_TYPE_MAPPING["python"]}
    prompt: str = words.PROMPT_TEMPLATE_MAPPING["plaintext"].format(
        persona=style["persona"], task=style["task"], multiturn_behavior=style["multiturn_behavior"],
        tool_call_format=style["tool_call_no_tag"].format(**form),
        available_tools=style["available_tools"].format(format="json", functions=json.dumps(functions, indent=4)),
    )  # fmt: skip
    return prompt


def _checked(folder: Path) -> tuple[dict[str, float], str | None]:
    """What `bfcl evaluate` says of the answers, in per cent, or why it says nothing."""
    command = shutil.which("bfcl")
    if command is None:
        return {}, f"not judged: `bfcl`, the command of bfcl-eval, is not on the PATH; the answers are in {folder}"
    categories = ",".join((*LIVE, *NON_LIVE))
    done = subprocess.run(
        [command, "evaluate", "--model", REGISTERED, "--test-category", categories, "--partial-eval"],
        env={**os.environ, "BFCL_PROJECT_ROOT": str(folder)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    heads = dict(_heads(folder / "score"))
    if done.returncode or not heads:
        last = next(iter(reversed((done.stderr or done.stdout).strip().splitlines())), "no word")
        return {}, f"not judged: bfcl evaluate failed ({last}); the answers are in {folder}"
    metrics = {}
    for name, part in (("live", LIVE), ("non_live", NON_LIVE)):
        counts = [heads[category] for category in part if category in heads]
        right, asked = (sum(count[key] for count in counts) for key in ("correct_count", "total_count"))
        if asked:
            metrics[name] = 100 * right / asked
    return metrics | {category: 100 * head["accuracy"] for category, head in heads.items()}, None


def _heads(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The first line of each score file, by category."""
    for path in sorted(folder.rglob("BFCL_v4_*_score.json")):
        with path.open(encoding="utf-8") as file:
            yield path.name.removeprefix("BFCL_v4_").removesuffix("_score.json"), json.loads(file.readline())
