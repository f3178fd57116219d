"""Every uniform shape within a budget, and a short list of different ones."""

import math
from typing import Any

import numpy as np

from minitron.errors import UserError
from minitron.model.anatomy import AXES
from minitron.model.arch import Arch
from minitron.search.budget import Budget

SMALLEST_SHARE = 0.25
"""No axis is cut below this share of the teacher's size."""
STEPS_PER_AXIS = 16
"""An axis is cut in steps of a power of two, at least this many to the whole axis if the grid stays small enough."""
STEPS_PER_COUNT = 64
"""The same of layers, heads and experts, which are few."""
LARGEST_GRID = 2**20
"""The step of the axis with the most options is doubled until the grid has no more shapes than this."""
MAMBA_HEADS_MULTIPLE = 8
"""Where the teacher's Mamba heads are a multiple of this, so are the student's: CUDA's convolution asks for it."""
SMALLEST_DIFFERENCE = 0.1
"""Two short-listed shapes differ by at least this share in the size of some axis."""


def grid(teacher: Arch) -> dict[str, list[int]]:
    """The sizes that each axis may take, by config name; grouped axes by their entries per group."""
    steps = {axis: _finest_step(teacher, axis) for axis in teacher.prunable_axes}
    options = {axis: _options(teacher, axis, step) for axis, step in steps.items()}
    while math.prod(map(len, options.values())) > LARGEST_GRID:
        longest = max(options, key=lambda axis: len(options[axis]))
        steps[longest] *= 2
        options[longest] = _options(teacher, longest, steps[longest])
    return {AXES[axis]: sizes for axis, sizes in options.items()}


def _finest_step(teacher: Arch, axis: str) -> int:
    size = teacher.entries(axis)
    if axis == "mhead" and teacher.axis_size(axis) % MAMBA_HEADS_MULTIPLE == 0:
        return MAMBA_HEADS_MULTIPLE // math.gcd(MAMBA_HEADS_MULTIPLE, teacher.axis_size(teacher.grouped[axis]))
    counted = {"layer", "expert", *teacher.grouped, *teacher.grouped.values()}
    return 1 << max(0, math.floor(math.log2(size / (STEPS_PER_COUNT if axis in counted else STEPS_PER_AXIS))))


def _options(teacher: Arch, axis: str, step: int) -> list[int]:
    size = teacher.entries(axis)
    smallest = math.ceil(max(_floor(teacher, axis), size * SMALLEST_SHARE) / step)
    return sorted({size, *(step * i for i in range(smallest, size // step + 1))})


def _floor(arch: Arch, axis: str) -> int:
    if axis == "layer":
        return max(1, len(arch.layer_counts))
    floor = arch.family.floors.get(axis)
    return arch.axis_size(floor) if floor else 1


def feasible(teacher: Arch, budget: Budget) -> list[Arch]:
    """All shapes of the grid whose exact parameter count is within the budget.

    Raises:
        UserError: none is; the message names the nearest counts that are.
    """
    axes = grid(teacher)
    names = list(axes)
    mesh = dict(zip(names, np.meshgrid(*map(np.array, axes.values()), indexing="ij", sparse=True), strict=True))
    for axis, group in teacher.grouped.items():
        if axis in teacher.prunable_axes:
            mesh[AXES[axis]] = mesh[AXES[axis]] * mesh.get(AXES[group], teacher.axis_size(group))
    mesh.update(_depth_by_kind(teacher, mesh[AXES["layer"]]))
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
    values = {name: np.broadcast_to(sizes, counts.shape)[tuple(chosen.T)].tolist() for name, sizes in mesh.items()}
    return [teacher.resized(**dict(zip(values, sizes, strict=True))) for sizes in zip(*values.values(), strict=True)]


def _depth_by_kind(teacher: Arch, depth: Any) -> dict[str, Any]:
    """For an array of depths, arrays of the number of layers of each kind, by size name."""
    if not teacher.layer_counts:
        return {}
    depths, positions = np.unique(depth, return_inverse=True)
    splits = [teacher.split_depth(int(one)) for one in depths]
    return {name: np.array([split[name] for split in splits])[positions].reshape(depth.shape) for name in splits[0]}


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
