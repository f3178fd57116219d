"""Importance measured again on what is left, in rounds between teacher and target."""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from minitron.data.blocks import Blocks
from minitron.errors import UserError
from minitron.model.anatomy import AXES
from minitron.model.arch import EXPERT_MULTIPLE, Arch
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.pruning.calibrate import calibrate
from minitron.pruning.cut import cut_to, write_pruned
from minitron.pruning.importance import Importance, Kept, score
from minitron.recipe import PLAIN, CalibrationRecipe


def score_in_rounds(
    teacher: Checkpoint,
    target: Arch,
    importance: Importance,
    rounds: int,
    blocks: Blocks,
    recipe: CalibrationRecipe,
    device: torch.device,
    dtype: torch.dtype,
    folder: Path | None = None,
) -> Importance:
    """The importance with which the teacher is cut to the target in `rounds` equal steps, scored anew before each.

    `importance` is the teacher's own, which the first step goes by (Minitron, arXiv 2407.14679, section 2.2, where it
    made no difference after training). What goes in a step before the last is given no importance; of the rest, that
    of the last model. The models between are cut plainly, into a temporary folder in `folder`.

    Raises:
        UserError: a shape in between cannot be made.
    """
    for step in range(1, rounds):
        between = _between(teacher.arch, target, step / rounds)
        cut = cut_to(between, teacher, importance, PLAIN)
        with TemporaryDirectory(dir=folder) as place:
            write_pruned(teacher, cut, iter, Path(place))
            smaller = open_checkpoint(Path(place))
            found = score(calibrate(smaller, blocks, recipe, device, dtype), smaller.arch, recipe)
        importance = importance | {
            axis: _spread(found[axis], axis, teacher.arch, importance[axis], cut.kept) for axis in found
        }
    return importance


def _between(teacher: Arch, target: Arch, share: float) -> Arch:
    """A shape `share` of the way, eights of what comes in eights, whole groups of what comes in groups.

    Axes that are bound to each other (`Family.product`) move in the last step only.

    Raises:
        UserError: it is none that the family can have.
    """
    sizes: dict[str, int] = {}
    product = teacher.family.product
    bound = {*product.axes, product.of} if product else set()
    # Entries of grouped axes are those within a group, so the groups come first.
    free = [axis for axis in AXES if AXES[axis] in target.sizes and axis not in bound]
    for axis in sorted(free, key=lambda axis: axis in teacher.grouped):
        before, after, name = teacher.entries(axis), target.entries(axis), AXES[axis]
        if before != after:
            unit = EXPERT_MULTIPLE if before % EXPERT_MULTIPLE == after % EXPERT_MULTIPLE == 0 else 1
            wanted = before - share * (before - after)
            sizes[name] = min(before, -(-round(wanted) // unit) * unit)
        if axis in teacher.grouped:
            group = AXES[teacher.grouped[axis]]
            sizes[name] = sizes.get(name, before) * sizes.get(group, teacher.sizes[group])
    try:
        return teacher.resized(**sizes)
    except UserError as error:
        raise UserError(f"prune.rounds: no shape {share:.2f} of the way: {error}") from error


def _spread(found: Tensor, axis: str, teacher: Arch, before: Tensor, kept: Kept) -> Tensor:
    """Scores of what is kept, put where the teacher has it; zero elsewhere."""
    scores = torch.zeros_like(before)
    if axis not in teacher.family.per_layer_axes:
        scores[kept[axis]] = found
        return scores
    for new, old in enumerate(kept["layer"].tolist()):
        if axis in teacher.family.per_expert_axes:
            for expert, number in enumerate(kept["expert"][old].tolist()):
                scores[old, number, kept[axis][old][number]] = found[new, expert]
        elif found.ndim > 2:  # Mamba heads, with a score for each of their channels
            scores[old, kept[axis][old][:, None], kept["mchan"][old]] = found[new]
        else:
            scores[old, kept[axis][old]] = found[new]
    return scores
