"""The teacher sorted by importance, so that every candidate is the beginning of it along every axis.

Hundreds of shapes are tried this way without a copy of each: a candidate's tensors are views into those of the sorted
teacher. Where the choice of entries depends on how many there are of something else, there is a sorted teacher for each
such number: the basis that hidden is turned into depends on its size, Mamba heads are ranked by the channels that stay.
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
from minitron.model.checkpoint import Checkpoint, student_config
from minitron.model.language_model import build_model
from minitron.pruning.cut import cut_to
from minitron.pruning.importance import Importance, kept_layers, select
from minitron.pruning.maps import kept_positions
from minitron.pruning.repair import mended
from minitron.pruning.rotate import turns
from minitron.recipe import PruneRecipe


@dataclass(frozen=True)
class Sorted:
    """A teacher cut to the sizes of `whole`, all else sorted by falling importance; `tensors` by name."""

    teacher: Checkpoint
    importance: Importance
    whole: Arch
    tensors: dict[str, Tensor]

    def model(self, arch: Arch, device: torch.device, dtype: torch.dtype) -> Any:
        """The transformers model of a candidate, cut as `pruning.cut` cuts it, in the sorted order."""
        config = student_config(self.teacher, arch, self._layers(arch))
        return build_model(config, self.views(arch), device, dtype)

    def _layers(self, arch: Arch) -> list[int]:
        numbers: list[int] = kept_layers(self.importance, self.teacher.arch, arch).tolist()
        return numbers

    def views(self, arch: Arch) -> Iterator[tuple[str, Tensor]]:
        """The tensors of a candidate by name; what is several things in one dimension, such as gates, is copied."""
        layers = self._layers(arch)
        of_kind = {kind: [i for i in layers if kind is None or self.teacher.arch.layers[i] == kind]
                   for kind in {row.kind for row in arch.rows}}  # fmt: skip
        new_number = {number: new for new, number in enumerate(layers)}
        for row in arch.rows:
            parts = self._parts(row, arch)
            for number in of_kind[row.kind] if row.is_per_layer else [None]:
                new = None if number is None else new_number[number]
                for expert in range(arch.axis_size("expert")) if row.is_per_expert else [None]:
                    tensor = self.tensors[row.tensor_name(number, expert)]
                    for dim, part in parts:
                        # Heads that are fewer in each of several groups are the one thing that a view cannot hold.
                        tensor = (
                            tensor.narrow(dim, 0, part) if isinstance(part, int) else tensor.index_select(dim, part)
                        )
                    yield row.tensor_name(new, expert), tensor

    def _parts(self, row: Row, arch: Arch) -> list[tuple[int, int | Tensor]]:
        """By dimension that gets shorter: how much of its beginning is kept, or which positions are."""
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
        size, group = arch.axis_size(axis), arch.grouped.get(axis)
        if group is None:
            return torch.arange(size)
        starts = torch.arange(arch.axis_size(group)) * self.whole.entries(axis)
        return (starts[:, None] + torch.arange(arch.entries(axis))).flatten()

    @cached_property
    def _device(self) -> torch.device:
        return next(iter(self.tensors.values())).device


def decided_by(teacher: Arch, recipe: PruneRecipe) -> tuple[str, ...]:
    """The sizes, by config name, for each combination of which there has to be a sorted teacher."""
    axes = {tap.axes[1] for tap in teacher.family.taps if len(tap.axes) > 1}
    if recipe.rescale_norms or turns(teacher, recipe):
        axes.add("hidden")
    return tuple(AXES[axis] for axis in teacher.prunable_axes if axis in axes)


def sort_teacher(
    teacher: Checkpoint,
    importance: Importance,
    sizes: dict[str, int],
    recipe: PruneRecipe,
    blocks: Blocks,
    device: torch.device,
    dtype: torch.dtype,
) -> Sorted:
    """The teacher cut to some sizes, those of `decided_by`, mended there and sorted along every other axis.

    The repair is the rescaling of norms, on `blocks`. What depends on all sizes of a shape is left out: the refit, and
    heads that are merged.
    """
    # Not every such shape could be written as a config, but it is never written.
    whole = replace(teacher.arch, sizes={**teacher.arch.sizes, **sizes})
    cut = cut_to(whole, teacher, importance, recipe.model_copy(update={"merge_heads": False}))
    cut = replace(cut, kept=select(importance, teacher.arch, whole, ranked=True))
    recipe = recipe.model_copy(update={"refit": False})
    tensors = {}
    for name, value in mended(teacher, cut, blocks, recipe, device, dtype):
        # What has one dimension is small, and some of it stays in the file's dtype when a model is run in another.
        tensors[name] = value.to(device, dtype if value.ndim > 1 else None)
    return Sorted(teacher, importance, whole, tensors)
