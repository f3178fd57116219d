"""Simulated rounding: a model's matrices compute with the values that an export in a scheme will hold.

Weights stay as they are, and so do the names of their tensors. The values follow from the weights alone, whenever these
are used, so that a training has no further state. Gradients pass the rounding as if there were none (straight-through
estimator, arXiv 1308.3432, section 4), as in quantisation-aware distillation (arXiv 2601.20088).
"""

import operator
from collections.abc import Iterator, Mapping
from functools import reduce
from typing import Any

import torch
from torch import Tensor, nn

from minitron.errors import UserError
from minitron.model.anatomy import AXES, Row
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint
from minitron.model.language_model import module_of
from minitron.model.schemes import (
    GROUPS,
    SCHEMES,
    Scheme,
    input_scale,
    quantised_rows,
    rounded,
    rounded_inputs,
    scales,
    scheme_for,
)

ENTRIES_AT_ONCE = 2**17
"""Entries of a matrix that are rounded at a time on a CPU: few enough for its caches, in which the search of scales for
four bits takes a third of the time."""


class _StraightThrough(torch.autograd.Function):
    """The values of one tensor, with a gradient that goes to another one unchanged."""

    @staticmethod
    def forward(ctx: Any, exact: Tensor, values: Tensor) -> Tensor:
        return values.to(exact.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class RoundedLinear(nn.Linear):
    """A linear map that computes with the rounded values of its weight, and in some schemes of its inputs."""

    scheme: Scheme
    saved: torch.dtype
    """The dtype in which the weight will be saved, from which it is rounded."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Return what an engine that runs the export makes of inputs (…, in), (…, out)."""
        weight = _straight_through(self.weight, as_exported(self.weight.detach().to(self.saved), self.scheme))
        if self.scheme.activations is not None:
            inputs = _straight_through(inputs, _rounded_inputs(inputs.detach(), self.scheme))
        return nn.functional.linear(inputs, weight, self.bias)


def as_exported(weight: Tensor, scheme: Scheme) -> Tensor:
    """Return the matrix (out, in), in bfloat16, that the values in an export of a weight (out, in) stand for.

    Scales are those of a row or of a part of it, so that on a CPU a few rows can be rounded at a time.
    """
    if weight.device.type != "cpu" or torch.compiler.is_compiling():
        return rounded(weight, scales(weight, scheme), scheme)
    parts = weight.split(max(1, ENTRIES_AT_ONCE // weight.shape[1]))
    return torch.cat([rounded(part, scales(part, scheme), scheme) for part in parts])


def simulate_rounding(model: Any, checkpoint: Checkpoint, name: str) -> None:
    """Let a transformers model compute with matrices and inputs as a scheme rounds them, in place.

    `checkpoint` is the model on disk, in whose dtype it is saved. Where an export has one scale for all inputs of a
    matrix, measured by calibration, it is that of the inputs of a call.

    Raises:
        UserError: see `require_roundable`.
    """
    require_roundable(checkpoint.arch, name)
    scheme = scheme_for(name, checkpoint.arch)
    for row, layer in _matrices(checkpoint.arch):
        module = module_of(model, row, layer)
        assert type(module) is nn.Linear, row.name
        module.__class__ = RoundedLinear
        assert isinstance(module, RoundedLinear)
        module.scheme, module.saved = scheme, checkpoint.dtype


def require_roundable(arch: Arch, name: str) -> None:
    """Check that all matrices that an export in a scheme rounds can be rounded during training.

    Raises:
        UserError: an export cannot round them, see `schemes.scheme_for`; or they are multiplied elsewhere than in a
            linear module: those of experts, and the output matrices of Mamba mixers, which fused kernels read.
    """
    scheme_for(name, arch)
    for row in quantised_rows(arch):
        kind = "experts" if row.is_per_expert else "Mamba mixers" if "mhead" in row.axes else None
        if kind is not None:
            raise UserError(
                f"distill.quantize {name}: the matrices of {kind} ({row.name}) cannot be rounded in training; export "
                f"the student of a training without it"
            )


def is_divided(arch: Arch, name: str, sizes: Mapping[str, Any]) -> Any:
    """Return whether the groups of a scheme divide the inputs of all matrices of shapes of an arch.

    `sizes` are the sizes that shapes have of their own, by config name: integers or integer arrays, and so the result
    is a boolean or an array.
    """
    if SCHEMES[name].group is None:
        return True
    every = {**arch.sizes, **sizes}
    widths = (row.shape(lambda axis: every[AXES[axis]])[1] for row in quantised_rows(arch))
    return reduce(operator.and_, (width % GROUPS[-1] == 0 for width in widths))


def rounds_from(model: nn.Module) -> torch.dtype | None:
    """Return the dtype from which the matrices of a model are rounded; None where they are not."""
    return next((module.saved for module in model.modules() if isinstance(module, RoundedLinear)), None)


def _matrices(arch: Arch) -> Iterator[tuple[Row, int | None]]:
    rows = set(quantised_rows(arch))
    return ((row, layer) for row, layer, _ in arch.places() if row in rows)


def _straight_through(exact: Tensor, values: Tensor) -> Tensor:
    result: Tensor = _StraightThrough.apply(exact, values)  # type: ignore[no-untyped-call]
    return result


def _rounded_inputs(inputs: Tensor, scheme: Scheme) -> Tensor:
    scale = input_scale(inputs.abs().amax(), scheme) if scheme.activations == "tensor" else None
    return rounded_inputs(inputs, scheme, scale)
