"""Cuts students of several sizes out of one teacher, each of which is the beginning of the next larger one.

Sorted by importance, a teacher holds every smaller student at its beginning (Once-for-All, arXiv 1908.09791; Nemotron
Elastic, arXiv 2511.16664, section 3). Students that are cut so share their weights, so that one training serves all.
"""

from itertools import pairwise

import torch

from minitron.errors import UserError
from minitron.model.arch import Arch
from minitron.model.beginning import Beginning
from minitron.model.checkpoint import Checkpoint
from minitron.pruning.cut import Cut
from minitron.pruning.rotate import nested_basis, rotates
from minitron.pruning.scores import Importance
from minitron.pruning.selection import LAYER_BLOCKS, Kept, kept_layers, select
from minitron.pruning.statistics import STREAM_MOMENT
from minitron.recipe import PruneRecipe


def require_nestable(recipe: PruneRecipe) -> None:
    """Check that students can be cut as beginnings of each other, as the recipe says.

    Raises:
        UserError: it merges heads, refits, or cuts in rounds, which gives every shape weights of its own.
    """
    reasons = {"merge_heads": recipe.merge_heads, "refit": recipe.refit, "rounds": recipe.rounds > 1}
    if given := next((name for name, holds in reasons.items() if holds), None):
        raise UserError(f"prune.{given} gives every shape weights of its own; leave it out of a nested series")


def nested_cuts(teacher: Checkpoint, importance: Importance, archs: list[Arch], recipe: PruneRecipe) -> list[Cut]:
    """Return the cut of each shape, largest first, every one the beginning of the one before along every axis.

    Its layers are among those of the one before. Entries stand in the order of their importance, and the directions of
    a rotated stream in an order that serves all hidden sizes (`rotate.nested_basis`).

    Raises:
        UserError: a shape has more of something than the one before; or see `selection.kept_layers`.
    """
    for larger, smaller in pairwise(archs):
        require_inside(smaller, larger)
    largest, layers = archs[0], nested_layers(importance, teacher.arch, archs)
    kept = select(importance, teacher.arch, largest, ranked=True)
    sizes = [arch.axis_size("hidden") for arch in archs]
    basis = None
    if min(sizes) < teacher.arch.axis_size("hidden") and rotates(teacher.arch, recipe):
        if STREAM_MOMENT not in importance:
            raise UserError("the importance was measured without the moment of the stream: calibrate with prune.rotate")
        basis = nested_basis(teacher.arch, sizes, importance[STREAM_MOMENT], teacher.tensor)
    cuts = []
    for arch, numbers in zip(archs, layers, strict=True):
        begins = Beginning(largest, arch, numbers)
        own: Kept = {axis: indices[..., begins.positions(axis)] for axis, indices in kept.items() if axis != "layer"}
        own["layer"] = torch.tensor(numbers)
        directions = None if basis is None else basis[:, : arch.axis_size("hidden")]
        cuts.append(Cut(teacher.arch, arch, own, teacher.checked_tensor, directions, is_nested=True))
    return cuts


def nested_layers(importance: Importance, teacher: Arch, archs: list[Arch]) -> list[list[int]]:
    """Return the teacher's numbers of the layers that each shape keeps, all of them among those of the shape before.

    Raises:
        UserError: see `selection.kept_layers`.
    """
    kept: list[list[int]] = []
    for arch in archs:
        allowed = _allowing(importance, kept[-1]) if kept else importance
        kept.append(kept_layers(allowed, teacher, arch).tolist())
    return kept


def _allowing(importance: Importance, layers: list[int]) -> Importance:
    """Return an importance by which no layer but some is kept."""
    scores = importance["layer"]
    others = torch.ones(len(scores), dtype=torch.bool)
    others[layers] = False
    allowed = {"layer": scores.masked_fill(others, float("-inf"))}
    if (blocks := importance.get(LAYER_BLOCKS)) is not None and others.any():
        removed = others.nonzero().flatten()
        first, last = int(removed[0]), int(removed[-1])
        counts, starts = (torch.arange(size) for size in blocks.shape)
        covers = (starts <= first) & (starts + counts[:, None] > last)
        allowed[LAYER_BLOCKS] = blocks.masked_fill(~covers, float("inf"))
    return importance | allowed


def require_inside(smaller: Arch, larger: Arch) -> None:
    """Check that a shape has no more of anything than a larger one, in every group of a grouped axis as well.

    Raises:
        UserError: it has.
    """
    for name, size in smaller.sizes.items():
        if size > larger.sizes[name]:
            raise UserError(f"{name} {size} of a smaller student is above the {larger.sizes[name]} of the one before")
    for axis in smaller.grouped:
        if smaller.entries(axis) > larger.entries(axis):
            raise UserError(
                f"a smaller student has {smaller.entries(axis)} entries of {axis} in each group, and the one before "
                f"{larger.entries(axis)}"
            )


def beginning_of(largest: Checkpoint, kept: list[int], smaller: Checkpoint, smaller_kept: list[int]) -> Beginning:
    """Return a pruned model as the beginning of a larger one, of which it keeps some of the teacher's layers."""
    return Beginning(largest.arch, smaller.arch, [kept.index(number) for number in smaller_kept])
