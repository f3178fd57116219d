"""Which cheap figure of a shape ranks shapes as training ranks them.

    python benchmarks/search_signals.py TEACHER [--target 0.7] [--shapes 40] [--tokens 20k] [--context 128] [--seed 0]

Draws shapes at random from all within the budget, distils each on the same blocks in the same order, and prints the
rank correlation (Spearman's) of the held-out KL that they come to with

- the KL of the untrained shape, cut plainly and with one repair or both;
- the KL predicted from probes, the teacher cut along one axis alone, untrained and after so many tokens of training;
- the KL after a sixteenth, a quarter and a half of the tokens;
- the number of parameters.

A line of JSON each, then the shapes from best to worst.
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from minitron.stages import stored_word

from minitron.model.arch import Arch
from minitron.nas.probes import predicted, probes
from minitron.nas.rank import removed_layers, shapes_within
from minitron.nas.shapes import Shapes
from minitron.nas.trial import Trial, trial_recipe
from minitron.nas.zero_shot import ZeroShot
from minitron.pruning.importance import Importance
from minitron.recipe import PLAIN, PruneRecipe, Recipe, parse_count
from minitron.runtime import World
from minitron.session import Session

EARLY = (16, 4, 2)
"""Shapes are also measured after these fractions of the tokens."""
METHODS = {
    "plain": PLAIN,
    "rescaled": PruneRecipe(rotate=False, refit=False),
    "rotated": PruneRecipe(rotate=True, rescale_norms=False, refit=False),
    "rotated and rescaled": PruneRecipe(refit=False),
}


def main() -> None:
    """Print correlations."""
    parser = argparse.ArgumentParser()
    parser.add_argument("teacher")
    parser.add_argument("--target", default="0.7")
    parser.add_argument("--data", default="wiki")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--shapes", type=int, default=40)
    parser.add_argument("--tokens", type=parse_count, default=20_000)
    parser.add_argument("--probe-tokens", type=parse_count, nargs="+", default=[1_024, 2_048, 4_096, 20_000])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    recipe = Recipe.model_validate({
        "teacher": options.teacher, "target_params": options.target, "data": options.data, "context": options.context,
        "seed": options.seed, "search": {"distill_tokens": options.tokens, "halving": False},
        "distill": {"tokens": options.tokens},
    })  # fmt: skip
    inputs = Session(recipe)
    shapes, _ = shapes_within(inputs)
    rng = np.random.default_rng(options.seed)
    shapes = shapes.at(np.sort(rng.permutation(len(shapes))[: options.shapes]))
    importance = inputs.importance(removed_layers(shapes))
    with TemporaryDirectory() as folder:
        _study(inputs, shapes, importance, Path(folder), options.tokens, options.probe_tokens)


def _study(
    inputs: Session, shapes: Shapes, importance: Importance, work: Path, tokens: int, probe_tokens: list[int]
) -> None:
    train, heldout = inputs.splits.train[: max(1, tokens // inputs.context)], inputs.splits.heldout
    of_train, of_heldout = (
        stored_word(inputs, work / name, blocks, trial_recipe(inputs.recipe), World())
        for name, blocks in (("train", train), ("heldout", heldout))
    )
    trial = Trial(inputs, importance, train, of_train, of_heldout, work)
    archs = [shapes[i] for i in range(len(shapes))]
    final, early = [], {share: list[float]() for share in EARLY}
    for i, arch in enumerate(archs):
        for share, found in early.items():
            found.append(trial(f"shape-{i}", arch, tokens // share, f"shape {i + 1} of {len(archs)}"))
        final.append(trial(f"shape-{i}", arch, tokens, f"shape {i + 1} of {len(archs)}"))
        trial.forget(f"shape-{i}")
    about = {"shapes": len(archs), "tokens": tokens}
    _show(**about, signal="parameters", correlation=_spearman(-shapes.figures["num_parameters"], final))
    for share, found in early.items():
        _show(**about, signal=f"distilled on {tokens // share:,} tokens", correlation=_spearman(found, final))
    for name, method in METHODS.items():
        other = Session(inputs.recipe.model_copy(update={"prune": method}))
        measure = ZeroShot(other, importance, heldout[: max(1, 1024 // inputs.context)], of_heldout)
        by_key = sorted(range(len(archs)), key=lambda i: measure.key(archs[i]))
        of_shape = dict(zip(by_key, (measure(archs[i]) for i in by_key), strict=True))
        untrained = [of_shape[i] for i in range(len(archs))]
        _show(**about, signal=f"untrained, {name}", correlation=_spearman(untrained, final))
        if name in {"plain", "rotated and rescaled"}:
            probed = {axis: (probe, measure(probe)) for axis, probe in probes(shapes).items()}
            _show_probes(about, f"probes untrained, {name}", shapes, importance, probed, final)
    for count in sorted(probe_tokens):
        probed = {
            axis: (probe, trial(f"probe-{axis}", probe, min(count, tokens), f"probe of {axis}"))
            for axis, probe in probes(shapes).items()
        }
        _show_probes(about, f"probes after {count:,} tokens", shapes, importance, probed, final)
    for i in np.argsort(final):
        sizes = {name: int(values[i]) for name, values in shapes.sizes.items()}
        _show(kl=round(final[i], 4), num_parameters=archs[i].num_parameters, **sizes)


def _show_probes(
    about: dict[str, Any], name: str, shapes: Shapes, importance: Importance, probed: dict[str, tuple[Arch, float]],
    final: list[float],
) -> None:  # fmt: skip
    costs = {axis: round(kl, 4) for axis, (_, kl) in probed.items()}
    _show(**about, signal=name, correlation=_spearman(predicted(shapes, importance, probed), final), probes=costs)


def _spearman(one: Any, other: Any) -> float:
    ranks = np.stack([np.argsort(np.argsort(np.asarray(values))).astype(float) for values in (one, other)])
    table = np.asarray(np.corrcoef(ranks))
    return round(float(table[0, 1]), 3)


def _show(**row: Any) -> None:
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
