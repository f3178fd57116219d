"""Finds the tensors that write the residual stream in a layer, and corrects them by least squares."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minitron.errors import UserError
from minitron.model.anatomy import Norm, Row
from minitron.model.arch import Arch
from minitron.model.experts import Experts
from minitron.model.language_model import Point
from minitron.model.maps import kept_positions
from minitron.pruning.cut import Cut
from minitron.pruning.layers import Layer

DOUBLE_WIDTH = 4096
"""Systems of more unknowns than this are solved in float32: their matrices are large, and the ridge conditions them."""
LEAST_RIDGE = 1e-7

Tensors = dict[tuple[Row, int | None], Tensor]
"""A student's tensors of a layer, by row and expert."""


@dataclass(frozen=True)
class Writer:
    """A tensor that writes the residual stream, and the point after it where student and teacher are compared."""

    row: Row
    dim: int
    """The dimension of its inputs."""
    before: Norm | None = None
    """The norm that reads the stream after this tensor; None where its own output is compared with the teacher's."""
    is_last: bool = False
    """Whether it is compared by the stream after the layer."""

    def point(self, layer: Layer) -> Point:
        """Return the point at which the student should have the teacher's activation."""
        if self.before is None:
            return layer.module_of(self.row), "output"
        return layer.module_of(self.before), "input"


def writers_of(arch: Arch, number: int) -> list[Writer]:
    """Return the tensors that write the stream in a layer, in the order in which they do; experts are left out."""
    taps = [tap for tap in arch.layer_taps(number) if tap.axes != ("hidden",)]
    rows = dict.fromkeys(row for tap in taps if (row := next(filter(tap.reads_input_of, arch.rows), None)))
    writers = [
        Writer(row, next(i for i, dim in enumerate(row.dimensions) if dim != (("hidden",),)))
        for row in rows
        if "hidden" in row.axes
    ]
    if not writers or arch.family.scales_residual or arch.norms_after_blocks:
        return writers  # the stream gains a function of their output, not the output itself
    return [
        *(replace(writer, before=_norm_after(arch, writer.row)) for writer in writers[:-1]),
        replace(writers[-1], is_last=True),
    ]


def _norm_after(arch: Arch, row: Row) -> Norm | None:
    """Return the norm that stands after the block of a row's tensor in a layer, or None after the last block."""
    norms, before = arch.norms_before_blocks, arch.family.norm_before(row)
    following = norms[norms.index(before) + 1 :] if before else []
    return following[0] if following else None


@dataclass
class ExpertWriters:
    """The matrices with which a layer's experts write, each refitted on the inputs that the student keeps.

    They are fitted on the teacher's tokens and choices of experts, weighted as the router weights them.
    """

    cut: Cut
    number: int
    row: Row
    tensors: Tensors
    moments: dict[int, Tensor]
    crosses: dict[int, Tensor]
    num_tokens: dict[int, int]

    @classmethod
    def of(cls, cut: Cut, tensors: Tensors, number: int) -> "ExpertWriters | None":
        """Return the experts' matrices of a layer, or None where there are no experts or their inputs are not cut."""
        teacher = cut.teacher
        axes = [axis for axis in teacher.family.per_expert_axes if axis in teacher.axes]
        row = cut.student.expert_writer
        is_here = any(other == row for other, _ in tensors)
        if row is None or not is_here or all(teacher.axis_size(axis) == cut.student.axis_size(axis) for axis in axes):
            return None
        return cls(cut, number, row, tensors, {}, {}, {})

    def watch(self, teacher: Layer) -> torch.utils.hooks.RemovableHandle:
        """Add to the moments whenever the teacher's experts run, until the returned handle is removed."""
        tap = next(tap for tap in self.cut.teacher.family.taps if tap.side == "routed")
        return teacher.module(tap.module).register_forward_pre_hook(
            lambda module, args, kwargs: self._add(module, *args, *kwargs.values()), with_kwargs=True
        )

    def _add(self, module: Any, states: Tensor, numbers: Tensor, weights: Tensor) -> None:
        for new, expert in enumerate(self.cut.kept["expert"][self.number].tolist()):
            token, place = (numbers == expert).nonzero(as_tuple=True)
            experts = Experts(module)
            inner = experts.inner_states(expert, states[token]).float() * weights[token, place].float()[:, None]
            positions = self._positions(expert).to(inner.device)
            dropped = torch.ones(inner.shape[-1], dtype=torch.bool, device=inner.device)
            dropped[positions] = False
            lacking = self._of_student(inner[:, dropped] @ experts.second_matrix(expert, dropped).float())
            x = inner[:, positions]
            self.num_tokens[new] = self.num_tokens.get(new, 0) + len(x)
            self.moments[new] = self.moments.get(new, 0) + x.T @ x
            self.crosses[new] = self.crosses.get(new, 0) + x.T @ lacking

    def _of_student(self, outputs: Tensor) -> Tensor:
        """Return the teacher's outputs of an expert (T, hidden or latent) as the student should have them."""
        if "hidden" in self.row.axes:
            return self.cut.project(outputs)
        kept = self.cut.kept.get("latent")
        return outputs if kept is None else outputs[:, kept[self.number].to(outputs.device)]

    def _positions(self, expert: int) -> Tensor:
        axis = next(iter(self.row.axes & self.cut.teacher.family.per_expert_axes))
        maps = {axis: self.cut.kept[axis][self.number][expert]}
        return kept_positions(((axis,),), maps, self.cut.teacher.axis_size)

    def fitted(self, ridge: float) -> Tensors:
        """Return the refitted tensors."""
        dimensions = self.row.dimensions[1:] if self.row.is_stacked else self.row.dimensions
        inputs_first = not set(dimensions[0][0]).isdisjoint(self.cut.teacher.family.per_expert_axes)
        changes = {}
        for new, moment in self.moments.items():
            change = correction(moment, self.crosses[new], ridge, self.num_tokens[new]).cpu()
            changes[new] = change.T if inputs_first else change
        if self.row.is_stacked:
            value = self.tensors[self.row, None]
            return {(self.row, None): (value.float() + torch.stack([changes[e] for e in sorted(changes)])).to(value)}
        return {
            (self.row, e): (value.float() + change).to(value.dtype)
            for e, change in changes.items()
            for value in [self.tensors[self.row, e]]
        }


def correction(moment: Tensor, cross: Tensor, ridge: float, num_tokens: int) -> Tensor:
    """Return the Δ (outputs, inputs) with the least squared error of ΔX ≈ E: Δᵀ = (moment + λI)⁻¹ cross.

    `moment` is X Xᵀ (inputs, inputs) and `cross` X Eᵀ (inputs, outputs). λ is the mean of the moment's diagonal times
    `ridge` · inputs / `num_tokens`, since a fit to fewer tokens is noisier.

    Raises:
        UserError: a matrix holds NaN or infinity.
    """
    if not (torch.isfinite(moment).all() and torch.isfinite(cross).all()):
        raise UserError("activations hold NaN or infinity: the teacher's weights are broken, or its dtype is too small")
    dtype = torch.float64 if len(moment) <= DOUBLE_WIDTH else torch.float32
    damped = moment.to(dtype, copy=True)
    damping = max(ridge * len(moment) / max(1, num_tokens), LEAST_RIDGE)
    damped.diagonal().add_(damping * damped.diagonal().mean().clamp_min(1e-30))
    return torch.cholesky_solve(cross.to(dtype), torch.linalg.cholesky(damped)).T.float()
