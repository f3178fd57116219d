"""Selects the entries of every axis that a student keeps, by their importance."""

from collections.abc import Mapping

import torch
from torch import Tensor

from minitron.errors import UserError
from minitron.model.arch import Arch
from minitron.pruning.scores import Importance

LAYER_BLOCKS = "layer_blocks"
"""The key in an importance of the damage of removing layers as one block; see `depth.score_depth`."""

Kept = dict[str, Tensor]
"""Indices of the kept entries by axis, in the student's order: (size,), preceded by the teacher's layers and experts
where each of these keeps entries of its own."""


def select(importance: Importance, teacher: Arch, student: Arch, ranked: bool = False) -> Kept:
    """Return the most important entries of every axis, in the teacher's order; with `ranked`, the best first.

    With `ranked`, the entries of a smaller shape are the beginning of those of a larger one, in every group of a
    grouped axis; layers stay in the teacher's order.

    Entries of a grouped axis (query heads, Mamba heads) are ranked within each kept group, and every group keeps an
    equal number. Mamba heads are ranked by the channels that are kept. Layers are ranked among the layers of their
    kind, or removed as the one block that does least damage.

    Raises:
        UserError: layers are removed as one block, and blocks of that length were not scored.
    """
    kept = {"layer": kept_layers(importance, teacher, student)}
    for axis in _ungrouped_first(teacher):
        scores = importance[axis]
        if inner := _inner(teacher, axis):
            channels = kept[inner].unsqueeze(-2).expand(*scores.shape[:-1], student.axis_size(inner))
            scores = scores.gather(-1, channels).norm(dim=-1)
        if group := teacher.grouped.get(axis):
            best = _top(scores.unflatten(-1, (teacher.axis_size(group), -1)), student.entries(axis), ranked)
            kept[axis] = _within_layer(best, teacher.entries(axis), kept.get(group))
        else:
            kept[axis] = _top(scores, student.axis_size(axis), ranked)
    return kept


def kept_layers(importance: Importance, teacher: Arch, student: Arch) -> Tensor:
    """Return the teacher's numbers of the layers that a student of this depth keeps.

    Raises:
        UserError: layers are removed as one block, and blocks of that length were not scored.
    """
    scores = importance["layer"]
    if (blocks := importance.get(LAYER_BLOCKS)) is not None:
        depth, count = teacher.axis_size("layer"), teacher.axis_size("layer") - student.axis_size("layer")
        start = int(blocks[count].argmin())
        if not torch.isfinite(blocks[count, start]):
            raise UserError(f"the importance has no score of blocks of {count} layers")
        return torch.tensor([i for i in range(depth) if not start <= i < start + count])
    if not teacher.layer_counts:
        return _top(scores, student.axis_size("layer"))
    kept: list[Tensor] = []
    for kind, count in student.layer_counts.items():
        numbers = torch.tensor(teacher.layer_numbers(kind))
        kept.append(numbers[_top(scores[numbers], count)])
    return torch.cat(kept).sort().values


def ranked_depth(importance: Importance, teacher: Arch, depth: int, given: Mapping[str, int]) -> dict[str, int]:
    """Return how many layers of each kind are among the `depth` best of all layers, by size name.

    Layers of all kinds are ranked together (Minitron-SSM, arXiv 2504.11409, section 3), except that the best layer of
    every kind is kept, and that kinds whose number is among the `given` sizes have that number and are not ranked.

    Raises:
        UserError: see `Arch.split_depth`.
    """
    given = {name: given[name] for name in teacher.depth_names[1:] if name in given}
    counts = {name: count if name in given else 1 for name, count in teacher.split_depth(depth, given).items()}
    kinds = [f"num_{kind}_layers" for kind in teacher.layers]
    best_first = [kinds[i] for i in importance["layer"].argsort(descending=True, stable=True).tolist()]
    for name in counts.keys() - given.keys():
        best_first.remove(name)
    free = [name for name in best_first if name not in given]
    for name in free[: depth - sum(counts.values())]:
        counts[name] += 1
    return counts


def kept_share(importance: Importance, teacher: Arch, student: Arch, axis: str) -> float:
    """Return the share of an axis's squared scores that the student's number of best entries holds.

    The share is averaged over layers; the entries of a grouped axis are the best within each group.
    """
    scores = importance[axis]
    if axis == "layer":
        kept = scores[kept_layers(importance, teacher, student)]
        return float(kept.square().sum() / scores.square().sum().clamp_min(1e-30))
    if _inner(teacher, axis):
        scores = scores.norm(dim=-1)
    if group := teacher.grouped.get(axis):
        scores = scores.unflatten(-1, (teacher.axis_size(group), -1))
    energy = scores.square().sort(dim=-1, descending=True).values
    total = energy.sum(-1)
    share = energy[..., : student.entries(axis)].sum(-1) / total.clamp_min(1e-30)
    return float(share[total > 0].mean()) if (total > 0).any() else 1.0  # layers without the axis have no scores


def score_shape(arch: Arch, axis: str) -> list[int]:
    """Return the shape of an axis's importance."""
    family, shape = arch.family, [arch.axis_size(axis)]
    if axis in family.per_expert_axes:
        shape = [arch.axis_size("expert"), *shape]
    if axis in family.per_layer_axes:
        shape = [arch.axis_size("layer"), *shape]
    return [*shape, arch.axis_size(inner)] if (inner := _inner(arch, axis)) else shape


def _ungrouped_first(arch: Arch) -> list[str]:
    """Return the prunable axes but depth, each after the axes that its own choice of entries depends on."""
    axes = [axis for axis in arch.prunable_axes if axis != "layer"]
    return sorted(axes, key=lambda axis: axis in arch.grouped or _inner(arch, axis) is not None)


def _inner(arch: Arch, axis: str) -> str | None:
    """Return the axis on whose kept entries an axis is scored, if there is one."""
    return next((tap.axes[1] for tap in arch.taps if tap.axes[0] == axis and len(tap.axes) > 1), None)


def _within_layer(best: Tensor, per_group: int, kept_groups: Tensor | None) -> Tensor:
    """Number entries within the layer, of entries (…, groups, count) numbered within all groups, for kept groups."""
    num_groups, count = best.shape[-2:]
    numbers = best + per_group * torch.arange(num_groups)[:, None]
    if kept_groups is not None:
        numbers = numbers.gather(-2, kept_groups.unsqueeze(-1).expand(*kept_groups.shape, count))
    return numbers.flatten(-2)


def _top(scores: Tensor, count: int, ranked: bool = False) -> Tensor:
    """Return the `count` best entries of scores (…, size), in their order or with `ranked` the best first."""
    best = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return best if ranked else best.sort(dim=-1).values
