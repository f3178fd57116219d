"""Sorts a teacher by importance, so that every candidate is the beginning of it along every axis.

Hundreds of shapes are tried this way without a copy of each: the tensors of a candidate are views into the tensors of
the sorted teacher. Where the choice of kept entries depends on the size of another axis, there is one sorted teacher
per size: the basis that hidden is rotated into depends on its size, and Mamba heads are ranked by the kept channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from minitron.data.blocks import Blocks
from minitron.model.anatomy import AXES, Row
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint
from minitron.model.config import student_config
from minitron.model.language_model import build_model
from minitron.pruning.cut import cut_to
from minitron.pruning.maps import kept_positions
from minitron.pruning.repair import repaired
from minitron.pruning.rotate import rotates
from minitron.pruning.scores import Importance
from minitron.pruning.selection import kept_layers, select
from minitron.recipe import PruneRecipe
from minitron.runtime import Runtime


@dataclass(frozen=True)
class SortedTeacher:
    """A teacher cut to the sizes of `whole` and sorted by falling importance along every other axis."""

    teacher: Checkpoint
    importance: Importance
    whole: Arch
    tensors: dict[str, Tensor]

    def model(self, arch: Arch, runtime: Runtime) -> Any:
        """Return the transformers model of a candidate: the function of the pruned model, entries in sorted order."""
        config = student_config(self.teacher, arch, self._layers(arch))
        return build_model(config, self.views(arch), runtime.device, runtime.dtype, runtime.attention)

    def _layers(self, arch: Arch) -> list[int]:
        numbers: list[int] = kept_layers(self.importance, self.teacher.arch, arch).tolist()
        return numbers

    def views(self, arch: Arch) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of a candidate by name; tensors that join several things in one dimension are copies."""
        layers = self._layers(arch)
        new_numbers = {number: new for new, number in enumerate(layers)}
        for row in arch.rows:
            parts = self._parts(row, arch)
            numbers = [i for i in layers if row.kind in {None, self.teacher.arch.layer_kind(i)}]
            for number in numbers if row.is_per_layer else [None]:
                new = None if number is None else new_numbers[number]
                for expert in range(arch.axis_size("expert")) if row.is_per_expert else [None]:
                    yield row.tensor_name(new, expert), _cut(self.tensors[row.tensor_name(number, expert)], parts)

    def _parts(self, row: Row, arch: Arch) -> list[tuple[int, int | Tensor]]:
        """Return each dimension that gets shorter with the length of its beginning, or with the kept positions."""
        maps = {
            axis: self._prefix(axis, arch) for axis in row.axes if arch.axis_size(axis) != self.whole.axis_size(axis)
        }
        parts: list[tuple[int, int | Tensor]] = []
        for dim, dimension in enumerate(row.dimensions):
            if any(factor in maps for segment in dimension for factor in segment):
                positions = kept_positions(dimension, maps, self.whole.axis_size)
                is_prefix = torch.equal(positions, torch.arange(len(positions)))
                parts.append((dim, len(positions) if is_prefix else positions.to(self._device)))
        return parts

    def _prefix(self, axis: str, arch: Arch) -> Tensor:
        """Return the positions along an axis that a candidate keeps, in each group of a grouped axis."""
        size, group = arch.axis_size(axis), arch.grouped.get(axis)
        if group is None:
            return torch.arange(size)
        starts = torch.arange(arch.axis_size(group)) * self.whole.entries(axis)
        return (starts[:, None] + torch.arange(arch.entries(axis))).flatten()

    @cached_property
    def _device(self) -> torch.device:
        return next(iter(self.tensors.values())).device


def _cut(tensor: Tensor, parts: list[tuple[int, int | Tensor]]) -> Tensor:
    for dim, part in parts:
        # A view cannot leave out heads in each of several groups: index_select copies.
        tensor = tensor.narrow(dim, 0, part) if isinstance(part, int) else tensor.index_select(dim, part)
    return tensor


def deciding_sizes(teacher: Arch, recipe: PruneRecipe) -> tuple[str, ...]:
    """Return the config names of the sizes that need a sorted teacher for each combination of their values."""
    axes = {tap.axes[1] for tap in teacher.taps if len(tap.axes) > 1}
    if recipe.rescale_norms or rotates(teacher, recipe):
        axes.add("hidden")
    return tuple(AXES[axis] for axis in teacher.prunable_axes if axis in axes)


def sort_teacher(
    teacher: Checkpoint,
    importance: Importance,
    sizes: dict[str, int],
    *,
    recipe: PruneRecipe,
    blocks: Blocks,
    runtime: Runtime,
) -> SortedTeacher:
    """Cut a teacher to `sizes`, those of `deciding_sizes`, rescale its norms, and sort it along every other axis.

    Norms are rescaled on `blocks`. Repairs that depend on all sizes of a shape are left out: the refit and the merge of
    heads.
    """
    # The shape may be one that no config can express: it is never written.
    whole = replace(teacher.arch, sizes={**teacher.arch.sizes, **sizes})
    kept = select(importance, teacher.arch, whole, ranked=True)
    cut = cut_to(whole, teacher, importance, recipe.model_copy(update={"merge_heads": False}), kept=kept)
    recipe = recipe.model_copy(update={"refit": False})
    tensors = {}
    for name, value in repaired(teacher, cut, blocks=blocks, recipe=recipe, runtime=runtime):
        # Tensors of one dimension are small, and some stay in the file's dtype when a model runs in another dtype.
        tensors[name] = value.to(runtime.device, runtime.dtype if value.ndim > 1 else None)
    return SortedTeacher(teacher, importance, whole, tensors)
