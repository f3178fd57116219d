"""Applies maps on axes to tensors: the operation that trims, sorts and permutes a model.

A map lists the old entries of an axis that become the new ones, in order. A selection of some entries trims; a
permutation of all entries leaves the function of the model unchanged. Tensors that write an axis and tensors that read
it take equal maps, so the code does not distinguish them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from minitron.model.anatomy import Dimension, Row, size_of

Maps = dict[str, Tensor]
"""Indices by axis, for one layer; an axis without a map stays as it is."""


def apply_maps(tensor: Tensor, row: Row, maps: Maps, axis_size: Callable[[str], int]) -> Tensor:
    """Apply maps to every dimension of a tensor that is laid out as its row says."""
    dtype = tensor.dtype
    if dtype.itemsize == 2:  # integers of two bytes are gathered twice as fast as floats
        tensor = tensor.view(torch.int16)
    for dim, dimension in enumerate(row.dimensions):
        if any(factor in maps for segment in dimension for factor in segment):
            positions = kept_positions(dimension, maps, axis_size).to(tensor.device)
            if dim == tensor.ndim - 1 > 0:  # along rows, gather is twice as fast as index_select
                tensor = tensor.gather(dim, positions.expand(*tensor.shape[:-1], -1))
            else:
                tensor = tensor.index_select(dim, positions)
    return tensor.view(dtype)


def kept_positions(dimension: Dimension, maps: Maps, axis_size: Callable[[str], int]) -> Tensor:
    """Return the positions along a dimension that maps keep, in the student's order."""
    pieces, start = [], 0
    for segment in dimension:
        # Positions of the kept entries in a row-major product of axes, built from the outermost axis in.
        positions, size = torch.zeros(1, dtype=torch.int64), 1
        for factor in segment:
            length = size_of(factor, axis_size) if isinstance(factor, str) else factor
            entries = maps[factor] if isinstance(factor, str) and factor in maps else torch.arange(length)
            positions = (positions[:, None] * length + entries[None, :]).flatten()
            size *= length
        pieces.append(positions + start)
        start += size
    return torch.cat(pieces)
