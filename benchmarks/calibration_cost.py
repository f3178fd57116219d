"""Measures what calibration costs in addition to a forward pass.

    python benchmarks/calibration_cost.py [TEACHER] [--blocks 16] [--rounds 5]

Alternates, in one run, a plain forward pass of a whole model in memory over blocks of 512 tokens, calibration (scores
and block influence, layers read from disk one by one), and calibration with the second moment of the stream. Prints a
line of JSON with the seconds of each round, then the ratios to the plain pass of the round: median, lowest, highest.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from minitron.data.blocks import Blocks
from minitron.pruning.calibrate import calibrate
from minitron.recipe import recipe_from
from minitron.session import Session


def main() -> None:
    """Time the three in turn, round after round."""
    parser = argparse.ArgumentParser()
    parser.add_argument("teacher", nargs="?", default="smollm2")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    tokens = 512 * options.blocks
    tokens_of = {"search": 512, "evaluation": 512, "calibration": tokens, "distill": tokens}
    parts = {part: {"tokens": count} for part, count in tokens_of.items()}
    session = Session(recipe_from(None, teacher=options.teacher, context=512, **parts))
    blocks, recipe, runtime = session.calibration_blocks, session.recipe.calibration, session.runtime
    rows = []
    with session.teacher_model() as model:
        ways: dict[str, Callable[[], Any]] = {
            "plain": lambda: forward(model, blocks),
            "scores": lambda: calibrate(session.teacher, blocks, recipe=recipe, runtime=runtime),
            "scores and moment": lambda: calibrate(
                session.teacher, blocks, recipe=recipe, runtime=runtime, others=blocks[: max(1, len(blocks) // 2)]
            ),
        }
        for way in ways.values():
            way()  # reads files into memory and chooses kernels
        for _ in range(options.rounds):
            rows.append({name: timed(way) for name, way in ways.items()})
            print(json.dumps({name: round(seconds, 2) for name, seconds in rows[-1].items()}), flush=True)
    for name in ("scores", "scores and moment"):
        ratios = [row[name] / row["plain"] for row in rows]
        spread = statistics.median(ratios), min(ratios), max(ratios)
        print(
            json.dumps({"way": name, "to_plain": [round(ratio, 3) for ratio in spread], "tokens": tokens}), flush=True
        )


@torch.no_grad()
def forward(model: Any, blocks: Blocks) -> None:
    """Run blocks through a model, one at a time, up to its last hidden states."""
    for ids in blocks.ids.split(1):
        model.base_model(input_ids=ids.to(model.device), use_cache=False)


def timed(way: Callable[[], Any]) -> float:
    """Return the seconds that a call takes."""
    started = time.monotonic()
    way()
    return time.monotonic() - started


if __name__ == "__main__":
    main()
