"""Pruning as maps on axes: what happens to an axis happens to every dimension that runs along it.

A map lists which of the old entries become the new ones, in order. A selection of some is trimming; a
permutation of all leaves the function of the model unchanged. Tensors that write an axis and tensors that
read it take the same map, so nothing here needs to know which is which.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from minitron.model.anatomy import Dimension, Row

Maps = dict[str, Tensor]
"""Axis to indices, for one layer; an axis without a map stays as it is."""


def apply_maps(tensor: Tensor, row: Row, maps: Maps, axis_size: Callable[[str], int]) -> Tensor:
    """Apply the maps to every dimension of a tensor laid out as its row says."""
    dtype = tensor.dtype
    if dtype.itemsize == 2:  # twice as fast to gather as floats of this size
        tensor = tensor.view(torch.int16)
    for dim, dimension in enumerate(row.dimensions):
        if any(factor in maps for segment in dimension for factor in segment):
            positions = kept_positions(dimension, maps, axis_size).to(tensor.device)
            if dim == tensor.ndim - 1 > 0:  # twice as fast along rows as index_select
                tensor = tensor.gather(dim, positions.expand(*tensor.shape[:-1], -1))
            else:
                tensor = tensor.index_select(dim, positions)
    return tensor.view(dtype)


def kept_positions(dimension: Dimension, maps: Maps, axis_size: Callable[[str], int]) -> Tensor:
    """The positions along a dimension that are kept, in the student's order."""
    pieces, start = [], 0
    for segment in dimension:
        # Positions of the kept entries in a row-major product of axes, built from the outermost in.
        positions, size = torch.zeros(1, dtype=torch.int64), 1
        for factor in segment:
            length = axis_size(factor) if isinstance(factor, str) else factor
            entries = maps[factor] if isinstance(factor, str) and factor in maps else torch.arange(length)
            positions = (positions[:, None] * length + entries[None, :]).flatten()
            size *= length
        pieces.append(positions + start)
        start += size
    return torch.cat(pieces)
