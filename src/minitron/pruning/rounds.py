"""Measures importance again while a model shrinks, in rounds between teacher and target."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from minitron.data.blocks import Blocks
from minitron.errors import UserError
from minitron.model.anatomy import AXES
from minitron.model.arch import EXPERT_MULTIPLE, Arch
from minitron.model.checkpoint import open_checkpoint
from minitron.pruning.calibrate import calibrate
from minitron.pruning.cut import cut_to, write_pruned
from minitron.pruning.scores import Importance, score
from minitron.pruning.selection import Kept
from minitron.recipe import CUT_ONLY
from minitron.session import Session


def score_in_rounds(
    session: Session, target: Arch, importance: Importance, *, rounds: int, blocks: Blocks, folder: Path
) -> Importance:
    """Return the importance with which the session's model is cut to the target in some equal rounds.

    `importance` is that of the whole model and decides the first step; it is measured again before every further step
    (Minitron, arXiv 2407.14679, section 2.2, where this made no difference after training). Entries that are removed
    before the last step get importance zero, all others that of the last model. The models in between are cut without
    repairs, into a temporary folder in `folder`. With one round, `importance` is returned as it is.

    Raises:
        UserError: a shape in between cannot be made.
    """
    source, recipe = session.source, session.recipe.calibration
    for shape in shapes_between(source.arch, target, rounds):
        cut = cut_to(shape, source, importance, CUT_ONLY)
        with TemporaryDirectory(dir=folder) as place:
            write_pruned(source, cut, cut, Path(place))
            smaller = open_checkpoint(Path(place))
            scores = score(calibrate(smaller, blocks, recipe=recipe, runtime=session.runtime), smaller, recipe)
        importance = importance | {
            axis: _in_teacher(value, axis, source.arch, importance[axis], cut.kept) for axis, value in scores.items()
        }
    return importance


def shapes_between(teacher: Arch, target: Arch, rounds: int) -> list[Arch]:
    """Return the shapes on the way from teacher to target that are cut and scored again in `rounds` equal steps.

    Raises:
        UserError: the family cannot have one of them.
    """
    return [_between(teacher, target, step / rounds) for step in range(1, rounds)]


def _between(teacher: Arch, target: Arch, share: float) -> Arch:
    """Return the shape `share` of the way from teacher to target.

    Sizes that are multiples of 8 stay so, and grouped axes keep whole groups. Axes that are bound to each other
    (`Family.product`) move in the last step only.

    Raises:
        UserError: the family cannot have that shape.
    """
    sizes: dict[str, int] = {}
    product = teacher.family.product
    bound = {*product.axes, product.of} if product else set()
    # Entries of grouped axes are counted within a group, so the groups come first.
    free = [axis for axis in AXES if AXES[axis] in target.sizes and axis not in bound]
    for axis in sorted(free, key=lambda axis: axis in teacher.grouped):
        before, after, name = teacher.entries(axis), target.entries(axis), AXES[axis]
        if before != after:
            unit = EXPERT_MULTIPLE if before % EXPERT_MULTIPLE == after % EXPERT_MULTIPLE == 0 else 1
            wanted = before - share * (before - after)
            sizes[name] = min(before, -(-round(wanted) // unit) * unit)
        if axis == "layer":  # every kind of layers by itself, so that none is fewer than in the target
            for kind, before_kind in teacher.layer_counts.items():
                after_kind = target.layer_counts[kind]
                sizes[f"num_{kind}_layers"] = round(before_kind - share * (before_kind - after_kind))
            if teacher.layer_counts:
                sizes[name] = sum(sizes[each] for each in teacher.depth_names[1:])
        if axis in teacher.grouped:
            group = AXES[teacher.grouped[axis]]
            sizes[name] = sizes.get(name, before) * sizes.get(group, teacher.sizes[group])
    try:
        return teacher.resized(**sizes)
    except UserError as error:
        raise UserError(f"prune.rounds: the shape {share:.2f} of the way cannot be made: {error}") from error


def _in_teacher(scores: Tensor, axis: str, teacher: Arch, before: Tensor, kept: Kept) -> Tensor:
    """Return the scores of a smaller model's axis at the teacher's entries, shaped as `before`; zero if removed."""
    spread = torch.zeros_like(before)
    if axis not in teacher.family.per_layer_axes:
        spread[kept[axis]] = scores
        return spread
    for new, old in enumerate(kept["layer"].tolist()):
        if axis in teacher.family.per_expert_axes:
            for expert, number in enumerate(kept["expert"][old].tolist()):
                spread[old, number, kept[axis][old][number]] = scores[new, expert]
        elif scores.ndim > 2:  # Mamba heads, with a score for each of their channels
            spread[old, kept[axis][old][:, None], kept["mchan"][old]] = scores[new]
        else:
            spread[old, kept[axis][old]] = scores[new]
    return spread
