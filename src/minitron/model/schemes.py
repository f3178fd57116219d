"""Schemes by which weights are rounded to eight or four bits: the matrices they hold for, scales, values.

An exported folder stores what `quantised` returns with its scales, and `rounded` is what these stand for, so that a
model that is trained with `rounded` weights is exported to exactly the values that it was trained with. All functions
are deterministic, and depend on the weight alone.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minitron.errors import UserError, nearest
from minitron.model.anatomy import Row
from minitron.model.arch import Arch

SCALE_DTYPE = torch.bfloat16
"""The dtype in which scales are stored, and that of the values that they are multiplied to."""
GROUPS = (128, 64, 32)
"""The numbers of entries of a row that may share a scale of four bits, of those that vLLM's kernels read."""
ROUTER = ((("expert",),), (("hidden",),))
"""The dimensions of a matrix that chooses experts, which stays as it is."""


@dataclass(frozen=True)
class Scheme:
    """How a matrix is rounded, and the inputs that it is multiplied by."""

    name: str
    dtype: torch.dtype
    """The dtype of a stored value, of four bits before they are packed."""
    bits: int
    smallest: float
    largest: float
    """The range of stored values."""
    activations: str | None
    """How inputs are rounded: `tensor`, with a scale that calibration has measured; `token`, with one that is computed
    for each token; None: not at all."""
    factors: tuple[float, ...] = (1.0,)
    """The shares of the largest magnitude that may become the largest value; the one of least squared error does."""
    group: int | None = None
    """The entries of a row that share a scale; None: all of them."""


SCHEMES = {
    "fp8": Scheme("fp8", torch.float8_e4m3fn, 8, -448.0, 448.0, "tensor"),
    "int8": Scheme("int8", torch.int8, 8, -128.0, 127.0, "token"),
    # A smaller range rounds the many small entries of a group more finely and clips the few largest ones.
    "int4": Scheme("int4", torch.int8, 4, -8.0, 7.0, None, tuple(0.75 + i / 32 for i in range(9)), GROUPS[0]),
}
"""The schemes by name; the group of `int4` is that of `scheme_for`."""


def scheme_for(name: str, arch: Arch) -> Scheme:
    """Return a scheme for the matrices of a model; all groups of a model have one size, the largest that divides them.

    Inputs of a model with experts are rounded with a scale for each token: vLLM reads no other FP8 experts with a scale
    for each row (its `CompressedTensorsW8A8Fp8MoEMethod`).

    Raises:
        UserError: the scheme is unknown, see `quantised_rows`, or no size of groups divides the inputs of all matrices.
    """
    if name not in SCHEMES:
        raise UserError(f"scheme {name}: {nearest(name, list(SCHEMES))}")
    scheme, rows = SCHEMES[name], quantised_rows(arch)
    if scheme.activations and any(row.is_per_expert for row in rows):
        scheme = replace(scheme, activations="token")
    if scheme.group is None:
        return scheme
    widths = {row.shape(arch.axis_size)[1]: row for row in rows}
    for group in GROUPS:
        if all(width % group == 0 for width in widths):
            return replace(scheme, group=group)
    width, row = next((width, row) for width, row in widths.items() if width % GROUPS[-1])
    raise UserError(
        f"{name} needs matrices whose inputs are a multiple of {GROUPS[-1]}, and {row.name} has {width} inputs"
    )


def quantised_rows(arch: Arch) -> list[Row]:
    """Return the rows whose matrices are rounded: the linear modules of the layers, those of experts among them.

    Embeddings, the output matrix, routers, convolutions and norms stay as they are.

    Raises:
        UserError: the family stores its matrices transposed, or those of all experts in one tensor.
    """
    if arch.family.is_transposed:
        raise UserError(f"a {arch.model_type} model stores its matrices transposed, which cannot be quantised here")
    if stacked := [row for row in arch.rows if row.is_stacked and len(row.dimensions) > 2]:
        raise UserError(
            f"a {arch.model_type} model stores the experts of a layer in one tensor ({stacked[0].name}), which cannot "
            "be quantised here"
        )
    return [
        row
        for row in arch.rows
        if row.is_per_layer
        and row.name.endswith(".weight")
        and len(row.dimensions) == 2
        and (row.is_per_expert or row.dimensions != ROUTER)
    ]


def scales(weight: Tensor, scheme: Scheme) -> Tensor:
    """Return the scales (out, groups) of a matrix (out, in), in bfloat16; one group where the scheme has none.

    Of the ranges that `Scheme.factors` allows, each group has the one with the least squared error.

    Raises:
        ValueError: the groups of the scheme do not divide the inputs.
    """
    groups = _grouped(weight.detach().float(), scheme)
    widest = groups.abs().amax(dim=-1, keepdim=True) / scheme.largest
    candidates = [_usable(widest * factor) for factor in scheme.factors]
    if len(candidates) == 1:
        return candidates[0].squeeze(-1).to(SCALE_DTYPE)
    errors = torch.stack([_squared_error(groups, candidate, scheme) for candidate in candidates])
    best = torch.stack(candidates).gather(0, errors.argmin(dim=0, keepdim=True))[0]
    return best.squeeze(-1).to(SCALE_DTYPE)


def quantised(weight: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:
    """Return the stored values (out, in) of a matrix (out, in), of four bits not packed yet.

    A value is the quotient of entry and scale, computed in float32, rounded half to even and clipped to the range.
    """
    return _stored(_grouped(weight.detach().float(), scheme), scales.float().unsqueeze(-1), scheme).flatten(1)


def dequantised(values: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:
    """Return the matrix (out, in) that stored values stand for, in bfloat16."""
    return (_grouped(values.float(), scheme) * scales.float().unsqueeze(-1)).flatten(1).to(SCALE_DTYPE)


def rounded(weight: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:
    """Return the matrix (out, in), in bfloat16, that a matrix (out, in) is rounded to."""
    return dequantised(quantised(weight, scales, scheme), scales, scheme)


def input_scale(largest: float | Tensor, scheme: Scheme) -> Tensor:
    """Return the scale of inputs up to a magnitude, of shape (1,) in bfloat16."""
    return _usable(torch.as_tensor(largest).float().reshape(1) / scheme.largest).to(SCALE_DTYPE)


def rounded_inputs(inputs: Tensor, scheme: Scheme, scale: Tensor | None = None) -> Tensor:
    """Return inputs (…, in) as a scheme rounds them, in their dtype; `scale` is that of `input_scale`, where needed."""
    if scheme.activations is None:
        return inputs
    wide = inputs.float()
    if scheme.activations == "token":
        # As compressed-tensors computes it: the range is 2⁸ − 1 steps wide, half of it on either side.
        factor = _usable(wide.abs().amax(dim=-1, keepdim=True) * 2 / (scheme.largest - scheme.smallest), torch.float32)
    else:
        assert scale is not None
        factor = scale.float()
    return (_stored(wide, factor, scheme).float() * factor).to(inputs.dtype)


def quantised_tensors(arch: Arch) -> Iterator[str]:
    """Yield the names of the matrices of a model that are rounded."""
    rows = set(quantised_rows(arch))
    return (row.tensor_name(layer, expert) for row, layer, expert in arch.places() if row in rows)


def _grouped(matrix: Tensor, scheme: Scheme) -> Tensor:
    group = scheme.group or matrix.shape[1]
    if matrix.shape[1] % group:
        raise ValueError(f"groups of {group} do not divide {matrix.shape[1]} inputs")
    groups: Tensor = matrix.unflatten(1, (-1, group))
    return groups


def _squared_error(groups: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:
    difference: Tensor = _stored(groups, scales, scheme).float() * scales - groups
    return difference.square_().sum(dim=-1, keepdim=True)


def _stored(matrix: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:
    quotient: Tensor = (matrix / scales).clamp_(scheme.smallest, scheme.largest)
    return (quotient if scheme.dtype.is_floating_point else quotient.round_()).to(scheme.dtype)


def _usable(scales: Tensor, dtype: torch.dtype = SCALE_DTYPE) -> Tensor:
    """Return scales rounded to the dtype in which they are stored; those of nothing but zeros are 1."""
    stored = scales.to(dtype).float()
    return torch.where(stored == 0, torch.ones_like(stored), stored)
