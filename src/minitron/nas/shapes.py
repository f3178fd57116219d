"""Every uniform shape within a budget, and a short list of different ones."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitron.errors import UserError, nearest
from minitron.model.anatomy import AXES
from minitron.model.arch import Arch
from minitron.nas.budget import COUNTS, Budget, Figures, counted
from minitron.recipe import Factors, SearchRecipe, Span

SMALLEST_SHARE = 0.25
"""No axis is cut below this share of the teacher's size."""
STEPS_PER_AXIS = 16
"""An axis is cut in steps of a power of two, at least this many to the whole axis if the grid stays small enough."""
STEPS_PER_COUNT = 64
"""The same of layers, heads and experts, which are few."""
WIDTH_MULTIPLE = 64
"""Widths are cut in steps of at least this, which matrix units ask for, where the teacher's is a multiple of it."""
WIDTHS = {"hidden", "ffn", "expert_ffn", "shared_ffn", "latent"}
LARGEST_GRID = 2**20
"""The step of the axis with the most options is doubled until the grid has no more shapes than this."""
MAMBA_HEADS_MULTIPLE = 8
"""Where the teacher's Mamba heads are a multiple of this, so are the student's: CUDA's convolution asks for it."""
SMALLEST_DIFFERENCE = 0.1
"""Two short-listed shapes differ by at least this share in the size of some axis."""
NUM_NEAREST = 3

Array = NDArray[np.int64]


@dataclass(frozen=True)
class Shapes:
    """Many shapes of one teacher, as arrays of their sizes, with what each costs."""

    teacher: Arch
    sizes: Mapping[str, Array]  # (n,) each
    figures: Figures

    def __len__(self) -> int:
        return len(next(iter(self.sizes.values())))

    def __getitem__(self, i: int) -> Arch:
        return self.teacher.resized(**{name: int(sizes[i]) for name, sizes in self.sizes.items()})

    def at(self, which: Any) -> "Shapes":
        """Those at some positions, or where a mask is true."""
        return Shapes(
            self.teacher,
            {name: sizes[which] for name, sizes in self.sizes.items()},
            {name: values[which] for name, values in self.figures.items()},
        )

    def figures_of(self, i: int) -> dict[str, Any]:
        """What one costs, for JSON."""
        return {name: values[i].item() for name, values in self.figures.items()}


def grid(teacher: Arch, recipe: SearchRecipe) -> dict[str, Sequence[int] | Factors]:
    """The sizes that each axis may take, by config name; of grouped axes whole sizes where given, else entries a group.

    Raises:
        UserError: the recipe names an axis that cannot be pruned, or sizes that are not within the teacher's.
    """
    names = {AXES[axis]: axis for axis in teacher.prunable_axes}
    for name in (*recipe.space, *recipe.multiple_of):
        if name not in names:
            raise UserError(f"search: no axis '{name}' to prune: {nearest(name, list(names))}")
    steps: dict[str, int] = {}
    options: dict[str, Sequence[int] | Factors] = {}
    for name, axis in names.items():
        if name in recipe.space:
            options[name] = _given(teacher, name, recipe.space[name])
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


def _given(teacher: Arch, name: str, space: tuple[int, ...] | Span | Factors) -> Sequence[int] | Factors:
    if isinstance(space, Factors):
        if space.of not in teacher.sizes:
            raise UserError(f"search.space.{name}.of: {nearest(space.of, list(teacher.sizes))}")
        return space
    sizes = range(space.first, space.last + 1, space.step) if isinstance(space, Span) else sorted(set(space))
    if not (found := [size for size in sizes if size <= teacher.sizes[name]]):
        raise UserError(f"search.space.{name} has no size up to the teacher's {teacher.sizes[name]}")
    return found


def _finest_step(teacher: Arch, axis: str) -> int:
    size = teacher.entries(axis)
    if axis == "mhead" and teacher.axis_size(axis) % MAMBA_HEADS_MULTIPLE == 0:
        return MAMBA_HEADS_MULTIPLE // math.gcd(MAMBA_HEADS_MULTIPLE, teacher.axis_size(teacher.grouped[axis]))
    counted_ones = {"layer", "expert", *teacher.grouped, *teacher.grouped.values()}
    step = 1 << max(0, math.floor(math.log2(size / (STEPS_PER_COUNT if axis in counted_ones else STEPS_PER_AXIS))))
    is_wide = axis in WIDTHS and size % WIDTH_MULTIPLE == 0 and size >= 4 * WIDTH_MULTIPLE
    return max(step, WIDTH_MULTIPLE) if is_wide else step


def _derived(teacher: Arch, axis: str, step: int, is_asked: bool) -> list[int]:
    size, per_group = teacher.entries(axis), teacher.grouped.get(axis)
    if per_group and is_asked:  # a step of the whole axis; in each group a part of that
        step = max(1, step // math.gcd(step, teacher.axis_size(per_group)))
    smallest = math.ceil(max(_floor(teacher, axis), size * SMALLEST_SHARE) / step)
    return sorted({size, *(step * i for i in range(smallest, size // step + 1))})


def _floor(arch: Arch, axis: str) -> int:
    if axis == "layer":
        return max(1, len(arch.layer_counts))
    floor = arch.family.floors.get(axis)
    return arch.axis_size(floor) if floor else 1


def every_shape(teacher: Arch, budget: Budget, recipe: SearchRecipe, windows: list[int]) -> Shapes:
    """All shapes of the grid that are smaller than the teacher, with what can be computed of them."""
    axes = grid(teacher, recipe)
    indices = np.meshgrid(*(np.arange(_num_options(options)) for options in axes.values()), indexing="ij", sparse=True)
    places = dict(zip(axes, indices, strict=True))
    mesh: dict[str, Any] = {
        name: np.array(options)[places[name]] for name, options in axes.items() if not isinstance(options, Factors)
    }
    is_whole: Any = True
    for name, options in axes.items():
        if isinstance(options, Factors):
            product = np.array(options.times)[places[name]] * mesh.get(options.of, teacher.sizes[options.of])
            mesh[name] = np.round(product).astype(np.int64)
            is_whole = is_whole & (np.abs(product - mesh[name]) < 1e-6)
    for axis, group in teacher.grouped.items():
        if axis in teacher.prunable_axes:
            groups = mesh.get(AXES[group], teacher.axis_size(group))
            if AXES[axis] not in recipe.space:
                mesh[AXES[axis]] = mesh[AXES[axis]] * groups
            is_whole = is_whole & (mesh[AXES[axis]] % groups == 0)
            is_whole = is_whole & (mesh[AXES[axis]] // groups <= teacher.entries(axis))
    mesh.update(_depth_by_kind(teacher, mesh[AXES["layer"]]))
    for name, sizes in mesh.items():
        is_whole = is_whole & (sizes <= teacher.sizes[name])
    for axis, floor in teacher.family.floors.items():
        if AXES[axis] in mesh:
            is_whole = is_whole & (mesh[AXES[axis]] >= teacher.axis_size(floor))
    counts = teacher.count_grid(mesh)
    chosen = np.nonzero(np.broadcast_to(teacher.expressible(mesh) & is_whole, counts.shape)
                        & (counts < teacher.num_parameters))  # fmt: skip
    sizes = {name: np.broadcast_to(values, counts.shape)[chosen] for name, values in mesh.items()}
    num = len(chosen[0])
    figures = counted(teacher, sizes, budget.serving, windows)
    return Shapes(teacher, sizes, {name: np.broadcast_to(values, (num,)) for name, values in figures.items()})


def feasible(shapes: Shapes, budget: Budget) -> Shapes:
    """The shapes that fit the budget.

    Raises:
        UserError: none does; the message says which come nearest.
    """
    if not len(shapes):
        raise UserError("search: no shape of the grid is smaller than the teacher")
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


def _limit_in_words(name: str, low: float, high: float) -> str:
    if name in COUNTS:
        return f"between {low:,.0f} and {high:,.0f} {COUNTS[name]}" if low else f"at most {high:,.0f} {COUNTS[name]}"
    return f"at most {high:.4g} {name.replace('_', ' ')}"


def _in_words(shapes: Shapes, i: int, budget: Budget) -> str:
    teacher = shapes.teacher
    changed = [f"{name} {sizes[i]}" for name, sizes in shapes.sizes.items() if sizes[i] != teacher.sizes[name]]
    figures = [f"{shapes.figures[name][i]:,.6g} {name.replace('_', ' ')}" if name not in COUNTS else
               f"{shapes.figures[name][i]:,} {COUNTS[name]}" for name in budget.limits]  # fmt: skip
    return f"{', '.join(figures)} ({' '.join(changed)})"


def _depth_by_kind(teacher: Arch, depth: Any) -> dict[str, Any]:
    """For an array of depths, arrays of the number of layers of each kind, by size name."""
    if not teacher.layer_counts:
        return {}
    depths, positions = np.unique(depth, return_inverse=True)
    splits = [teacher.split_depth(int(one)) for one in depths]
    return {name: np.array([split[name] for split in splits])[positions].reshape(depth.shape) for name in splits[0]}


def shortlist(shapes: Shapes, best_first: Sequence[int], count: int) -> list[int]:
    """The first `count` of the order, leaving out shapes that are nearly one taken already; then of these the first."""
    logs = np.log(np.stack([np.asarray(sizes, dtype=float) for sizes in shapes.sizes.values()]))  # (axes, n)
    chosen: list[int] = []
    passed_over: list[int] = []
    for i in best_first:
        if len(chosen) == count:
            break
        is_near = chosen and (np.abs(logs[:, chosen] - logs[:, [i]]).max(axis=0) < SMALLEST_DIFFERENCE).any()
        (passed_over if is_near else chosen).append(int(i))
    taken = {*chosen, *passed_over[: count - len(chosen)]}
    return [int(i) for i in best_first if int(i) in taken]
