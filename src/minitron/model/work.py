"""The arithmetic of training: floating-point operations of forward and backward passes, from shapes alone.

A multiplication and an addition count as two operations. Counted are the products with matrices and within attention,
over all pairs of tokens as the papers do it, although causal kernels skip half of them; lookups, norms and
nonlinearities are left out. A backward pass takes twice the operations of a forward pass.
"""

from dataclasses import dataclass

from minitron.model.anatomy import AXES
from minitron.model.arch import Arch
from minitron.model.memory import head_channels
from minitron.recipe import DistillRecipe

BACKWARD = 2
"""Operations of a backward pass over those of a forward pass: gradients of inputs, and of weights."""
OPERATIONS_PER_STATE = 5
"""Operations per entry of a Mamba state and token: decay, multiply and add the input, multiply and add into the
output."""


@dataclass(frozen=True)
class Work:
    """Floating-point operations of one training step."""

    student: float
    """Forward and backward passes of the student: what the papers count."""
    recomputation: float = 0.0
    """Forward passes of the student's layers that activation checkpointing takes again."""
    teacher: float = 0.0
    """Forward passes of the teacher, and its backward passes where it learns while it teaches."""

    @property
    def total(self) -> float:
        """All operations of a step."""
        return self.student + self.recomputation + self.teacher


def forward_flops(arch: Arch, context: int, windows: list[int] | None = None) -> float:
    """Return the operations per token of a forward pass over blocks of `context` tokens.

    2 × (active parameters without embeddings + vocabulary × hidden) + 4 × query heads × head_dim × context for each
    layer with attention (Narayanan et al., arXiv 2104.04473, appendix A, without its factors for the backward pass).
    `windows` holds the windows, in tokens, of the layers that have one; see `model.memory.memory`.
    """
    in_matrices = arch.count_grid({}, without="vocab", active=True) + arch.axis_size("vocab") * arch.axis_size("hidden")
    in_attention: float = 0
    if num_layers := layers_along(arch, "query"):
        sliding = [min(context, window) for window in windows or []][:num_layers]
        reached = sum(sliding) + (num_layers - len(sliding)) * context
        in_attention = 2 * arch.axis_size("query") * head_channels(arch, arch.axis_size) * reached
    in_states: float = 0
    if num_layers := layers_along(arch, "mhead"):
        entries = arch.axis_size("mhead") * arch.axis_size("mchan") * arch.axis_size("state")
        in_states = OPERATIONS_PER_STATE * entries * num_layers
    return float(2 * in_matrices + in_attention + in_states)


def training_flops(arch: Arch, context: int, windows: list[int] | None = None) -> float:
    """Return the operations per token of a forward and a backward pass."""
    return (1 + BACKWARD) * forward_flops(arch, context, windows)


def step_work(
    student: Arch, teacher: Arch | None, recipe: DistillRecipe, context: int, windows: list[int] | None = None
) -> Work:
    """Return the operations of one step of a training; without a teacher the model learns the text itself.

    A teacher runs forward, and backward where it learns while it teaches; stored outputs take no operations.
    """
    tokens, passes = recipe.batch_size * context, 1 if recipe.correction.trains == "nothing" else 1 + BACKWARD
    if teacher is None or recipe.teacher_states is not None:
        passes = 0
    forward = forward_flops(student, context, windows)
    return Work(
        student=training_flops(student, context, windows) * tokens,
        recomputation=forward * tokens if recipe.activation_checkpointing else 0.0,
        teacher=passes * forward_flops(teacher, context, windows) * tokens if teacher else 0.0,
    )


def layers_along(arch: Arch, axis: str) -> int:
    """Return the number of layers that have tensors along an axis."""
    kinds = {row.kind for row in arch.rows if row.is_per_layer and axis in row.axes}
    if None in kinds:
        return arch.axis_size("layer")
    return sum(arch.layer_counts[kind] for kind in kinds if kind)


def size_of(arch: Arch, axis: str) -> int:
    """Return the number of entries of an axis, 0 where the model has no such axis."""
    return arch.sizes.get(AXES[axis], 0)
