"""Runs HumanEval: functions that a model continues from signature and docstring (arXiv 2107.03374)."""

from pathlib import Path
from typing import Any

from minitron.harness.answers import Answerer
from minitron.harness.interface import Benchmark, Inputs
from minitron.harness.programs import Generation, Source

SOURCE = Source("HumanEval.jsonl", "openai/openai_humaneval", None, ("test",))
GENERATION = Generation("HumanEval", ("\nclass", "\ndef", "\n#", "\nif", "\nprint"), 1024, samples=20)
"""Stops and length are lm-eval's; the number of samples is the papers' (arXiv 2407.14679, table 2)."""


def obstacle(inputs: Inputs) -> str | None:
    """Return the reason why the benchmark cannot be run, or None."""
    return SOURCE.obstacle(inputs.data)


def run(answerer: Answerer, inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Return the share of functions that pass their tests; programs are cached in `folder`."""
    items = SOURCE.rows(inputs.data)[: inputs.limit]
    samples = GENERATION.generate(answerer, [item["prompt"] for item in items], inputs, folder)
    programs = [
        [f"{item['prompt']}{body}\n{item['test']}\ncheck({item['entry_point']})" for body in bodies]
        for item, bodies in zip(items, samples, strict=True)
    ]
    return GENERATION.score(programs)


BENCHMARK = Benchmark(obstacle, run, runs_code=True, longest_answer=GENERATION.max_new_tokens)
