"""Runs MBPP: programs that a model writes from a description and tests, after three examples (arXiv 2108.07732)."""

from pathlib import Path
from typing import Any

from minitron.harness.answers import Answerer
from minitron.harness.interface import Benchmark, Inputs
from minitron.harness.programs import Generation, Source

SOURCE = Source("mbpp.jsonl", "google-research-datasets/mbpp", "full", ("prompt", "test"))
GENERATION = Generation("MBPP", ("[DONE]",), 256)
"""Stop and length are lm-eval's."""
EXAMPLES = (2, 3, 4)
"""The numbers of the items that are shown as examples."""
TEST_ITEMS = range(11, 511)
"""The numbers of the items in the test split."""


def obstacle(inputs: Inputs) -> str | None:
    """Return the reason why the benchmark cannot be run, or None."""
    if inputs.data is None:
        return None
    if missing := SOURCE.obstacle(inputs.data):
        return missing
    numbers = {row.get("task_id") for row in SOURCE.rows(inputs.data)}
    return None if numbers.issuperset(EXAMPLES) else f"{SOURCE.file} lacks task_id 2, 3 or 4, which are its examples"


def run(answerer: Answerer, inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Return the share of programs that pass their tests; programs are cached in `folder`."""
    rows = {row["task_id"]: row for row in SOURCE.rows(inputs.data)}
    examples = "".join(f"{_prompt(rows[i])}{rows[i]['code']}\n[DONE]\n\n" for i in EXAMPLES)
    items = [rows[i] for i in TEST_ITEMS if i in rows][: inputs.limit]
    codes = GENERATION.generate(answerer, [examples + _prompt(item) for item in items], folder)
    programs = [
        "\n".join([item.get("test_setup_code", ""), code, *item["test_list"]])
        for item, code in zip(items, codes, strict=True)
    ]
    return GENERATION.score(programs)


BENCHMARK = Benchmark(obstacle, run, runs_code=True, shots=3, longest_answer=GENERATION.max_new_tokens)


def _prompt(row: dict[str, Any]) -> str:
    tests = "\n".join(row["test_list"][:3])
    return (
        f"You are an expert Python programmer, and here is your task: {row['text']} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )
