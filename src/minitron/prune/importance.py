"""From calibration statistics to one score per entry of every axis, and from scores to the entries kept."""

import torch
from torch import Tensor

from minitron.model.arch import Arch
from minitron.prune.calibrate import BLOCK_INFLUENCE

Importance = dict[str, Tensor]
"""Per axis: (num_layers, size) where each layer has its own entries, (size,) for the others; higher = keep."""

Kept = dict[str, Tensor]
"""Per axis: indices of the entries kept, in the student's order; (num_layers of the teacher, size) or (size,)."""


def score(statistics: dict[str, Tensor], arch: Arch) -> Importance:
    """Score every prunable axis; layers and taps are summed where the axis is the same in all of them.

    - hidden: Σ over layers and norms of the (batch L2, sequence mean) aggregate of the norm output
      (Minitron, arXiv 2407.14679, section 2.2);
    - ffn: the aggregate at the input of the second MLP matrix;
    - query: the L2 norm of the aggregate over a head's channels at the input of the output projection;
    - kv: the L2 norm over the query heads of the group;
    - layer: block influence.
    """
    importance: Importance = {"layer": statistics[BLOCK_INFLUENCE].clone()}
    for tap in arch.family.taps:
        aggregate = statistics[tap.module].sqrt()  # (num_layers, width)
        size = arch.axis_size(tap.axis)
        entries = aggregate.unflatten(-1, (size, -1)).norm(dim=-1)  # (num_layers, size)
        if tap.axis not in arch.family.per_layer_axes:
            entries = entries.sum(dim=0)
        importance[tap.axis] = importance[tap.axis] + entries if tap.axis in importance else entries
    for axis, group in arch.family.grouped.items():
        if axis not in importance:
            continue
        importance[group] = importance[axis].unflatten(-1, (arch.axis_size(group), -1)).norm(dim=-1)
    return importance


def select(importance: Importance, teacher: Arch, student: Arch) -> Kept:
    """The most important entries of every axis, in the teacher's order.

    Grouped axes (query heads) are ranked inside each kept group and taken equally from each, so that every
    group keeps its own heads.
    """
    kept = {
        axis: _top(importance[axis], student.axis_size(axis))
        for axis in teacher.family.prunable_axes
        if axis not in teacher.family.grouped
    }
    for axis, group in teacher.family.grouped.items():
        if axis not in importance:
            continue
        per_group = teacher.axis_size(axis) // teacher.axis_size(group)
        scores = importance[axis].unflatten(-1, (-1, per_group))  # (…, groups, entries of a group)
        best = _top(scores, student.axis_size(axis) // student.axis_size(group))
        numbers = best + per_group * torch.arange(teacher.axis_size(group))[:, None]  # number within the layer
        chosen = kept[group].unsqueeze(-1).expand(*kept[group].shape, numbers.shape[-1])
        kept[axis] = numbers.gather(-2, chosen).flatten(-2)
    return kept


def kept_share(importance: Importance, teacher: Arch, axis: str, size: int) -> float:
    """The share of an axis's squared scores that its `size` best entries hold, averaged over layers.

    Of a grouped axis, `size` counts the entries within each group.
    """
    scores = importance[axis]
    if group := teacher.family.grouped.get(axis):
        scores = scores.unflatten(-1, (teacher.axis_size(group), -1))
    energy = scores.square().sort(dim=-1, descending=True).values
    return float((energy[..., :size].sum(-1) / energy.sum(-1).clamp_min(1e-30)).mean())


def _top(scores: Tensor, count: int) -> Tensor:
    return scores.topk(count, dim=-1).indices.sort(dim=-1).values
