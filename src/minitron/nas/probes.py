"""Predicts what every shape costs from one probe per axis: the teacher with that axis alone cut about half way down.

Losses of untrained shapes do not rank shapes as training does: what is repaired before training, or hurts most at
first, is not what is missed in the end (docs/studies/search.md). So each probe is distilled for a short while.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitron.model.anatomy import AXES
from minitron.model.arch import Arch
from minitron.model.checkpoint import open_checkpoint
from minitron.model.language_model import load_model
from minitron.nas.acceptance import Acceptance, combinations
from minitron.nas.budget import SPEEDS
from minitron.nas.candidates import Candidate
from minitron.nas.effort import probe_recipe
from minitron.nas.shapes import Shapes
from minitron.nas.shortlist import differing, first_of_each_kind, num_kinds
from minitron.nas.trial import train, trial_recipe
from minitron.nas.workspace import Workspace
from minitron.nas.zero_shot import divergence
from minitron.pruning import prune
from minitron.pruning.scores import Importance
from minitron.pruning.selection import kept_share
from minitron.recipe import DistillRecipe

WHOLE = "whole"
"""The name of the probe in which nothing is cut. Its KL is what so short a training does by itself: without it, a shape
that is cut along many axes would count that many times."""


def predict(workspace: Workspace, shapes: Shapes) -> list[Candidate]:
    """Return the shapes of the lowest predicted loss as candidates, the best of some kinds of cuts first.

    An interrupted search returns the candidates that it has written, with everything known about them.
    """
    if not workspace.has_candidates:
        expected = expected_losses(workspace, shapes)
        order = expected.argsort(kind="stable").tolist()
        candidates = []
        # Shapes were tried axis by axis (`Acceptance.of`); those that are offered are tried as they are.
        kinds = first_of_each_kind(shapes, order)[: num_kinds(workspace.effort.shortlist)]
        chosen = differing(shapes, [*kinds, *(i for i in order if i not in kinds)], workspace.effort.zero_shot)
        if not (possible := [i for i in chosen if workspace.acceptance.accepts(shapes[i])]):
            workspace.acceptance.require(shapes[chosen[0]])
        for number, i in enumerate(possible):
            counts = {name: value for name, value in shapes.figures_of(i).items() if name not in SPEEDS}
            candidates.append(Candidate(number, shapes[i], counts, predicted_kl=float(expected[i])))
        workspace.save(candidates)
    return workspace.read_candidates()


def expected_losses(workspace: Workspace, shapes: Shapes) -> NDArray[np.float64]:
    """Return the predicted KL of each shape, (n,), from probes that are measured unless they are known already."""
    archs = probes(shapes, workspace.acceptance)
    losses = _measure_probes(workspace, archs)
    probed = {axis: (arch, losses[axis]) for axis, arch in archs.items()}
    return predicted(shapes, workspace.importance, probed, of_training=losses.get(WHOLE, 0.0))


def predicted(
    shapes: Shapes, importance: Importance, probed: Mapping[str, tuple[Arch, float]], *, of_training: float = 0.0
) -> NDArray[np.float64]:
    """Predict the KL of each shape after as much training as the probes had, (n,), from `probed`: (probe, KL) by axis.

    Scores of different axes do not compare, but shares within an axis do: a shape has the KL `of_training`, that of the
    whole teacher after the training of a probe, and each axis adds the excess of its probe over that KL, in proportion
    to the share of squared importance that the shape loses there.
    """
    teacher, total = shapes.teacher, np.full(len(shapes), float(of_training))
    for axis, (probe, kl) in probed.items():
        rise = max(kl - of_training, 0.0) / max(1 - kept_share(importance, teacher, probe, axis), 1e-9)
        # Of layers of several kinds, two shapes of one depth may have other numbers.
        entries = combinations(shapes, list(teacher.depth_names)) if axis == "layer" else _entries(shapes, axis)
        _, firsts, positions = np.unique(entries, return_index=True, return_inverse=True)
        lost = np.array([1 - kept_share(importance, teacher, shapes[int(i)], axis) for i in firsts])
        total += rise * lost[positions]
    return total


def _measure_probes(workspace: Workspace, archs: Mapping[str, Arch]) -> dict[str, float]:
    """Return the KL of the probe of each axis, and after a short training also that of the `WHOLE` teacher."""
    losses = workspace.probe_losses
    if workspace.effort.probe_tokens:
        archs = {WHOLE: workspace.session.source.arch, **archs}
    if missing := [axis for axis in archs if axis not in losses]:
        measure = Probing(workspace)
        with workspace.timed("probes"):
            for results in workspace.world.map_in_rounds(lambda axis: measure(archs[axis]), missing):
                losses.update(results)
                workspace.save_probe_losses(losses)
        workspace.world.barrier()
    return losses


class Probing:
    """Cuts and trains probes, one block per step.

    They are cut as students are, so that a cut of hidden is rotated: cut plainly, hidden would look twice as expensive
    untrained, and 1.4 times after a short training (docs/studies/search.md).
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace, self.session = workspace, workspace.session
        self.recipe = probe_recipe(self.session.recipe.prune)

    def __call__(self, arch: Arch) -> float:
        """Return the held-out KL of a probe after its training, if there is one."""
        workspace, session, tokens = self.workspace, self.session, self.workspace.effort.probe_tokens
        cut = [name for name, size in arch.sizes.items() if size < session.source.arch.sizes[name]]
        with TemporaryDirectory(dir=workspace.work) as folder:
            pruned = Path(folder) / "pruned"
            prune(session, arch, workspace.importance, pruned, recipe=self.recipe)
            if tokens:
                recipe = probe_training(session.recipe.distill, tokens, session.context)
                label = f"probe of {' and '.join(cut) or 'no cut'}"
                student: Any = train(workspace, Path(folder), recipe, until=None, label=label)
            else:
                runtime = session.runtime
                student = load_model(open_checkpoint(pruned), runtime.device, runtime.dtype, runtime.attention)
        return divergence(student, workspace.zero_shot_blocks, workspace.heldout_outputs)


def probe_training(recipe: DistillRecipe, tokens: int, context: int) -> DistillRecipe:
    """Return how a probe is trained: one block per step, at the peak rate but for the last fifth."""
    changes = {"tokens": tokens, "batch_size": 1, "micro_batch_size": 1, "decay_ratio": 0.2}
    return trial_recipe(recipe, 1, context).model_copy(update=changes)


def probes(shapes: Shapes, acceptance: Acceptance | None = None) -> dict[str, Arch]:
    """Return the probe of each axis in which the shapes differ from the teacher: that axis alone about half way down.

    Where the family or its config class does not allow a cut of one axis alone, the axes bound to it are cut as well,
    or else one other axis; an axis that is cut in the probe of another one needs no probe.
    """
    teacher = shapes.teacher
    axes = [axis for axis in teacher.prunable_axes if AXES[axis] in shapes.sizes]
    cuts: dict[str, list[dict[str, int]]] = {}
    for axis in axes:
        options = np.unique(_entries(shapes, axis))
        middle_first = _from_the_middle(options[options < teacher.entries(axis)].tolist())
        cuts[axis] = [_with_bound_axes(shapes, axis, int(option)) for option in middle_first]
    archs = {axis: arch for axis in axes if (arch := _first_possible(teacher, cuts[axis], acceptance))}
    for axis in axes:
        if not any(arch.axis_size(axis) < teacher.axis_size(axis) for arch in archs.values()):
            pairs = (cut | other for cut in cuts[axis] for of in axes if of != axis for other in cuts[of])
            if arch := _first_possible(teacher, pairs, acceptance):
                archs[axis] = arch
    return archs


def _first_possible(teacher: Arch, cuts: Iterable[dict[str, int]], acceptance: Acceptance | None) -> Arch | None:
    for sizes in cuts:
        if teacher.expressible(sizes):
            arch = teacher.resized(**sizes)
            if acceptance is None or acceptance.accepts(arch):
                return arch
    return None


def _from_the_middle(options: Sequence[int]) -> list[int]:
    return sorted(options, key=lambda size: abs(size - options[(len(options) - 1) // 2]))


def _with_bound_axes(shapes: Shapes, axis: str, option: int) -> dict[str, int]:
    """Return the sizes of a probe with `option` entries along an axis, in each group of a grouped one.

    Layers of several kinds are as many of each as in the first shape of that depth.
    """
    teacher = shapes.teacher
    if axis == "layer":
        first = int(np.argmax(shapes.sizes[AXES[axis]] == option))
        return {name: int(shapes.sizes[name][first]) for name in teacher.depth_names}
    group, product = teacher.grouped.get(axis), teacher.family.product
    sizes = {AXES[axis]: option * (teacher.axis_size(group) if group else 1)}
    if product and not product.ratio and axis == product.of:
        sizes[AXES[product.axes[0]]] = option // teacher.axis_size(product.axes[1])
    for inner, outer in teacher.grouped.items():
        if outer == axis:
            sizes[AXES[inner]] = option * teacher.entries(inner)
    return sizes


def _entries(shapes: Shapes, axis: str) -> NDArray[np.int64]:
    """Return how many entries the shapes have along an axis, (n,), in each group of a grouped one."""
    sizes, group = shapes.sizes[AXES[axis]], shapes.teacher.grouped.get(axis)
    if group is None:
        return sizes
    return sizes // shapes.sizes.get(AXES[group], np.array(shapes.teacher.axis_size(group)))
