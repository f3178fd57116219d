"""Runs MBPP: programs that a model writes from a description and tests (arXiv 2108.07732).

The papers give it no examples (arXiv 2407.14679, table 2). The prompt is then a docstring with the description and the
first test, as InCoder's authors (arXiv 2204.05999) and the harness of BigCode have it: nothing else would show a model
where its program ends. With `--shots` of up to three, prompt, examples and stop are those of lm-eval.
"""

from pathlib import Path
from typing import Any

from minitron.harness.answers import Answerer
from minitron.harness.interface import Benchmark, Inputs
from minitron.harness.programs import Generation, Source

SOURCE = Source("mbpp.jsonl", "google-research-datasets/mbpp", "full", ("prompt", "test"))
WITHOUT_EXAMPLES = Generation("MBPP", ("\nclass", "\nassert", '\n"""', "\nprint", "\nif", "\n<|/", "\n```"), 256)
WITH_EXAMPLES = Generation("MBPP", ("[DONE]",), 256)
EXAMPLES = (2, 3, 4)
"""The numbers of the items that may be shown as examples."""
TEST_ITEMS = range(11, 511)
"""The numbers of the items in the test split."""


def obstacle(inputs: Inputs) -> str | None:
    """Return the reason why the benchmark cannot be run, or None."""
    if inputs.data is None:
        return None
    if missing := SOURCE.obstacle(inputs.data):
        return missing
    numbers, examples = {row.get("task_id") for row in SOURCE.rows(inputs.data)}, EXAMPLES[: inputs.shots or 0]
    if not numbers.issuperset(examples):
        return f"{SOURCE.file} lacks task_id 2, 3 or 4, which are its examples"
    return None if numbers.intersection(TEST_ITEMS) else f"{SOURCE.file} lacks the items to test, task_id 11 to 510"


def run(answerer: Answerer, inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Return the share of programs that pass their tests; programs are cached in `folder`."""
    rows = {row["task_id"]: row for row in SOURCE.rows(inputs.data)}
    items = [rows[i] for i in TEST_ITEMS if i in rows][: inputs.limit]
    if inputs.shots:
        examples = "".join(f"{_prompt(rows[i])}{rows[i]['code']}\n[DONE]\n\n" for i in EXAMPLES[: inputs.shots])
        generation, prompts = WITH_EXAMPLES, [examples + _prompt(item) for item in items]
    else:
        generation, prompts = WITHOUT_EXAMPLES, [_docstring(item) for item in items]
    samples = generation.generate(answerer, prompts, inputs, folder)
    programs = [
        ["\n".join([item.get("test_setup_code", ""), code, *item["test_list"]]) for code in codes]
        for item, codes in zip(items, samples, strict=True)
    ]
    return generation.score(programs)


BENCHMARK = Benchmark(
    obstacle, run, runs_code=True, examples=len(EXAMPLES), longest_answer=WITH_EXAMPLES.max_new_tokens
)


def _docstring(row: dict[str, Any]) -> str:
    return f'"""\n{row["text"]}\n{row["test_list"][0]}\n"""\n'


def _prompt(row: dict[str, Any]) -> str:
    tests = "\n".join(row["test_list"][:3])
    return (
        f"You are an expert Python programmer, and here is your task: {row['text']} "
        f"Your code should pass these tests:\n\n{tests}\n[BEGIN]\n"
    )
