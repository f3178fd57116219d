"""What calibration costs beyond the forward pass that it rides on.

    python benchmarks/calibration_cost.py [TEACHER] [--blocks 16] [--rounds 5]

Alternates, in one run, a plain forward pass of a whole model in memory over blocks of 512 tokens, calibration (scores
and block influence, layers read from disk one by one), and calibration with the second moment of the stream. A line of
JSON a round with seconds, and the ratios to the plain pass of the same round: median, lowest, highest.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from minitron.pruning.calibrate import calibrate
from minitron.recipe import Recipe
from minitron.session import Session


def main() -> None:
    """Three ways, round after round."""
    parser = argparse.ArgumentParser()
    parser.add_argument("teacher", nargs="?", default="smollm2")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    tokens = 512 * options.blocks
    inputs = Session(Recipe.model_validate({
        "teacher": options.teacher, "context": 512, "search": {"tokens": 512}, "evaluation": {"tokens": 512},
        "calibration": {"tokens": tokens}, "distill": {"tokens": tokens},
    }))  # fmt: skip
    blocks, recipe = inputs.calibration_blocks, inputs.recipe.calibration
    ways: dict[str, Callable[[], Any]] = {
        "plain": lambda: forward(inputs),
        "scores": lambda: calibrate(inputs.teacher, blocks, recipe, inputs.device, inputs.dtype),
        "scores and moment": lambda: calibrate(inputs.teacher, blocks, recipe, inputs.device, inputs.dtype, True),
    }
    rows = []
    for way in ways.values():
        way()  # files into memory, kernels chosen
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
def forward(inputs: Session) -> None:
    """The blocks through the model, one at a time, up to its last hidden states."""
    for ids in inputs.calibration_blocks.ids.split(1):
        inputs.model.base_model(input_ids=ids.to(inputs.device), use_cache=False)


def timed(way: Callable[[], Any]) -> float:
    """Seconds."""
    started = time.monotonic()
    way()
    return time.monotonic() - started


if __name__ == "__main__":
    main()
