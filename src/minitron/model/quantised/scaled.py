"""Matrices of FP8 or int8 with scales, and what is common to all that have scales: (number − zero point) · scale.

The layouts are those of `compressed-tensors` (`float-quantized`, `int-quantized`, `naive-quantized`), of FP8 in blocks
as DeepSeek and Qwen release it (transformers' `FineGrainedFP8Config`), and of NVIDIA Model Optimizer's FP8.
"""

import math
from dataclasses import replace

import torch
from torch import Tensor

from minitron.model.quantised.layout import Layout, Stored

ZERO_POINT, GROUP_OF_COLUMN = "_zero_point", "_g_idx"
"""What follows the name of a matrix in the names of its zero points, and of the group of scales of each column."""
EIGHT_BITS = {"F8_E4M3", "F8_E5M2", "I8"}


def scaled_shape(stored: Stored) -> tuple[int, ...]:
    """Return the shape of a matrix that is stored by itself.

    Raises:
        UserError: it is not a matrix of FP8 or int8.
    """
    dtype, shape = stored.header(stored.layout.values)
    if dtype not in EIGHT_BITS or len(shape) != 2:
        raise stored.refusal("has scales, but is not a matrix of FP8 or int8")
    return tuple(shape)


def read_scaled(stored: Stored) -> Tensor:
    """Return a matrix of FP8 or int8, times its scales."""
    values, scales = stored[stored.layout.values], stored[stored.layout.needs[0]]
    return restore(stored, values, scales, zeros=stored.optional(ZERO_POINT), groups=column_groups(stored))


def restore(
    stored: Stored, values: Tensor, scales: Tensor, *, zeros: Tensor | None = None, groups: Tensor | None = None
) -> Tensor:
    """Return (values − zeros) · scales in float32, for values (rows, columns).

    Scales and zero points are one number, or a matrix of which an axis has one entry, one for each row or column, or
    one for each block of them; `groups` (columns) states which of the scales of a row each column has instead.

    Raises:
        UserError: their shapes do not fit.
    """
    matrix = values.float()
    if zeros is not None:
        matrix -= _spread(stored, zeros, matrix.shape, groups)
    matrix *= _spread(stored, scales, matrix.shape, groups)
    return matrix


def column_groups(stored: Stored) -> Tensor | None:
    """Return the group of scales of each column; None where columns are grouped in their order.

    compressed-tensors up to 0.12 writes it (`quantization/lifecycle/initialize.py`, activation ordering by group), and
    −1 where columns are in order after all (`lifecycle/forward.py`).
    """
    groups = stored.optional(GROUP_OF_COLUMN)
    return None if groups is None or bool((groups < 0).any()) else groups.long()


def _spread(stored: Stored, scales: Tensor, shape: torch.Size, groups: Tensor | None) -> Tensor:
    """Return scales or zero points, repeated so that they can be multiplied by a matrix of this shape."""
    if scales.dtype == torch.uint8 and stored.header(stored.layout.values)[0] in EIGHT_BITS:
        raise stored.refusal("has exponents, not scales: not supported")
    if scales.numel() == 1:
        return scales.float().reshape(1, 1)
    block = stored.quantisation.block
    unfit = stored.refusal(
        f"has scales or zero points of shape {list(scales.shape)}, which does not fit a matrix of shape {list(shape)} "
        f"with blocks of {block or 'one row, or the matrix'}"
    )
    if scales.ndim != 2:
        raise unfit
    scales = scales.float()
    if groups is not None:
        if groups.shape != shape[1:] or int(groups.max()) >= scales.shape[1]:
            raise unfit
        scales = scales[:, groups]
    for axis, size in enumerate(shape):
        step = block[axis] if block else size
        if scales.shape[axis] not in {1, size, math.ceil(size / step)}:
            raise unfit
        if scales.shape[axis] not in {1, size}:
            scales = scales.repeat_interleave(step, dim=axis).narrow(axis, 0, size)
    return scales


SCALED = Layout(
    values="",
    weight="",
    needs=("_scale",),
    may_have=(ZERO_POINT, GROUP_OF_COLUMN),
    shape=scaled_shape,
    read=read_scaled,
)
SCALED_INV = replace(SCALED, needs=("_scale_inv",))
"""As DeepSeek names them; the scales are multiplied by, whatever the name."""
