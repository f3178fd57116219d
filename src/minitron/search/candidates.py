"""Every uniform shape within a budget, and a short list of different ones."""

import math

import numpy as np

from minitron.errors import UserError
from minitron.model.anatomy import AXES
from minitron.model.arch import Arch
from minitron.search.budget import Budget

SMALLEST_SHARE = 0.25
"""No axis is cut below this share of the teacher's size."""
STEPS_PER_AXIS = 16
"""A width axis is cut in steps of a power of two, at least this many to the whole axis."""
SMALLEST_DIFFERENCE = 0.1
"""Two short-listed shapes differ by at least this share in the size of some axis."""


def grid(teacher: Arch) -> dict[str, list[int]]:
    """The sizes that each axis may take, by config name; grouped axes by their entries per group."""
    sizes = {}
    for axis in teacher.family.prunable_axes:
        size, step = teacher.axis_size(axis), 1
        if group := teacher.family.grouped.get(axis):
            size //= teacher.axis_size(group)
        elif axis not in {"layer", *teacher.family.grouped.values()}:
            step = 2 ** max(0, math.floor(math.log2(size / STEPS_PER_AXIS)))
        smallest = math.ceil(size * SMALLEST_SHARE / step)
        sizes[AXES[axis]] = sorted({size, *(step * i for i in range(smallest, size // step + 1))})
    return sizes


def feasible(teacher: Arch, budget: Budget) -> list[Arch]:
    """All shapes of the grid whose exact parameter count is within the budget.

    Raises:
        UserError: none is; the message names the nearest counts that are.
    """
    axes = grid(teacher)
    names = list(axes)
    mesh = dict(zip(names, np.meshgrid(*map(np.array, axes.values()), indexing="ij"), strict=True))
    for axis, group in teacher.family.grouped.items():
        if axis not in teacher.family.prunable_axes:
            continue
        mesh[AXES[axis]] = mesh[AXES[axis]] * mesh[AXES[group]]
    counts = np.where(teacher.expressible(mesh), teacher.count_grid(mesh), teacher.num_parameters)
    smallest = int(counts.min())
    if budget.high < smallest:
        raise UserError(
            f"target of {budget.high:,} parameters is below what the axes can reach: "
            f"the smallest shape has {smallest:,} ({smallest / teacher.num_parameters:.3f} of the teacher)"
        )
    chosen = np.argwhere((counts >= budget.low) & (counts <= budget.high))
    if not len(chosen):
        near = np.unique(counts[counts < teacher.num_parameters])
        near = np.sort(near[np.argsort(np.abs(near - budget.high))[:6]])
        raise UserError(
            f"no shape has between {budget.low:,} and {budget.high:,} parameters; "
            f"feasible sizes near it: {', '.join(f'{count:,}' for count in near)}"
        )
    return [
        teacher.resized(**{name: int(values[tuple(position)]) for name, values in mesh.items()}) for position in chosen
    ]


def shortlist(candidates: list[Arch], best_first: list[int], count: int) -> list[int]:
    """The first `count` of the order, leaving out shapes that are nearly one taken already."""
    chosen: list[int] = []
    for i in best_first:
        if all(_difference(candidates[i], candidates[j]) >= SMALLEST_DIFFERENCE for j in chosen):
            chosen.append(i)
        if len(chosen) == count:
            break
    return chosen


def _difference(one: Arch, other: Arch) -> float:
    return max(abs(math.log(one.sizes[name] / other.sizes[name])) for name in one.sizes)
