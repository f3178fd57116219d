"""Measures which cheap figure of a shape ranks shapes as training ranks them.

    python benchmarks/search_signals.py TEACHER [--target 0.7] [--shapes 40] [--tokens 20k] [--context 128] [--seed 0]

Draws shapes at random from all within the budget, distils each on equal blocks in equal order, and prints the rank
correlation (Spearman's) between the final held-out KL of the shapes and

- the KL of the untrained shape, cut plainly, with one repair, or with both;
- the KL predicted from probes, the teacher cut along one axis alone, plainly or as students are, untrained and after a
  number of training tokens; with and without taking off the KL of the whole teacher after that training, and with the
  KL of the untrained shape, rotated and rescaled, added;
- the KL after a sixteenth, a quarter and a half of the tokens;
- the number of parameters.

Prints one line of JSON per figure, then the shapes from best to worst.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from minitron.model.arch import Arch
from minitron.nas import costs_of, removed_layers, shapes_within
from minitron.nas.effort import LEVELS, Effort
from minitron.nas.probes import Probing, predicted, probes
from minitron.nas.shapes import Shapes
from minitron.nas.trial import Trial
from minitron.nas.workspace import Workspace
from minitron.nas.zero_shot import ZeroShot
from minitron.pruning import measure_importance
from minitron.quantities import parse_count
from minitron.recipe import CUT_ONLY, PruneRecipe, Recipe
from minitron.session import Session

EARLY = (16, 4, 2)
"""Shapes are also measured after these fractions of the tokens."""
METHODS = {
    "plain": CUT_ONLY,
    "rescaled": PruneRecipe(rotate=False, refit=False),
    "rotated": PruneRecipe(rotate=True, rescale_norms=False, refit=False),
    "rotated and rescaled": PruneRecipe(refit=False),
}


def main() -> None:
    """Print the correlations."""
    parser = argparse.ArgumentParser()
    parser.add_argument("teacher")
    parser.add_argument("--target", default="0.7")
    parser.add_argument("--data", default="wiki")
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--shapes", type=int, default=40)
    parser.add_argument("--tokens", type=parse_count, default=20_000)
    parser.add_argument("--probe-tokens", type=parse_count, nargs="+", default=[256, 512, 1_024, 2_048, 4_096])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    recipe = Recipe.model_validate({
        "teacher": options.teacher, "target_params": options.target, "data": options.data, "context": options.context,
        "seed": options.seed, "search": {"distill_tokens": options.tokens},
        "distill": {"tokens": 2 * options.tokens, "batch_size": 2},
    })  # fmt: skip
    session = Session(recipe)
    shapes, _ = shapes_within(session)
    rng = np.random.default_rng(options.seed)
    shapes = shapes.at(np.sort(rng.permutation(len(shapes))[: options.shapes]))
    importance = measure_importance(session, removed_layers(shapes))
    with TemporaryDirectory() as folder:
        _study(Workspace(session, importance, Path(folder), _effort(session, shapes)), shapes, options.probe_tokens)


def _effort(session: Session, shapes: Shapes, **changes: Any) -> Effort:
    """Return the effort of trials of all of the tokens, with changes."""
    return replace(costs_of(session, shapes).at(LEVELS[0]), **changes)


def _study(workspace: Workspace, shapes: Shapes, probe_tokens: list[int]) -> None:
    trial, session = Trial(workspace), workspace.session
    steps = workspace.effort.trial_steps
    tokens = steps * workspace.step_tokens
    archs = [shapes[i] for i in range(len(shapes))]
    final, early = [], {share: list[float]() for share in EARLY}
    for i, arch in enumerate(archs):
        label = f"shape {i + 1} of {len(archs)}"
        for share, losses in early.items():
            losses.append(trial(i, arch, steps // share, label))
        final.append(trial(i, arch, steps, label))
        rmtree(workspace.trial_folder(i))
    about = {"shapes": len(archs), "tokens": tokens}
    _show(**about, signal="parameters", correlation=_spearman(-shapes.figures["num_parameters"], final))
    for share, losses in early.items():
        _show(**about, signal=f"distilled on {tokens // share:,} tokens", correlation=_spearman(losses, final))
    for name, method in METHODS.items():
        other = Session(session.recipe.model_copy(update={"prune": method}))
        zero_shot = ZeroShot(replace(workspace, session=other))
        by_key = sorted(range(len(archs)), key=lambda i: zero_shot.key(archs[i]))
        by_number = dict(zip(by_key, (zero_shot(archs[i]) for i in by_key), strict=True))
        untrained = [by_number[i] for i in range(len(archs))]
        _show(**about, signal=f"untrained, {name}", correlation=_spearman(untrained, final))
        if name in {"plain", "rotated and rescaled"}:
            probed = {axis: (probe, zero_shot(probe)) for axis, probe in probes(shapes).items()}
            _show_probes(about | {"signal": f"probes untrained, {name}"}, workspace, shapes, probed, final)
    for count in sorted(probe_tokens):
        effort = _effort(session, shapes, probe_tokens=min(count, tokens))
        for name, method in {"plain": CUT_ONLY, "as students": session.recipe.prune}.items():
            other = Session(session.recipe.model_copy(update={"prune": method}))
            probing = Probing(replace(workspace, session=other, effort=effort))
            probed = {axis: (probe, probing(probe)) for axis, probe in probes(shapes).items()}
            signal = f"probes after {count:,} tokens, {name}"
            _show_probes(about | {"signal": signal}, workspace, shapes, probed, final)
            whole = round(probing(shapes.teacher), 4)
            about_whole = about | {"signal": f"{signal}, less the whole teacher's", "whole": whole}
            _show_probes(about_whole, workspace, shapes, probed, final, of_training=whole)
            expected = predicted(shapes, workspace.importance, probed, of_training=whole)
            signal = f"{signal}, less the whole teacher's, plus untrained"
            _show(**about, signal=signal, correlation=_spearman(expected + np.array(untrained), final))
    for i in np.argsort(final):
        sizes = {name: int(values[i]) for name, values in shapes.sizes.items()}
        _show(kl=round(final[i], 4), num_parameters=archs[i].num_parameters, **sizes)


def _show_probes(
    about: dict[str, Any],
    workspace: Workspace,
    shapes: Shapes,
    probed: dict[str, tuple[Arch, float]],
    final: list[float],
    of_training: float = 0.0,
) -> None:
    costs = {axis: round(kl, 4) for axis, (_, kl) in probed.items()}
    expected = predicted(shapes, workspace.importance, probed, of_training=of_training)
    _show(**about, correlation=_spearman(expected, final), probes=costs)


def _spearman(one: Any, other: Any) -> float:
    ranks = np.stack([np.argsort(np.argsort(np.asarray(values))).astype(float) for values in (one, other)])
    table = np.asarray(np.corrcoef(ranks))
    return round(float(table[0, 1]), 3)


def _show(**row: Any) -> None:
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
