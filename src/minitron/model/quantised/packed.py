"""Matrices of compressed-tensors' `pack-quantized`: several weights in each integer of 32 bits, along the rows.

The layout is that of `compressors/pack_quantized` (`base.py`, `helpers.py`) in compressed-tensors 0.20: numbers with a
sign are stored plus half their range, the first one in the lowest bits. Zero points are packed likewise, along columns.
"""

import math

import torch
from torch import Tensor

from minitron.model.quantised.layout import Layout, Stored
from minitron.model.quantised.scaled import GROUP_OF_COLUMN, ZERO_POINT, column_groups, restore

WORD_BITS = 32


def unpack(words: Tensor, bits: int) -> Tensor:
    """Return the numbers without sign (rows, columns) of integers of 32 bits (rows, words), the lowest bits first.

    `bits` divides 8, so that no number lies across bytes.
    """
    octets = words.contiguous().view(torch.uint8)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    return ((octets[..., None] >> shifts) & ((1 << bits) - 1)).flatten(1)


def packed_bits(stored: Stored) -> int:
    """Return the bits of a weight that the config states for packed weights.

    Raises:
        UserError: it states none.
    """
    if stored.quantisation.packed_bits is None:
        raise stored.refusal("is packed, but the config does not state the bits of a packed weight")
    return stored.quantisation.packed_bits


def num_words(count: int, bits: int) -> int:
    """Return how many integers of 32 bits hold numbers of some bits."""
    return math.ceil(count * bits / WORD_BITS)


def _shape(stored: Stored) -> tuple[int, ...]:
    (dtype, words), shape, bits = stored.header("_packed"), stored["_shape"].tolist(), packed_bits(stored)
    if dtype != "I32" or len(shape) != 2 or words != [shape[0], num_words(shape[1], bits)]:
        raise stored.refusal(f"does not hold a matrix of shape {shape} in {bits} bits")
    return tuple(shape)


def _read(stored: Stored) -> Tensor:
    (rows, columns), bits = _shape(stored), packed_bits(stored)
    half, zeros = 1 << (bits - 1), stored.optional(ZERO_POINT)
    if zeros is not None and zeros.dtype == torch.int32:
        if zeros.ndim != 2 or zeros.shape[0] != num_words(rows, bits):
            raise stored.refusal(f"has zero points of shape {list(zeros.shape)}, not of {rows} rows in {bits} bits")
        zeros = unpack(zeros.T, bits).T[:rows].float() - half
    values = unpack(stored["_packed"], bits)[:, :columns].float() - half
    return restore(stored, values, stored["_scale"], zeros=zeros, groups=column_groups(stored))


PACKED = Layout(
    values="_packed",
    weight="",
    needs=("_scale", "_shape"),
    may_have=(ZERO_POINT, GROUP_OF_COLUMN),
    shape=_shape,
    read=_read,
)
