"""What a student is worth whose teacher was, or was not, corrected on the text it teaches (arXiv 2408.11796, sect. 2).

    python benchmarks/correction.py FOLDER TEACHER --data FILE [--tokens 100k] [--seeds 0 1 2] [--ffn 0.5]

The teacher's MLPs are cut to a share of their size by what the text says. The same pruned model is then taught on the
same text by the teacher as it is, by the teacher corrected before (all of it, its norms, low-rank adapters), and by one
that is corrected alongside; also without any teacher. Printed are the perplexities of all of them on text of the same
kind that none has seen, and the seconds each took.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import minitron
from minitron.quantities import parse_count
from minitron.recipe import Recipe
from minitron.session import Session

BEFORE = ("full", "norms", "lora")


def main() -> None:
    """A line of JSON a model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("teacher")
    parser.add_argument("--data", required=True)
    parser.add_argument("--tokens", type=parse_count, default=100_000)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--correction-rate", type=float, default=1e-4)
    parser.add_argument("--ffn", type=float, default=0.5)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--ways", nargs="+", default=["as it is", *BEFORE, "alongside", "no teacher"])
    options = parser.parse_args()
    for seed in options.seeds:
        study(options, seed)


def study(options: argparse.Namespace, seed: int) -> None:
    """All ways with one seed."""
    folder = options.folder / f"seed-{seed}"
    folder.mkdir(parents=True)

    def recipe(teacher: Any, **distill: Any) -> Recipe:
        return Recipe.model_validate({
            "teacher": str(teacher), "data": options.data, "context": options.context, "seed": seed,
            "calibration": {"tokens": min(options.tokens, 16_384)}, "evaluation": {"tokens": 8_192},
            "search": {"tokens": 2_048},
            "distill": {"tokens": options.tokens, "batch_size": options.batch_size,
                        "learning_rate": options.learning_rate} | distill,
        })  # fmt: skip

    def show(path: Any, seconds: float = 0.0, **about: Any) -> None:
        figures = minitron.evaluate(path, recipe=recipe(path), max_tokens=8_192).figures
        row = {"seed": seed, **about, "perplexity": round(figures["perplexity"], 2), "seconds": round(seconds)}
        print(json.dumps(row), flush=True)

    pruned = folder / "pruned"
    whole = recipe(options.teacher)
    size = round(Session(whole).teacher.arch.sizes["intermediate_size"] * options.ffn / 4) * 4
    minitron.prune(options.teacher, pruned, intermediate_size=size, recipe=whole)
    show(options.teacher, model="teacher")
    show(pruned, model="pruned")
    for way in options.ways:
        student, started = folder / way.replace(" ", "-"), time.monotonic()
        if way == "no teacher":
            minitron.correct(pruned, student, recipe=recipe(pruned))
        elif way in BEFORE:
            teacher = folder / f"teacher-{way}"
            changed = recipe(options.teacher, trains=way, learning_rate=options.correction_rate)
            minitron.correct(options.teacher, teacher, recipe=changed)
            show(teacher, time.monotonic() - started, model="teacher", corrected=way)
            started = time.monotonic()
            minitron.distill(teacher, pruned, student, recipe=recipe(teacher))
        else:
            correction = {"trains": "full", "learning_rate": options.correction_rate} if way == "alongside" else {}
            changed = recipe(options.teacher, correction=correction)
            minitron.distill(options.teacher, pruned, student, recipe=changed)
        show(student, time.monotonic() - started, model="student", taught_by=way)


if __name__ == "__main__":
    main()
