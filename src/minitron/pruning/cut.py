"""Slices a teacher's tensors down to what a student keeps, one tensor at a time."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from minitron.errors import UserError
from minitron.model.anatomy import Row
from minitron.model.arch import TIED, Arch
from minitron.model.checkpoint import Checkpoint
from minitron.model.config import student_config
from minitron.model.maps import apply_maps
from minitron.model.writing import write_checkpoint
from minitron.pruning.head_merge import MergedHeads, merge_partners
from minitron.pruning.rotate import Rotated, principal_basis, rotates
from minitron.pruning.scores import Importance
from minitron.pruning.selection import Kept, select
from minitron.pruning.statistics import STREAM_MOMENT
from minitron.recipe import PruneRecipe


@dataclass(frozen=True)
class Cut:
    """The teacher's tensors as a student has them; iterating yields them by name.

    `kept` holds the teacher's entries that the student keeps of each prunable axis, in the student's order. `tensor`
    reads a tensor of the teacher; each is read once. With a `basis` (hidden, size) of orthonormal columns the residual
    stream is rotated into it, and `kept["hidden"]` is not used. With `partners` query heads are merged
    (`head_merge.merge_partners`). A cut that `is_nested` has a basis of several sizes (`rotate.nested_basis`).
    """

    teacher: Arch
    student: Arch
    kept: Kept
    tensor: Callable[[str], Tensor]
    basis: Tensor | None = None
    partners: Tensor | None = None
    is_nested: bool = False

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the student's tensors by name: first those outside the layers, then layer after layer."""
        for row, expert in self._rows_of(None):
            yield row.tensor_name(expert=expert), self(row, None, expert)
        for new, number in enumerate(self.layers):
            for (row, expert), value in self.layer(number).items():
                yield row.tensor_name(new, expert), value

    @property
    def layers(self) -> list[int]:
        """The teacher's numbers of the kept layers."""
        return self.kept["layer"].tolist()

    def layer(self, number: int) -> dict[tuple[Row, int | None], Tensor]:
        """Return the student's tensors of a layer of the teacher, by row and the student's expert."""
        return {(row, expert): self(row, number, expert) for row, expert in self._rows_of(number)}

    def __call__(self, row: Row, layer: int | None, expert: int | None) -> Tensor:
        """Return the tensor of a row, of a layer numbered as in the teacher, and of an expert as in the student."""
        if expert is not None:
            expert = int(self.kept["expert"][layer][expert])
        value = self._slice(self._read(row.tensor_name(layer, expert)), row, layer, expert)
        if self.teacher.family.scales_embedding:
            value = self._with_embedding_scale(value, row)
        assert value.shape == row.shape(self.student.axis_size), (row.name, layer, expert, tuple(value.shape))
        return value

    def project(self, stream: Tensor) -> Tensor:
        """Return the teacher's residual stream (…, hidden) in the student's basis or channels (…, size)."""
        if self.basis is not None:
            return stream @ self.basis.to(stream)
        return stream[..., self.kept["hidden"].to(stream.device)] if "hidden" in self.kept else stream

    @cached_property
    def _read(self) -> Callable[[str], Tensor]:
        read = self.tensor
        if self.basis is not None:
            is_tied = self.student.flags.get(TIED, False)
            read = Rotated(self.teacher, self.basis, read, is_tied=is_tied, is_nested=self.is_nested)
        return read if self.partners is None else MergedHeads(self.teacher, self.partners, read)

    def _rows_of(self, number: int | None) -> Iterator[tuple[Row, int | None]]:
        """Yield the rows of a layer, or of what stands outside the layers, with the student's experts."""
        kind = None if number is None else self.teacher.layer_kind(number)
        for row in self.student.rows:
            if row.is_per_layer == (number is not None) and row.kind in {None, kind}:
                for expert in range(self.student.axis_size("expert")) if row.is_per_expert else [None]:
                    yield row, expert

    def _slice(self, value: Tensor, row: Row, layer: int | None, expert: int | None) -> Tensor:
        """Return a teacher's tensor with every axis sliced; experts stacked in one tensor are sliced one by one."""
        family = self.teacher.family
        maps = {
            axis: indices[layer] if axis in family.per_layer_axes else indices
            for axis, indices in self.kept.items()
            if axis in row.axes and (axis != "hidden" or self.basis is None)
        }
        per_expert = {axis: maps.pop(axis) for axis in family.per_expert_axes & maps.keys()}
        if not per_expert or expert is not None:
            maps |= {axis: indices[expert] for axis, indices in per_expert.items()}
            return apply_maps(value, row, maps, self.teacher.axis_size)
        one, experts = replace(row, dimensions=row.dimensions[1:]), maps.pop("expert").tolist()
        slices = []
        for number in experts:
            own = {axis: indices[number] for axis, indices in per_expert.items()}
            slices.append(apply_maps(value[number], one, maps | own, self.teacher.axis_size))
        return torch.stack(slices)

    def _with_embedding_scale(self, value: Tensor, row: Row) -> Tensor:
        """Scale embeddings that the model multiplies by √hidden_size, so that the product keeps the teacher's size.

        Where embeddings are the output matrix too, the final norm is divided by that factor.
        """
        teacher, family, scaled = self.teacher, self.teacher.family, value.float()
        gain = (teacher.axis_size("hidden") / self.student.axis_size("hidden")) ** 0.5
        if row == teacher.embedding:
            scaled = scaled * gain
        elif row.name == family.final_norm.weight_name() and teacher.flags[TIED]:
            scaled = (scaled + family.norm_offset) / gain - family.norm_offset
        return scaled.to(value.dtype)


def cut_to(
    student: Arch, teacher: Checkpoint, importance: Importance, recipe: PruneRecipe, *, kept: Kept | None = None
) -> Cut:
    """Return the cut of a teacher to a shape, with the basis where hidden is rotated.

    `kept` holds the kept entries of every axis, by default those that `selection.select` returns. Tensors are read when
    they are sliced; a tensor that holds NaN or infinity is a `UserError` then.

    Raises:
        UserError: the recipe asks for a rotation, and the family cannot have it or the importance holds no moment.
    """
    kept = select(importance, teacher.arch, student) if kept is None else kept
    basis = partners = None
    if _is_smaller(student, teacher.arch, "hidden") and rotates(teacher.arch, recipe):
        if STREAM_MOMENT not in importance:
            raise UserError("the importance was measured without the moment of the stream: calibrate with prune.rotate")
        basis = principal_basis(teacher.arch, student.axis_size("hidden"), importance[STREAM_MOMENT], teacher.tensor)
    if recipe.merge_heads and _is_smaller(student, teacher.arch, "query"):
        partners = merge_partners(importance, teacher.arch, kept)
    return Cut(teacher.arch, student, kept, teacher.checked_tensor, basis, partners)


def write_pruned(teacher: Checkpoint, cut: Cut, tensors: Iterable[tuple[str, Tensor]], folder: Path) -> None:
    """Write a pruned checkpoint into an empty folder, tensor by tensor, in the teacher's dtype.

    `tensors` are the cut itself, or the cut repaired (`repair.repaired`).
    """
    config = student_config(teacher, cut.student, cut.layers)
    write_checkpoint(folder, config, tensors, companions_from=teacher.folder)


def _is_smaller(student: Arch, teacher: Arch, axis: str) -> bool:
    return axis in student.axes and student.axis_size(axis) < teacher.axis_size(axis)
