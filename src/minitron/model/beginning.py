"""Reads a smaller model out of a larger one that is sorted by importance, as its beginning along every axis."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from minitron.model.anatomy import Row
from minitron.model.arch import Arch
from minitron.model.maps import kept_positions


@dataclass(frozen=True)
class Beginning:
    """A shape whose entries are the first ones of a larger shape along every axis but depth.

    Of the layers of `whole` it has `layers`, which keep their order. Of a grouped axis it has the first entries of
    every group.
    """

    whole: Arch
    arch: Arch
    layers: list[int]

    def of(self, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of the smaller model by name, which are views into `tensors`, those of the larger one.

        Tensors that join several things in one dimension are copies. Gradients flow back through both.
        """
        new_numbers = {number: new for new, number in enumerate(self.layers)}
        for row in self.arch.rows:
            numbers = [i for i in self.layers if row.kind in {None, self.whole.layer_kind(i)}]
            for number in numbers if row.is_per_layer else [None]:
                new = None if number is None else new_numbers[number]
                for expert in range(self.arch.axis_size("expert")) if row.is_per_expert else [None]:
                    yield row.tensor_name(new, expert), self.part(row, tensors[row.tensor_name(number, expert)])

    def part(self, row: Row, tensor: Tensor) -> Tensor:
        """Return the beginning of a tensor of the larger model, which is laid out as its row says."""
        for dim, part in self._parts(row):
            # A view cannot leave out heads in each of several groups: index_select copies.
            if isinstance(part, int):
                tensor = tensor.narrow(dim, 0, part)
            else:
                tensor = tensor.index_select(dim, part.to(tensor.device))
        return tensor

    def positions(self, axis: str) -> Tensor:
        """Return the positions along an axis that are kept, in each group of a grouped axis."""
        size, group = self.arch.axis_size(axis), self.arch.grouped.get(axis)
        if group is None:
            return torch.arange(size)
        starts = torch.arange(self.arch.axis_size(group)) * self.whole.entries(axis)
        return (starts[:, None] + torch.arange(self.arch.entries(axis))).flatten()

    def _parts(self, row: Row) -> list[tuple[int, int | Tensor]]:
        """Return each dimension that gets shorter with the length of its beginning, or with the kept positions."""
        maps = {
            axis: self.positions(axis) for axis in row.axes if self.arch.axis_size(axis) != self.whole.axis_size(axis)
        }
        parts: list[tuple[int, int | Tensor]] = []
        for dim, dimension in enumerate(row.dimensions):
            if any(factor in maps for segment in dimension for factor in segment):
                positions = kept_positions(dimension, maps, self.whole.axis_size)
                is_prefix = torch.equal(positions, torch.arange(len(positions)))
                parts.append((dim, len(positions) if is_prefix else positions))
        return parts
