"""Cut a teacher down to the kept entries, tensor by tensor, from disk or from memory."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from minitron.errors import UserError
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint, expected_shapes, student_config, write_checkpoint
from minitron.progress import Progress
from minitron.prune.importance import Kept
from minitron.prune.maps import apply_maps


def trimmed(teacher: Arch, student: Arch, kept: Kept, tensor: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The student's tensors by name; `tensor` gives the teacher's, each asked for once.

    `kept` holds, for each prunable axis, the teacher's entries in the student's order (see `importance.Kept`).
    """
    family, layers = teacher.family, kept["layer"].tolist()
    for name, shape in expected_shapes(student):
        found = family.match(name)
        assert found is not None, name
        row, student_layer = found
        layer = None if student_layer is None else layers[student_layer]
        maps = {
            axis: indices if axis not in family.per_layer_axes else indices[layer]
            for axis, indices in kept.items()
            if axis in row.axes
        }
        value = apply_maps(tensor(row.name.replace("{i}", str(layer))), row, maps, teacher.axis_size)
        assert tuple(value.shape) == shape, (name, tuple(value.shape), shape)
        yield name, value


def write_trimmed(teacher: Checkpoint, student: Arch, kept: Kept, folder: Path) -> None:
    """Stream the pruned checkpoint into an empty folder, in the teacher's dtype.

    Raises:
        UserError: a tensor of the teacher holds NaN or infinity.
    """

    def tensor(name: str) -> Tensor:
        value = teacher.tensor(name)
        if not torch.isfinite(value).all():
            raise UserError(f"{teacher.tensors[name]}: tensor {name} holds NaN or infinity")
        return value

    config = student_config(teacher, student, kept["layer"].tolist())
    with Progress("prune", student.num_parameters, "parameters") as progress:

        def counted() -> Iterator[tuple[str, Tensor]]:
            for name, value in trimmed(teacher.arch, student, kept, tensor):
                yield name, value
                progress.advance(value.numel())

        write_checkpoint(folder, config, counted(), companions_from=teacher.folder)
