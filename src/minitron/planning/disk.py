"""The disk space of a stage: the models that it leaves, and what it needs while it is under way."""

from minitron.model.arch import Arch
from minitron.model.memory import DTYPE_BYTES
from minitron.planning.layers import FLOAT32
from minitron.planning.memory import moment_bytes, trained_parameters
from minitron.recipe import DistillRecipe
from minitron.stages import Kind


def disk_space(
    kind: Kind, student: Arch, teacher: Arch, recipe: DistillRecipe, context: int, dtype: str
) -> dict[str, float]:
    """Return bytes by what they hold; `dtype` is that of the teacher's files, which the student's files have as well.

    A checkpoint holds the weights that are trained and two moments; the next one is written before it is removed. Both
    are removed once the student is there, as are the teacher outputs of a series, but not those in a folder of the
    recipe's own.
    """
    width, trained = DTYPE_BYTES.get(dtype, FLOAT32), trained_parameters(student, recipe)
    space: dict[str, float] = {"student": width * student.num_parameters}
    if kind == "cut":
        space["pruned model"] = width * student.num_parameters
    space["two checkpoints"] = 2 * (FLOAT32 * trained + moment_bytes(trained, recipe))
    if recipe.teacher_states is not None:
        num_tokens = recipe.tokens // context * context
        space["teacher outputs"] = num_tokens * recipe.stored_bytes(teacher.axis_size("hidden"))
    return space
