"""Cut a teacher down to the kept entries, tensor by tensor."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from minitron.errors import UserError
from minitron.model.anatomy import Row
from minitron.model.arch import TIED, Arch
from minitron.model.checkpoint import Checkpoint, student_config, write_checkpoint
from minitron.progress import Progress
from minitron.prune.importance import Kept
from minitron.prune.maps import apply_maps
from minitron.prune.repair import NO_REPAIRS, Repairs


def trimmed(teacher: Arch, student: Arch, kept: Kept, tensor: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The student's tensors by name; `tensor` gives the teacher's, each asked for once.

    `kept` holds, for each prunable axis, the teacher's entries in the student's order (see `importance.Kept`).
    """
    student = student.with_layers(teacher, kept["layer"].tolist())
    for row, layer, expert in student.places():
        name = row.tensor_name(layer, expert)
        if layer is not None:
            layer = int(kept["layer"][layer])
        if expert is not None:
            expert = int(kept["expert"][layer][expert])
        value = _cut(tensor(row.tensor_name(layer, expert)), row, layer, expert, kept, teacher)
        if teacher.family.scales_embedding:
            value = _with_the_scale_kept(value, row, teacher, student)
        assert value.shape == row.shape(student.axis_size), (name, tuple(value.shape))
        yield name, value


def _cut(value: Tensor, row: Row, layer: int | None, expert: int | None, kept: Kept, teacher: Arch) -> Tensor:
    """A tensor of the teacher with every axis cut; experts stacked in one tensor are cut one by one."""
    per_layer, per_expert = teacher.family.per_layer_axes, teacher.family.per_expert_axes
    maps = {
        axis: indices[layer] if axis in per_layer else indices for axis, indices in kept.items() if axis in row.axes
    }
    own = per_expert & maps.keys()
    if own and expert is None:
        one = replace(row, dimensions=row.dimensions[1:])
        experts = maps.pop("expert").tolist()
        return torch.stack(
            [apply_maps(value[e], one, {**maps, **{axis: maps[axis][e] for axis in own}}, teacher.axis_size)
             for e in experts]
        )  # fmt: skip
    maps.update({axis: maps[axis][expert] for axis in own})
    return apply_maps(value, row, maps, teacher.axis_size)


def _with_the_scale_kept(value: Tensor, row: Row, teacher: Arch, student: Arch) -> Tensor:
    """Embeddings multiplied by √hidden_size when they are read, so that they keep the size they had in the teacher.

    Where they are the output matrix too, the final norm takes back what they gained.
    """
    gain = (teacher.axis_size("hidden") / student.axis_size("hidden")) ** 0.5
    family, scaled = teacher.family, value.float()
    if row == teacher.embedding:
        scaled = scaled * gain
    elif row.name == f"{family.norms[-1].name}.weight" and teacher.flags[TIED]:
        scaled = (scaled + family.norm_offset) / gain - family.norm_offset
    return scaled.to(value.dtype)


def write_trimmed(teacher: Checkpoint, student: Arch, kept: Kept, folder: Path, repairs: Repairs = NO_REPAIRS) -> None:
    """Stream the pruned checkpoint into an empty folder, mended by the repairs, in the teacher's dtype.

    Raises:
        UserError: a tensor of the teacher holds NaN or infinity.
    """

    def tensor(name: str) -> Tensor:
        value = teacher.tensor(name)
        if not torch.isfinite(value).all():
            raise UserError(f"{teacher.tensors[name]}: tensor {name} holds NaN or infinity")
        return repairs.mend(name, value)

    config = student_config(teacher, student, kept["layer"].tolist())
    with Progress("prune", student.num_parameters, "parameters") as progress:

        def counted() -> Iterator[tuple[str, Tensor]]:
            for name, value in trimmed(teacher.arch, student, kept, tensor):
                yield name, value
                progress.advance(value.numel())

        write_checkpoint(folder, config, counted(), companions_from=teacher.folder)
