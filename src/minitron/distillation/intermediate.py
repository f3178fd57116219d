"""Intermediate losses: compares student and teacher within the layers (Minitron, arXiv 2407.14679, section 3 and
appendix A.4).

With h the residual stream at some place, P one learned map from the student's width to the teacher's, shared by all
places, and n the norm through which a model's next block reads the stream there, a token's loss is

    1 − cos(P n_student(h_student), n_teacher(h_teacher))        each model's own norm, as the paper has it, or
    1 − cos(n_teacher(P h_student), n_teacher(h_teacher))        the teacher's norm for both,

or the mean over channels of the squared difference. In the second, the student's own norm takes no part: after a
rotation its weights stand for no channel of the teacher (`pruning.rotate`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, log_softmax

from minitron.errors import UserError
from minitron.evaluation.agreement import kl_terms
from minitron.model.anatomy import Norm, Segment
from minitron.model.arch import Arch
from minitron.model.language_model import Headless, Point, module_of, watching
from minitron.recipe import IntermediateRecipe

ROWS_AT_ONCE = 16_384


@dataclass(frozen=True)
class Side:
    """A model, and the places in it that can be compared."""

    model: Any
    arch: Arch

    def stream_before(self, layer: int) -> Point:
        """Return the residual stream before a layer."""
        return self._layer(layer), "input"

    def stream_after(self, layer: int) -> Point:
        """Return the residual stream after a layer."""
        return self._layer(layer), "output"

    def reader_before(self, layer: int) -> nn.Module:
        """Return the norm that reads the stream before a layer: its first norm, or after all layers the final norm."""
        if layer == self.arch.axis_size("layer"):
            return module_of(self.model, self.arch.family.final_norm)
        norms = self._norms(layer)
        return module_of(self.model, norms[0], layer) if norms else nn.Identity()

    def mlp_norm(self, layer: int) -> nn.Module | None:
        """Return the norm whose output enters the MLP or the experts of a layer."""
        rows = [row for row in self.arch.layer_rows(layer) if row.axes & {"ffn", "expert", "shared_ffn"}]
        norms = [norm for norm in self._norms(layer) if any(norm.is_read_by(row) for row in rows)]
        return module_of(self.model, norms[-1], layer) if norms else None

    def heads(self, layer: int) -> list[tuple[Point, Segment]]:
        """Return the outputs that are queries, keys and values, each with the axes that it runs along.

        An output that joins several of them appears once for each.
        """
        rows = [
            row
            for row in self.arch.layer_rows(layer)
            if len(row.dimensions) == 2 and row.axes & {"query", "kv"} and "hidden" in row.axes
        ]
        return [
            ((module_of(self.model, row, layer), "output"), segment)
            for row in rows
            if not any(tap.reads_input_of(row) for tap in self.arch.taps)
            for dimension in row.dimensions
            if dimension != (("hidden",),)
            for segment in dimension
        ]

    def _layer(self, number: int) -> nn.Module:
        module: nn.Module = self.model.get_submodule(self.arch.family.layer_module(number))
        return module

    def _norms(self, layer: int) -> list[Norm]:
        names = {row.name for row in self.arch.layer_rows(layer)}
        return [norm for norm in self.arch.norms_before_blocks if norm.weight_name() in names]


@dataclass(frozen=True)
class _Streams:
    """A place where residual streams are compared."""

    teacher: Point
    student: Point
    norm: nn.Module
    """The norm that both streams pass here; the identity where they were read after the models' own norms."""
    kind: str

    def losses(self, teacher: Tensor, student: Tensor, projection: nn.Module) -> Tensor:
        """Return the losses (B, T) of streams (B, T, hidden)."""
        dtype = next(projection.parameters(), student).dtype
        target: Tensor = self.norm(teacher.to(dtype))
        projected: Tensor = self.norm(projection(student.to(dtype)))
        if self.kind == "mse":
            return (projected - target).square().mean(dim=-1)
        return 1 - cosine_similarity(projected, target, dim=-1)


@dataclass(frozen=True)
class _Relations:
    """A place where the relations between tokens are compared, within an equal number of heads of both models."""

    teacher: Point
    student: Point
    columns: tuple[slice, slice]
    num_heads: int

    def losses(self, teacher: Tensor, student: Tensor, _: nn.Module) -> Tensor:
        """Return the losses (B, T) of queries, keys or values (B, T, width): see `relation_loss`."""
        return relation_loss(teacher[..., self.columns[0]], student[..., self.columns[1]], self.num_heads)


@dataclass
class Intermediate:
    """The places that are compared, and the activations that were last read there."""

    places: list[_Streams | _Relations]
    projection: nn.Module
    seen: tuple[list[Any], list[Any]] = field(default_factory=lambda: ([], []))

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Read the activations of the models that run within the block."""
        with (
            watching([place.teacher for place in self.places]) as teacher,
            watching([place.student for place in self.places]) as student,
        ):
            self.seen = teacher, student
            yield
        self.seen = [], []

    def losses(self, teaches: Tensor | None, num_tokens: int) -> Tensor:
        """Return each block's loss (B,).

        It is the sum over places and over the tokens `teaches` (B, T), None for all, divided by `num_tokens`.
        """
        total = []
        for place, teacher, student in zip(self.places, *self.seen, strict=True):
            losses = place.losses(teacher.detach(), student, self.projection)
            total.append((losses if teaches is None else losses.masked_fill(~teaches, 0)).sum(dim=-1))
        return torch.stack(total).sum(dim=0) / num_tokens


def dynamic_weights(of_logits: Tensor, intermediate: Tensor) -> Tensor:
    """Return α = L_logits / L_is of each block (B,), a constant in the gradient; 0 where the blocks' L_is is 0.

    The paper writes both losses of one sequence, so that a step does not depend on how its blocks are split among
    forward passes and processes.
    """
    intermediate = intermediate.detach()
    ratio = of_logits.to(intermediate) / intermediate
    return ratio.masked_fill(intermediate == 0, 0)


def pairs_compared(recipe: IntermediateRecipe, teacher: Arch, student: Arch) -> tuple[tuple[int, int], ...]:
    """Return the pairs of layers that are compared: as given, or the third layer from the end of each model."""
    depths = teacher.axis_size("layer"), student.axis_size("layer")
    return recipe.layers or ((max(0, depths[0] - 3), max(0, depths[1] - 3)),)


def relation_loss(teacher: Tensor, student: Tensor, num_heads: int) -> Tensor:
    """Return the KL of the student's relations from the teacher's, mean over heads, (B, T).

    Teacher and student are queries, keys or values (B, T, width). A head's relations are softmax(A Aᵀ / √d) over the
    tokens up to each one, A (T, d) being its activations; all heads are joined and split again into `num_heads`
    (MiniLMv2, arXiv 2012.15828, section 3).
    """
    log_p, log_q = _relations(teacher, num_heads), _relations(student, num_heads)
    later = torch.ones(teacher.shape[1], teacher.shape[1], dtype=torch.bool, device=teacher.device).triu(1)
    return kl_terms(log_p, log_q).masked_fill(later, 0).sum(dim=-1).mean(dim=1)


def _relations(states: Tensor, num_heads: int) -> Tensor:
    """Return the logarithms of relations, (B, heads, T, T); later tokens have almost no probability."""
    heads = states.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # (B, heads, T, d)
    heads = heads.to(torch.promote_types(heads.dtype, torch.float32))
    scores = heads @ heads.transpose(-1, -2) / heads.shape[-1] ** 0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return log_softmax(scores.masked_fill(later, torch.finfo(scores.dtype).min), dim=-1)


def compare_on_the_way(
    teacher: Any,
    teacher_arch: Arch,
    student: Headless,
    student_arch: Arch,
    recipe: IntermediateRecipe,
    device: torch.device,
) -> Intermediate:
    """Return the places that the recipe names; where widths differ, the student gets a `projection`, trained as well.

    The projection begins as the least-squares map from the student's embeddings to the teacher's, or between what
    their first norms make of the embeddings, where each model's own norms are compared.

    Raises:
        UserError: the models lack these layers, or these layers lack what is compared.
    """
    sides = Side(teacher, teacher_arch), Side(student.model, student_arch)
    depths = teacher_arch.axis_size("layer"), student_arch.axis_size("layer")
    pairs = pairs_compared(recipe, teacher_arch, student_arch)
    if wrong := [pair for pair in pairs if pair[0] >= depths[0] or pair[1] >= depths[1]]:
        raise UserError(
            f"distill.intermediate.layers {wrong[0][0]}:{wrong[0][1]}: the teacher has layers 0 to {depths[0] - 1}, "
            f"the student 0 to {depths[1] - 1}"
        )
    dtype = torch.promote_types(next(student.parameters()).dtype, torch.float32)

    def streams(points: tuple[Point, Point], norms: tuple[nn.Module, nn.Module]) -> _Streams:
        if recipe.norms == "own":
            after = [
                point if isinstance(norm, nn.Identity) else (norm, "output")
                for point, norm in zip(points, norms, strict=True)
            ]
            return _Streams(after[0], after[1], nn.Identity(), recipe.loss)
        return _Streams(*points, deepcopy(norms[0]).to(device, dtype).requires_grad_(False), recipe.loss)

    first_norms = sides[0].reader_before(0), sides[1].reader_before(0)
    places: list[_Streams | _Relations] = []
    kinds = recipe.of or ()
    if "embedding" in kinds:
        places.append(streams((sides[0].stream_before(0), sides[1].stream_before(0)), first_norms))
    for number, other in pairs:
        if "block_output" in kinds:
            readers = sides[0].reader_before(number + 1), sides[1].reader_before(other + 1)
            places.append(streams((sides[0].stream_after(number), sides[1].stream_after(other)), readers))
        if "mlp_input" in kinds:
            norms = sides[0].mlp_norm(number), sides[1].mlp_norm(other)
            if norms[0] is None or norms[1] is None:
                raise UserError(
                    f"distill.intermediate: mlp_input of layers {number}:{other}: no norm before an MLP there"
                )
            places.append(streams(((norms[0], "input"), (norms[1], "input")), (norms[0], norms[1])))
        if "attention" in kinds:
            places += _relations_between(sides, number, other)
    projection: nn.Module = nn.Identity()
    if any(isinstance(place, _Streams) for place in places):
        widths = teacher_arch.axis_size("hidden"), student_arch.axis_size("hidden")
        if widths[0] != widths[1]:
            before = first_norms if recipe.norms == "own" else (nn.Identity(), nn.Identity())
            projection = _projection(teacher, student.model, dtype, before)
            student.add_module("projection", projection)
    return Intermediate(places, projection)


def _relations_between(sides: tuple[Side, Side], number: int, other: int) -> list[_Relations]:
    heads = sides[0].heads(number), sides[1].heads(other)
    if not heads[0] or len(heads[0]) != len(heads[1]):
        raise UserError(f"distill.intermediate: attention of layers {number}:{other}: no attention there")
    ends: tuple[dict[Any, int], dict[Any, int]] = ({}, {})
    places = []
    for pair in zip(*heads, strict=True):
        columns = []
        for side, end, (point, segment) in zip(sides, ends, pair, strict=True):
            start = end.get(point, 0)
            end[point] = start + prod(f if isinstance(f, int) else side.arch.axis_size(f) for f in segment)
            columns.append(slice(start, end[point]))
        axis = next(f for f in pair[0][1] if f in {"query", "kv"})
        num_heads = gcd(*(side.arch.axis_size(str(axis)) for side in sides))
        places.append(_Relations(pair[0][0], pair[1][0], (columns[0], columns[1]), num_heads))
    return places


@torch.no_grad()
def _projection(teacher: Any, student: Any, dtype: torch.dtype, norms: tuple[nn.Module, nn.Module]) -> nn.Module:
    """Return the linear map P with the least Σ ‖P e_student − e_teacher‖² over the tokens that both models have.

    e are the embeddings after a model's entry of `norms`.
    """
    targets, inputs = (model.get_input_embeddings().weight for model in (teacher, student))
    widths, device = (targets.shape[1], inputs.shape[1]), inputs.device
    moment, cross = (torch.zeros(widths[1], n, dtype=torch.float64, device=device) for n in (widths[1], widths[0]))
    for start in range(0, min(len(targets), len(inputs)), ROWS_AT_ONCE):
        end = min(start + ROWS_AT_ONCE, len(targets), len(inputs))
        y, x = (norm(rows[start:end]).to(device).double() for norm, rows in zip(norms, (targets, inputs), strict=True))
        moment.addmm_(x.T, x)
        cross.addmm_(x.T, y)
    moment.diagonal().add_(1e-9 * moment.diagonal().mean())
    projection: nn.Module = nn.utils.skip_init(nn.Linear, *reversed(widths), bias=False, device=device, dtype=dtype)
    projection.get_parameter("weight").copy_(torch.linalg.solve(moment, cross).T)
    return projection
