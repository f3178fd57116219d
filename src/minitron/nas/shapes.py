"""Lists every uniform shape within a budget: one size per axis, equal in all layers."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitron.errors import UserError, nearest
from minitron.model.anatomy import AXES, AXIS_TABLE
from minitron.model.arch import Arch
from minitron.nas.budget import COUNTS, Budget, Figures, counted
from minitron.recipe import Factors, SearchRecipe, Span

SMALLEST_SHARE = 0.25
"""The smallest size of an axis, as a share of the teacher's."""
STEPS_PER_AXIS = 16
"""The fewest steps per axis, each a power of two, as long as the grid stays below `LARGEST_GRID`."""
STEPS_PER_COUNT = 64
"""The fewest steps for layers, heads and experts, which are few; see `STEPS_PER_AXIS`."""
WIDTH_MULTIPLE = 64
"""The smallest step of widths where the teacher's width is a multiple of it, as matrix units require."""
WIDTHS = {axis.name for axis in AXIS_TABLE if axis.is_width}
LARGEST_GRID = 2**20
"""The most shapes of a grid; the step of the axis with the most options is doubled until the grid is this small."""
MAMBA_HEADS_MULTIPLE = 8
"""The factor of the number of Mamba heads, where the teacher's number has it: CUDA's convolution requires it."""
NUM_NEAREST = 3
"""The number of shapes that a message names when no shape fits the budget."""

Array = NDArray[np.int64]


@dataclass(frozen=True)
class Shapes:
    """Many shapes of one teacher: arrays (n,) of their sizes and of their figures."""

    teacher: Arch
    sizes: Mapping[str, Array]
    figures: Figures

    @classmethod
    def of(cls, teacher: Arch, archs: Sequence[Arch], figures: Figures) -> "Shapes":
        """Return a list of shapes as arrays."""
        sizes = {name: np.array([arch.sizes[name] for arch in archs]) for name in teacher.sizes}
        return cls(teacher, sizes, figures)

    def __len__(self) -> int:
        return len(next(iter(self.sizes.values())))

    def __getitem__(self, i: int) -> Arch:
        return self.teacher.resized(**{name: int(sizes[i]) for name, sizes in self.sizes.items()})

    def at(self, which: Any) -> "Shapes":
        """Return the shapes at some positions, or where a boolean mask is true."""
        return Shapes(
            self.teacher,
            {name: sizes[which] for name, sizes in self.sizes.items()},
            {name: values[which] for name, values in self.figures.items()},
        )

    def figures_of(self, i: int) -> dict[str, Any]:
        """Return the figures of shape `i` as plain numbers."""
        return {name: values[i].item() for name, values in self.figures.items()}


def removed_layers(shapes: Shapes) -> set[int]:
    """Return the numbers of removed layers that occur among the shapes."""
    depth = shapes.teacher.axis_size("layer")
    return {depth - int(layers) for layers in set(shapes.sizes["num_hidden_layers"].tolist())}


def grid(teacher: Arch, recipe: SearchRecipe) -> dict[str, Sequence[int] | Factors]:
    """Return the sizes that each axis may take, by config name.

    For grouped axes, sizes that the recipe gives are those of the whole axis; derived sizes count entries per group.
    Numbers of layers of a kind are listed where the recipe gives them; where it gives those of all kinds, their sum is
    the depth, which is listed only where the recipe gives it as well.

    Raises:
        UserError: the recipe names an axis that cannot be pruned, or no size up to the teacher's.
    """
    names = {AXES[axis]: axis for axis in teacher.prunable_axes}
    if (vocab := AXES["vocab"]) in recipe.space:
        names[vocab] = "vocab"
    depth, *of_kinds = teacher.depth_names
    for name in (*recipe.space, *recipe.multiple_of, *recipe.fixed):
        if name not in names and not (name in recipe.space and name in of_kinds):
            accepted = [*names, *(of_kinds if name in recipe.space else [])]
            raise UserError(f"search: no axis '{name}' to prune: {nearest(name, accepted)}")
    steps: dict[str, int] = {}
    options: dict[str, Sequence[int] | Factors] = {
        name: _from_recipe(teacher, name, recipe.space[name]) for name in of_kinds if name in recipe.space
    }
    if of_kinds and depth not in recipe.space and options.keys() == set(of_kinds):
        del names[depth]  # the sum of the kinds
    for name, axis in names.items():
        if name in recipe.space:
            options[name] = _from_recipe(teacher, name, recipe.space[name])
        elif name in recipe.fixed:
            options[name] = [teacher.entries(axis)]
        else:
            steps[name] = recipe.multiple_of.get(name) or _finest_step(teacher, axis)
            options[name] = _derived(teacher, axis, steps[name], name in recipe.multiple_of)
    while math.prod(map(_num_options, options.values())) > LARGEST_GRID:
        if not (free := [name for name in steps if name not in recipe.multiple_of]):
            raise UserError(f"search: more than {LARGEST_GRID:,} shapes: give fewer sizes or larger steps")
        longest = max(free, key=lambda name: _num_options(options[name]))
        steps[longest] *= 2
        options[longest] = _derived(teacher, names[longest], steps[longest], False)
    return options


def _num_options(options: Sequence[int] | Factors) -> int:
    return len(options.times if isinstance(options, Factors) else options)


def _from_recipe(teacher: Arch, name: str, space: tuple[int, ...] | Span | Factors) -> Sequence[int] | Factors:
    if isinstance(space, Factors):
        if space.of not in teacher.sizes:
            raise UserError(f"search.space.{name}.of: {nearest(space.of, list(teacher.sizes))}")
        return space
    sizes = range(space.first, space.last + 1, space.step) if isinstance(space, Span) else sorted(set(space))
    if not (options := [size for size in sizes if size <= teacher.sizes[name]]):
        raise UserError(f"search.space.{name} has no size up to the teacher's {teacher.sizes[name]}")
    return options


def _finest_step(teacher: Arch, axis: str) -> int:
    size = teacher.entries(axis)
    if axis == "mhead" and teacher.axis_size(axis) % MAMBA_HEADS_MULTIPLE == 0:
        return MAMBA_HEADS_MULTIPLE // math.gcd(MAMBA_HEADS_MULTIPLE, teacher.axis_size(teacher.grouped[axis]))
    few = {axis.name for axis in AXIS_TABLE if axis.is_count} | {*teacher.grouped, *teacher.grouped.values()}
    step = 1 << max(0, math.floor(math.log2(size / (STEPS_PER_COUNT if axis in few else STEPS_PER_AXIS))))
    is_wide = axis in WIDTHS and size % WIDTH_MULTIPLE == 0 and size >= 4 * WIDTH_MULTIPLE
    return max(step, WIDTH_MULTIPLE) if is_wide else step


def _derived(teacher: Arch, axis: str, step: int, is_from_recipe: bool) -> list[int]:
    size, per_group = teacher.entries(axis), teacher.grouped.get(axis)
    if per_group and is_from_recipe:  # the recipe gives the step of the whole axis, `step` is that of one group
        step = max(1, step // math.gcd(step, teacher.axis_size(per_group)))
    smallest = math.ceil(max(_floor(teacher, axis), size * SMALLEST_SHARE) / step)
    return sorted({size, *(step * i for i in range(smallest, size // step + 1))})


def _floor(arch: Arch, axis: str) -> int:
    if axis == "layer":
        return max(1, len(arch.layer_counts))
    floor = arch.family.floors.get(axis)
    return arch.axis_size(floor) if floor else 1


SplitDepth = Callable[[int, Mapping[str, int]], dict[str, int]]
"""Splits a depth among the kinds of layers, given the numbers of some kinds; raises `UserError` where it cannot."""


def every_shape(
    teacher: Arch, budget: Budget, recipe: SearchRecipe, windows: list[int], *, split: SplitDepth | None = None
) -> Shapes:
    """Return all shapes of the grid that are smaller than the teacher, with the figures of `COUNTS`.

    `split` splits the depth among the kinds of layers, by default in proportion (`Arch.split_depth`).
    """
    axes = grid(teacher, recipe)
    indices = np.meshgrid(*(np.arange(_num_options(options)) for options in axes.values()), indexing="ij", sparse=True)
    positions = dict(zip(axes, indices, strict=True))
    mesh: dict[str, Any] = {
        name: np.array(options)[positions[name]] for name, options in axes.items() if not isinstance(options, Factors)
    }
    is_whole: Any = True
    for name, options in axes.items():
        if isinstance(options, Factors):
            product = np.array(options.times)[positions[name]] * mesh.get(options.of, teacher.sizes[options.of])
            mesh[name] = np.round(product).astype(np.int64)
            is_whole = is_whole & (np.abs(product - mesh[name]) < 1e-6)
    for axis, group in teacher.grouped.items():
        if axis in teacher.prunable_axes:
            groups = mesh.get(AXES[group], teacher.axis_size(group))
            if AXES[axis] not in recipe.space:
                mesh[AXES[axis]] = mesh[AXES[axis]] * groups
            is_whole = is_whole & (mesh[AXES[axis]] % groups == 0)
            is_whole = is_whole & (mesh[AXES[axis]] // groups <= teacher.entries(axis))
    if teacher.layer_counts:
        depths, can_be_split = _depth_by_kind(teacher, mesh, split or teacher.split_depth)
        mesh.update(depths)
        is_whole = is_whole & can_be_split
    for name, sizes in mesh.items():
        is_whole = is_whole & (sizes <= teacher.sizes[name])
    for axis, floor in teacher.family.floors.items():
        if AXES[axis] in mesh:
            is_whole = is_whole & (mesh[AXES[axis]] >= teacher.axis_size(floor))
    counts = teacher.count_grid(mesh)
    is_possible = np.broadcast_to(teacher.expressible(mesh) & is_whole, counts.shape)
    chosen = np.nonzero(is_possible & (counts < teacher.num_parameters))
    sizes = {name: np.broadcast_to(values, counts.shape)[chosen] for name, values in mesh.items()}
    num = len(chosen[0])
    figures = counted(teacher, sizes, budget.serving, windows)
    return Shapes(teacher, sizes, {name: np.broadcast_to(values, (num,)) for name, values in figures.items()})


def feasible(shapes: Shapes, budget: Budget) -> Shapes:
    """Return the shapes that fit the budget.

    Raises:
        UserError: no shape fits; the message names the nearest shapes.
    """
    if not len(shapes):
        raise UserError("search: no shape of the grid is smaller than the teacher")
    if budget.larger is not None:
        shapes = shapes.at(_is_inside(shapes, budget.larger))
        if not len(shapes):
            raise UserError("search: no shape of the grid has no more of anything than the next larger student")
    fits = np.broadcast_to(budget.fits(shapes.figures), (len(shapes),))
    if fits.any():
        return shapes.at(fits)
    order = np.argsort(budget.excess(shapes.figures), kind="stable")
    chosen: list[int] = []
    for i in order:
        if all(any(shapes.figures[name][i] != shapes.figures[name][j] for name in budget.limits) for j in chosen):
            chosen.append(int(i))
        if len(chosen) == NUM_NEAREST:
            break
    wanted = ", ".join(_limit_in_words(name, limit.low, limit.high) for name, limit in budget.limits.items())
    near = "; ".join(_in_words(shapes, i, budget) for i in chosen)
    raise UserError(f"no shape has {wanted}; the feasible ones nearest to that: {near}")


def _is_inside(shapes: Shapes, larger: Arch) -> Any:
    """Return which shapes have no more of anything than a larger one, in every group of a grouped axis as well."""
    is_inside: Any = np.ones(len(shapes), dtype=bool)
    for name, sizes in shapes.sizes.items():
        is_inside = is_inside & (sizes <= larger.sizes[name])
    for axis, group in shapes.teacher.grouped.items():
        size, groups = (shapes.sizes.get(AXES[each], shapes.teacher.axis_size(each)) for each in (axis, group))
        is_inside = is_inside & (size <= larger.entries(axis) * groups)
    return is_inside


def _limit_in_words(name: str, low: float, high: float) -> str:
    if name in COUNTS:
        return f"between {low:,.0f} and {high:,.0f} {COUNTS[name]}" if low else f"at most {high:,.0f} {COUNTS[name]}"
    return f"at most {high:.4g} {name.replace('_', ' ')}"


def _in_words(shapes: Shapes, i: int, budget: Budget) -> str:
    teacher = shapes.teacher
    changed = [f"{name} {sizes[i]}" for name, sizes in shapes.sizes.items() if sizes[i] != teacher.sizes[name]]
    figures = [
        f"{shapes.figures[name][i]:,} {COUNTS[name]}"
        if name in COUNTS
        else f"{shapes.figures[name][i]:,.6g} {name.replace('_', ' ')}"
        for name in budget.limits
    ]
    return f"{', '.join(figures)} ({' '.join(changed)})"


def _depth_by_kind(teacher: Arch, mesh: Mapping[str, Any], split: SplitDepth) -> tuple[dict[str, Any], Any]:
    """Return arrays of the sizes that state the depth, by config name, and whether such a depth can be split.

    `mesh` holds the depth and the numbers of layers of some kinds, or those of all kinds.
    """
    depth, *of_kinds = teacher.depth_names
    given = [name for name in of_kinds if name in mesh]
    total = mesh[depth] if depth in mesh else sum(mesh[name] for name in given)
    columns = np.broadcast_arrays(total, *(mesh[name] for name in given))
    rows, positions = np.unique(np.stack([column.ravel() for column in columns]), axis=1, return_inverse=True)
    sizes, can_be_split = np.zeros((len(of_kinds), rows.shape[1]), dtype=np.int64), np.zeros(rows.shape[1], dtype=bool)
    for i, (layers, *counts) in enumerate(rows.T.tolist()):
        try:
            counts_by_kind = split(layers, dict(zip(given, counts, strict=True)))
        except UserError:
            continue
        sizes[:, i], can_be_split[i] = [counts_by_kind[name] for name in of_kinds], True
    shape, places = columns[0].shape, positions.reshape(-1)
    by_name = {name: values[places].reshape(shape) for name, values in zip(of_kinds, sizes, strict=True)}
    return by_name | {depth: total}, can_be_split[places].reshape(shape)
