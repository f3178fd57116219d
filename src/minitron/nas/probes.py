"""What a cut of each axis costs after a little training, measured once an axis; from that, what any shape will cost.

Losses of untrained shapes do not rank shapes as training does: what is mended before training, or hurts most at first,
is not what is missed in the end (docs/studies/search.md). So one shape an axis, the teacher with that axis alone cut
about half way down, is distilled for a while.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from minitron.model.anatomy import AXES
from minitron.model.arch import Arch
from minitron.nas.shapes import Shapes
from minitron.pruning.importance import Importance, kept_share


def predicted(shapes: Shapes, importance: Importance, probed: Mapping[str, tuple[Arch, float]]) -> NDArray[np.float64]:
    """For each shape the KL that is expected of it after as much training as the probes had, (n,).

    Scores of different axes do not compare, but shares within an axis do: a shape's KL is the sum over its axes of that
    of the axis's probe, in proportion to the share of squared importance that is lost there.
    """
    teacher, total = shapes.teacher, np.zeros(len(shapes))
    for axis, (probe, kl) in probed.items():
        rise = kl / max(1 - kept_share(importance, teacher, probe, axis), 1e-9)
        _, firsts, positions = np.unique(_entries(shapes, axis), return_index=True, return_inverse=True)
        lost = np.array([1 - kept_share(importance, teacher, shapes[int(i)], axis) for i in firsts])
        total += rise * lost[positions]
    return total


def probes(shapes: Shapes) -> dict[str, Arch]:
    """For each axis that the shapes differ from the teacher in, the teacher with that axis alone about half way down.

    Where a config class or the family lets no shape differ in that axis alone, what has to go with it goes too.
    """
    teacher, found = shapes.teacher, {}
    for axis in teacher.prunable_axes:
        name = AXES[axis]
        if name not in shapes.sizes:
            continue
        group = teacher.grouped.get(axis)
        options = np.unique(shapes.sizes[name] // shapes.sizes[AXES[group]] if group and AXES[group] in shapes.sizes
                            else shapes.sizes[name] // (teacher.axis_size(group) if group else 1))  # fmt: skip
        options = options[options < teacher.entries(axis)]
        for option in _from_the_middle(options.tolist()):
            sizes = _with_what_belongs(teacher, axis, int(option))
            if teacher.expressible(sizes):
                found[axis] = teacher.resized(**sizes)
                break
    return found


def _from_the_middle(options: Sequence[int]) -> list[int]:
    return sorted(options, key=lambda size: abs(size - options[(len(options) - 1) // 2]))


def _with_what_belongs(teacher: Arch, axis: str, option: int) -> dict[str, int]:
    group, product = teacher.grouped.get(axis), teacher.family.product
    sizes = {AXES[axis]: option * (teacher.axis_size(group) if group else 1)}
    if product and not product.ratio and axis == product.of:
        sizes[AXES[product.axes[0]]] = option // teacher.axis_size(product.axes[1])
    for inner, outer in teacher.grouped.items():
        if outer == axis:
            sizes[AXES[inner]] = option * teacher.entries(inner)
    return sizes


def _entries(shapes: Shapes, axis: str) -> NDArray[np.int64]:
    """How many entries the shapes have along an axis, (n,); of a grouped one, within each group."""
    sizes, group = shapes.sizes[AXES[axis]], shapes.teacher.grouped.get(axis)
    if group is None:
        return sizes
    return sizes // shapes.sizes.get(AXES[group], np.array(shapes.teacher.axis_size(group)))
