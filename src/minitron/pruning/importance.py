"""From calibration statistics to one score per entry of every axis, and from scores to the entries kept."""

import torch
from torch import Tensor

from minitron.errors import UserError
from minitron.model.arch import Arch
from minitron.pruning.calibrate import BLOCK_INFLUENCE, NUM_BLOCKS, ROUTED, STREAM_MOMENT, Statistics
from minitron.recipe import CalibrationRecipe

Importance = dict[str, Tensor]
"""Per axis, higher = keep: (size,), with (num_layers,) before it where each layer has its own entries and
(num_experts,) before that where each expert has; of Mamba heads (num_layers, size, channels). Beside them the
`stream_moment` (hidden, hidden) of the calibration, where it was taken."""

LAYER_BLOCKS = "layer_blocks"
"""Beside them, where layers go as one block: the damage of leaving out n layers from s on, (num_layers + 1,
num_layers); infinite where nothing was tried."""

Kept = dict[str, Tensor]
"""Per axis: indices of the entries kept, in the student's order; (size,), led by the teacher's layers and experts
as in `Importance`."""


def score(statistics: Statistics, arch: Arch, recipe: CalibrationRecipe) -> Importance:
    """Score every prunable axis; layers and taps are summed where the axis is the same in all of them.

    The aggregate of a tap is the recipe's over blocks (`l2`, `mean` or `var`) of its aggregate over tokens
    (Minitron, arXiv 2407.14679, section 2.2 and table 13: batch L2 of the sequence mean).

    - hidden: Σ over layers and norms of the aggregate of the norm output;
    - ffn, in experts too: the aggregate at the input of the second MLP matrix;
    - query: the L2 norm of the aggregate over a head's channels at the input of the output projection;
    - kv: the L2 norm over the query heads of the group;
    - expert: the mean over its tokens of router weight × norm of its output (`reap`, arXiv 2510.13999), or of the
      norm alone (`norm`, as Model-Optimizer has it);
    - Mamba channels: the L2 norm of the aggregate over heads; of Mamba heads the aggregate itself, since a head
      is scored on the channels that are kept (Minitron-SSM, arXiv 2504.11409, section 3). The recipe says whether
      of `x`, of `z` or of the input of the output projection (`out_proj`);
    - layer: block influence.
    """
    importance: Importance = {"layer": statistics[BLOCK_INFLUENCE].clone()}
    if STREAM_MOMENT in statistics:
        importance[STREAM_MOMENT] = statistics[STREAM_MOMENT]
    num_blocks = int(statistics[NUM_BLOCKS])
    for tap in arch.family.taps:
        if tap.choice not in {None, recipe.mamba_scores} or tap.key not in statistics:
            continue
        axis, *inner = tap.axes
        aggregate = _over_blocks(statistics[tap.key], num_blocks, recipe.batch)  # (num_layers, …, width)
        if inner:
            sizes = [arch.axis_size(axis), arch.axis_size(inner[0])]
            importance[axis] = aggregate.unflatten(-1, sizes)
            importance[inner[0]] = importance[axis].norm(dim=-2)
        elif axis == "expert":
            weighted, norms, count = statistics[f"{tap.key}/{ROUTED}"].unbind(dim=-1)
            importance[axis] = (weighted if recipe.expert_scores == "reap" else norms) / count.clamp_min(1)
        else:
            entries = aggregate.unflatten(-1, (arch.axis_size(axis), -1)).norm(dim=-1)  # (num_layers, …, size)
            if axis not in arch.family.per_layer_axes:
                entries = entries.sum(dim=0)
            importance[axis] = importance[axis] + entries if axis in importance else entries
    return importance


def _over_blocks(sums: Tensor, num_blocks: int, aggregate: str) -> Tensor:
    """From Σ s and Σ s² over blocks, (num_layers, 2, …): √Σ s², mean s or the variance of s."""
    first, second = sums.unbind(dim=1)
    if aggregate == "l2":
        return second.sqrt()
    mean = first / num_blocks
    return mean if aggregate == "mean" else (second / num_blocks - mean.square()).clamp_min(0)


def score_shape(arch: Arch, axis: str) -> list[int]:
    """The shape that an axis's importance has."""
    family, shape = arch.family, [arch.axis_size(axis)]
    if axis in family.per_expert_axes:
        shape = [arch.axis_size("expert"), *shape]
    if axis in family.per_layer_axes:
        shape = [arch.axis_size("layer"), *shape]
    return [*shape, arch.axis_size(inner)] if (inner := _inner(arch, axis)) else shape


def select(importance: Importance, teacher: Arch, student: Arch, ranked: bool = False) -> Kept:
    """The most important entries of every axis, in the teacher's order; `ranked`, the most important first.

    Ranked, what a smaller shape keeps is the beginning of what a larger one does, in every group of a grouped axis;
    layers stay in their order.

    Entries of a grouped axis (query heads, Mamba heads) are ranked inside each kept group and taken equally from
    each, so that every group keeps its own. Mamba heads are ranked by the channels that stay. Layers are ranked
    among those of their kind, or go as the one block that does least damage.

    Raises:
        UserError: nothing is known of blocks of so many layers.
    """
    kept = {"layer": kept_layers(importance, teacher, student)}
    for axis in _ungrouped_first(teacher):
        scores = importance[axis]
        if inner := _inner(teacher, axis):
            channels = kept[inner].unsqueeze(-2).expand(*scores.shape[:-1], student.axis_size(inner))
            scores = scores.gather(-1, channels).norm(dim=-1)
        group = teacher.grouped.get(axis)
        kept[axis] = _top(scores, student.axis_size(axis), ranked) if group is None else _top_of_groups(
            scores, student.entries(axis), teacher.axis_size(group), kept.get(group), ranked
        )  # fmt: skip
    return kept


def mirrored_heads(importance: Importance, teacher: Arch, kept: Kept) -> Tensor:
    """For each query head kept, the dropped one that the residual merge pairs it with, or itself; shaped as they are.

    Of a group's L heads by falling importance, K of them kept, kept head i is paired with head 2K − i + 1: mirrored at
    the cut (Minitron, arXiv 2407.14679, section 2.3). That head exists for i from 2K − L + 1 on; the printed range
    begins one earlier.
    """
    scores, partners = importance["query"], kept["query"].clone()
    per_group = teacher.entries("query") if "query" in teacher.grouped else teacher.axis_size("query")
    for layer, heads in enumerate(kept["query"].tolist()):
        for group in {head // per_group for head in heads}:
            ranked = sorted(range(group * per_group, (group + 1) * per_group), key=lambda h: -float(scores[layer, h]))
            count = sum(head in ranked for head in heads)
            for i in range(max(0, 2 * count - per_group), count):
                partners[layer, heads.index(ranked[i])] = ranked[2 * count - 1 - i]
    return partners


def kept_share(importance: Importance, teacher: Arch, student: Arch, axis: str) -> float:
    """The share of an axis's squared scores that the student's number of best entries holds, averaged over layers.

    Of a grouped axis, of the entries within each group.
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


def kept_layers(importance: Importance, teacher: Arch, student: Arch) -> Tensor:
    """The teacher's numbers of the layers that a student of this depth keeps.

    Raises:
        UserError: nothing is known of blocks of so many layers.
    """
    scores = importance["layer"]
    if (blocks := importance.get(LAYER_BLOCKS)) is not None:
        depth, count = teacher.axis_size("layer"), teacher.axis_size("layer") - student.axis_size("layer")
        start = int(blocks[count].argmin())
        if not torch.isfinite(blocks[count, start]):
            raise UserError(f"the importance says nothing of leaving out {count} layers in a row")
        return torch.tensor([i for i in range(depth) if not start <= i < start + count])
    if not teacher.layer_counts:
        return _top(scores, student.axis_size("layer"))
    kept: list[Tensor] = []
    for kind, count in student.layer_counts.items():
        numbers = torch.tensor(teacher.layer_numbers(kind))
        kept.append(numbers[_top(scores[numbers], count)])
    return torch.cat(kept).sort().values


def _ungrouped_first(arch: Arch) -> list[str]:
    """The prunable axes but depth, each after those that its own choice of entries depends on."""
    axes = [axis for axis in arch.prunable_axes if axis != "layer"]
    return sorted(axes, key=lambda axis: axis in arch.grouped or _inner(arch, axis) is not None)


def _inner(arch: Arch, axis: str) -> str | None:
    """The axis on whose kept entries this one is scored."""
    return next((tap.axes[1] for tap in arch.family.taps if tap.axes[0] == axis and len(tap.axes) > 1), None)


def _top_of_groups(scores: Tensor, count: int, num_groups: int, kept_groups: Tensor | None, ranked: bool) -> Tensor:
    """The `count` best of each kept group (all, if none was chosen), numbered within the layer."""
    per_group = scores.shape[-1] // num_groups
    best = _top(scores.unflatten(-1, (num_groups, per_group)), count, ranked)  # (…, groups, count)
    numbers = best + per_group * torch.arange(num_groups)[:, None]
    if kept_groups is not None:
        chosen = kept_groups.unsqueeze(-1).expand(*kept_groups.shape, count)
        numbers = numbers.gather(-2, chosen)
    return numbers.flatten(-2)


def _top(scores: Tensor, count: int, ranked: bool = False) -> Tensor:
    best = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return best if ranked else best.sort(dim=-1).values
