"""Lists and runs the benchmarks that lm-eval lacks: chats, function calls, and programs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
    """Run benchmarks with answers cached in `folder`; return by name metrics, items, shots, data and perhaps a note."""
    results = {}
    for name in names:
        benchmark = BENCHMARKS[name]
        result = benchmark.run(answerer, inputs, (folder / name).absolute())
        source = benchmark.package or str(inputs.data or "hub")
        results[name] = {**result, "shots": benchmark.shots, "data": source}
    return results
