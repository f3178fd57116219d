"""Lists and runs the benchmarks that lm-eval lacks: chats, function calls, and programs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minitron.errors import UserError
from minitron.harness import bfcl, chatrag, humaneval, mbpp, mt_bench
from minitron.harness.answers import Answerer
from minitron.harness.interface import Benchmark, Inputs

BENCHMARKS: dict[str, Benchmark] = {
    "mt_bench": mt_bench.BENCHMARK,
    "chatrag": chatrag.BENCHMARK,
    "bfcl": bfcl.BENCHMARK,
    "humaneval": humaneval.BENCHMARK,
    "mbpp": mbpp.BENCHMARK,
}


def run_benchmarks(names: Sequence[str], answerer: Answerer, inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Run benchmarks with answers cached in `folder`; return by name metrics, items, shots, data and perhaps a note.

    One that fails with a `UserError` has no metrics but a note, and costs no other figure.
    """
    results = {}
    for name in names:
        benchmark = BENCHMARKS[name]
        try:
            result = benchmark.run(answerer, inputs, (folder / name).absolute())
        except UserError as error:
            result = {"metrics": {}, "items": 0, "note": f"not run: {error}"}
        source = benchmark.package or str(inputs.data or "hub")
        results[name] = {**result, "shots": inputs.shots or 0, "data": source}
    return results
