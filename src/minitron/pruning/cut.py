"""Cut a teacher down to what is kept, tensor by tensor."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from minitron.errors import UserError
from minitron.model.anatomy import Row
from minitron.model.arch import TIED, Arch
from minitron.model.checkpoint import Checkpoint, student_config, write_checkpoint
from minitron.pruning.calibrate import STREAM_MOMENT
from minitron.pruning.importance import Importance, Kept, mirrored_heads, select
from minitron.pruning.maps import apply_maps
from minitron.pruning.rotate import Rotated, principal_basis, turns
from minitron.recipe import PruneRecipe


@dataclass(frozen=True)
class Cut:
    """The teacher's tensors as the student has them; `tensor` reads the teacher's, each asked for once.

    `kept` holds, for each prunable axis, the teacher's entries in the student's order (see `importance.Kept`).
    With a `basis` (hidden, size) the residual stream is turned into it instead, whatever `kept` says of hidden.
    `merged` are the dropped query heads that kept ones are merged with (`importance.mirrored_heads`): what makes
    the queries of a head becomes twice itself less that of the other.
    """

    teacher: Arch
    student: Arch
    kept: Kept
    tensor: Callable[[str], Tensor]
    basis: Tensor | None = None
    merged: Tensor | None = None

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        """The student's tensors by name, layer after layer, after those that stand outside the layers."""
        for row, _, expert in self._rows_of(None):
            yield row.tensor_name(expert=expert), self(row, None, expert)
        for new, number in enumerate(self.layers):
            for (row, expert), value in self.layer(number).items():
                yield row.tensor_name(new, expert), value

    @property
    def layers(self) -> list[int]:
        """The teacher's numbers of the layers that are kept."""
        return self.kept["layer"].tolist()

    def layer(self, number: int) -> dict[tuple[Row, int | None], Tensor]:
        """The tensors that the student keeps of a layer of the teacher, by row and the student's expert."""
        return {(row, expert): self(row, number, expert) for row, _, expert in self._rows_of(number)}

    def __call__(self, row: Row, layer: int | None, expert: int | None) -> Tensor:
        """The tensor of a row, of a layer numbered as in the teacher, and of an expert as in the student."""
        if expert is not None:
            expert = int(self.kept["expert"][layer][expert])
        value = self._cut(self._source(row.tensor_name(layer, expert)), row, layer, expert)
        if self.teacher.family.scales_embedding:
            value = self._with_the_scale_kept(value, row)
        assert value.shape == row.shape(self.student.axis_size), (row.name, layer, expert, tuple(value.shape))
        return value

    def project(self, stream: Tensor) -> Tensor:
        """The teacher's residual stream (…, hidden) as the student should have it."""
        if self.basis is not None:
            return stream @ self.basis.to(stream)
        return stream[..., self.kept["hidden"].to(stream.device)] if "hidden" in self.kept else stream

    @cached_property
    def _source(self) -> Callable[[str], Tensor]:
        if self.basis is None:
            return self.tensor
        return Rotated(self.teacher, self.basis, self.tensor, is_tied=self.student.flags.get(TIED, False))

    @cached_property
    def _maps(self) -> Kept:
        return {axis: indices for axis, indices in self.kept.items() if axis != "hidden" or self.basis is None}

    def _rows_of(self, number: int | None) -> Iterator[tuple[Row, int | None, int | None]]:
        for row in self.student.rows:
            kind_fits = number is None or row.kind is None or row.kind == self.teacher.layers[number]
            if row.is_per_layer == (number is not None) and kind_fits:
                for expert in range(self.student.axis_size("expert")) if row.is_per_expert else [None]:
                    yield row, number, expert

    def _cut(self, value: Tensor, row: Row, layer: int | None, expert: int | None) -> Tensor:
        """A tensor of the teacher with every axis cut; experts stacked in one tensor are cut one by one."""
        per_layer, per_expert = self.teacher.family.per_layer_axes, self.teacher.family.per_expert_axes
        maps = {
            axis: indices[layer] if axis in per_layer else indices
            for axis, indices in self._maps.items()
            if axis in row.axes
        }
        own = per_expert & maps.keys()
        if own and expert is None:
            one = replace(row, dimensions=row.dimensions[1:])
            experts = maps.pop("expert").tolist()
            return torch.stack(
                [apply_maps(value[e], one, {**maps, **{axis: maps[axis][e] for axis in own}}, self.teacher.axis_size)
                 for e in experts]
            )  # fmt: skip
        maps.update({axis: maps[axis][expert] for axis in own})
        selected = apply_maps(value, row, maps, self.teacher.axis_size)
        if self.merged is None or not self._makes_heads(row):
            return selected
        other = apply_maps(value, row, {**maps, "query": self.merged[layer]}, self.teacher.axis_size)
        return (2 * selected.float() - other.float()).to(value.dtype)

    def _makes_heads(self, row: Row) -> bool:
        is_reader = any(norm.is_read_by(row) for norm in self.teacher.family.norms)
        return "query" in row.axes and ("hidden" not in row.axes or is_reader)

    def _with_the_scale_kept(self, value: Tensor, row: Row) -> Tensor:
        """Embeddings multiplied by √hidden_size when they are read, so that they keep the size they had in the teacher.

        Where they are the output matrix too, the final norm takes back what they gained.
        """
        teacher, family, scaled = self.teacher, self.teacher.family, value.float()
        gain = (teacher.axis_size("hidden") / self.student.axis_size("hidden")) ** 0.5
        if row == teacher.embedding:
            scaled = scaled * gain
        elif row.name == f"{family.norms[-1].name}.weight" and teacher.flags[TIED]:
            scaled = (scaled + family.norm_offset) / gain - family.norm_offset
        return scaled.to(value.dtype)


def cut_to(student: Arch, teacher: Checkpoint, importance: Importance, recipe: PruneRecipe) -> Cut:
    """How the teacher is cut to a shape: what is kept of every axis, and the basis where hidden is turned.

    Raises:
        UserError: the recipe asks for a rotation that the family or the importance cannot give.
    """
    kept, basis = select(importance, teacher.arch, student), None
    size = student.axis_size("hidden")
    if size < teacher.arch.axis_size("hidden") and turns(teacher.arch, recipe):
        if STREAM_MOMENT not in importance:
            raise UserError("the importance was measured without the moment of the stream: calibrate with prune.rotate")
        basis = principal_basis(teacher.arch, size, importance[STREAM_MOMENT], teacher.tensor)
    merges = (
        recipe.merge_heads and "query" in student.axes and student.axis_size("query") < teacher.arch.axis_size("query")
    )
    merged = mirrored_heads(importance, teacher.arch, kept) if merges else None
    return Cut(teacher.arch, student, kept, teacher.tensor, basis, merged)


def write_pruned(
    teacher: Checkpoint, cut: Cut, tensors: Callable[[Cut], Iterator[tuple[str, Tensor]]], folder: Path
) -> None:
    """Stream the pruned checkpoint into an empty folder, in the teacher's dtype; `tensors` makes them of the cut.

    Raises:
        UserError: a tensor of the teacher holds NaN or infinity.
    """
    config = student_config(teacher, cut.student, cut.layers)
    write_checkpoint(
        folder, config, tensors(replace(cut, tensor=teacher.checked_tensor)), companions_from=teacher.folder
    )
