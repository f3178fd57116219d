"""Repairs a cut model before training, so that it starts nearer to its teacher; free at inference, stock on disk.

Teacher and student are run side by side, layer after layer, over the calibration blocks:

- **norm rescale**: a norm over fewer channels divides by another root mean square than a norm over all channels. Let e²
  be the share of the stream's energy that the student's channels carry at the norm, mean over tokens, d the teacher's
  hidden size and k the student's; the norm's weight times e·√(d/k) restores the scale.
- **refit**: each tensor W that writes the stream is corrected by least squares, one after the other, on the inputs X
  that it gets in the student as repaired so far: W + Δ, Δ = E Xᵀ (X Xᵀ + λI)⁻¹, where E is the difference between the
  teacher's stream and the student's after the tensor has written. So each tensor makes up for what was cut from its own
  input and for what all tensors before it could not; the last one before removed layers makes up for these. λ is
  `ridge` times the mean of X Xᵀ's diagonal times the number of inputs divided by the number of tokens: where tokens are
  few Δ stays small, and does not fit the noise of the calibration text.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from minitron.data.blocks import Blocks
from minitron.data.stream import Stream
from minitron.errors import UserError
from minitron.model.anatomy import Row
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint
from minitron.progress import Progress
from minitron.pruning.cut import Cut
from minitron.pruning.layers import Layer, Layers
from minitron.pruning.writers import ExpertWriters, Tensors, Writer, correction, writers_of
from minitron.recipe import PruneRecipe
from minitron.runtime import Runtime

RESCALE_TOKENS = 1_024
"""Calibration tokens on which norms are rescaled where nothing is refitted: a mean over tokens needs no more."""


@torch.no_grad()
def repaired(
    teacher: Checkpoint, cut: Cut, *, blocks: Blocks, recipe: PruneRecipe, runtime: Runtime
) -> Iterator[tuple[str, Tensor]]:
    """Yield a student's tensors by name, with the repairs that the recipe asks for, fitted on blocks.

    Norms alone are rescaled on the first `RESCALE_TOKENS`. At most one layer of each model is in memory, and the
    residual streams of both.

    Raises:
        UserError: there are fewer calibration tokens than a refitted tensor has inputs, or activations are NaN.
    """
    has_rescaled = rescales(cut.teacher, cut.student, recipe)
    if not has_rescaled and not recipe.refit:
        with Progress("prune", cut.student.num_parameters, "parameters") as progress:
            for name, value in cut:
                yield name, value
                progress.advance(value.numel())
        return
    require_tokens(cut.teacher, cut.student, recipe, blocks.num_tokens)
    if not recipe.refit:
        blocks = blocks[: max(1, RESCALE_TOKENS // blocks.context)]
    recipe = recipe.model_copy(update={"rescale_norms": has_rescaled})
    walk, depth = _Walk(teacher, cut, blocks, recipe, runtime), cut.teacher.axis_size("layer")
    final_norm = cut.teacher.family.final_norm.weight_name()
    for row in cut.student.rows:
        if not row.is_per_layer and row.name != final_norm:
            yield row.name, cut(row, None, None)
    with Progress("repair", depth * blocks.num_tokens, "tokens × layers") as progress:
        for new, number in enumerate(cut.layers):
            progress.note(f"layer {number + 1} of {depth}")
            for (row, expert), value in walk.layer(number, progress).items():
                yield row.tensor_name(new, expert), value
    for row in cut.student.rows:
        if row.name == final_norm:
            value = cut(row, None, None)
            if has_rescaled:
                value = walk.rescaled(value, [walk.share(stream) for stream in walk.teacher])
            yield row.name, value


def widest_input(teacher: Arch, student: Arch) -> int:
    """Return the most inputs that a refitted tensor has: a refit needs at least as many tokens."""
    kinds = dict.fromkeys(teacher.layers) if teacher.layers else [None]
    return max(
        (
            writer.row.shape(student.axis_size)[writer.dim]
            for kind in kinds
            for writer in writers_of(teacher, teacher.layer_numbers(kind)[0])
        ),
        default=0,
    )


def require_tokens(teacher: Arch, student: Arch, recipe: PruneRecipe, num_tokens: int) -> None:
    """Check that there are enough calibration tokens to repair a student as a recipe says.

    Raises:
        UserError: a tensor that is refitted has more inputs than there are tokens.
    """
    if recipe.refit and num_tokens < (widest := widest_input(teacher, student)):
        raise UserError(f"a refit of {widest} inputs needs at least as many calibration tokens; there are {num_tokens}")


def rescales(teacher: Arch, student: Arch, recipe: PruneRecipe) -> bool:
    """Return whether norms are rescaled: as the recipe has it, where hidden is cut."""
    return recipe.rescale_norms and _is_narrower(teacher, student)


def _is_narrower(teacher: Arch, student: Arch) -> bool:
    return student.axis_size("hidden") < teacher.axis_size("hidden")


class _Walk:
    """The streams of teacher and student after the layers that are repaired so far."""

    def __init__(self, checkpoint: Checkpoint, cut: Cut, blocks: Blocks, recipe: PruneRecipe, runtime: Runtime) -> None:
        self.cut, self.blocks, self.recipe, self.runtime = cut, blocks, recipe, runtime
        self.current: Tensors = {}
        """The student's tensors of the layer that is being repaired."""
        self.teacher_layers = Layers.of(checkpoint, runtime)
        self.student_layers = Layers(checkpoint, cut.student, self._student_tensor, runtime)
        self.teacher = self.teacher_layers.embedded(blocks)
        if recipe.refit:
            self.current = cut.layer(cut.layers[0])
            self.student = self.student_layers.embedded(blocks)
        self.num_passed = 0
        """The number of layers that the teacher's stream has passed."""

    def layer(self, number: int, progress: Progress) -> Tensors:
        """Move both streams past a kept layer of the teacher and past the removed layers after it; return the repaired
        tensors of the layer.
        """
        self._pass_removed(number, progress)
        self.current = self.cut.layer(number)
        writers = writers_of(self.cut.teacher, number) if self.recipe.refit else []
        experts = ExpertWriters.of(self.cut, self.current, number) if self.recipe.refit else None
        targets, shares = self._pass_kept(number, writers, experts, progress)
        for row, expert in self.current:
            if row.name in shares:
                self.current[row, expert] = self.rescaled(self.current[row, expert], shares[row.name])
        if experts:
            self.current.update(experts.fitted(self.recipe.ridge))
        if self.recipe.refit:
            following = [n for n in self.cut.layers if n > number]
            self._pass_removed(following[0] if following else self.cut.teacher.axis_size("layer"), progress)
            self._refit(number, writers, [*targets, self.teacher])
        return self.current

    def share(self, stream: Tensor) -> Tensor:
        """Return the share of each token's energy that the student's channels carry, (tokens,)."""
        stream = stream.to(self.runtime.device).flatten(0, -2).float()
        if self.cut.teacher.family.is_centred:
            stream = stream - stream.mean(dim=-1, keepdim=True)
        return self.cut.project(stream).square().sum(dim=-1) / stream.square().sum(dim=-1).clamp_min(1e-12)

    def rescaled(self, weight: Tensor, shares: list[Tensor]) -> Tensor:
        """Return a norm's weight (hidden,) times e·√(d/k)."""
        kept = self.cut.student.axis_size("hidden") / self.cut.teacher.axis_size("hidden")
        offset, scale = self.cut.teacher.family.norm_offset, float((torch.cat(shares).mean() / kept).sqrt())
        return ((weight.double() + offset) * scale - offset).to(weight.dtype)

    def _pass_removed(self, number: int, progress: Progress) -> None:
        """Move the teacher's stream up to a layer."""
        for removed in range(self.num_passed, number):
            layer = self.teacher_layers.load(removed)
            for i in range(len(self.blocks)):
                self.teacher[i] = layer(self.teacher[i].to(self.runtime.device))
                progress.advance(self.blocks.context)
        self.num_passed = max(self.num_passed, number)

    def _pass_kept(
        self, number: int, writers: list[Writer], experts: ExpertWriters | None, progress: Progress
    ) -> tuple[list[Stream], dict[str, list[Tensor]]]:
        """Move the teacher's stream past a kept layer.

        Returns the targets of all writers but the last of a layer, as the student should have them, and by the name of
        each norm's weight the energy shares of its tokens. What enters the experts is added to `experts`.
        """
        layer, shares = self.teacher_layers.load(number), dict[str, list[Tensor]]()
        points = [writer.point(layer) for writer in writers if not writer.is_last]
        targets = [self._new_stream() for _ in points]
        for i in range(len(self.blocks)):
            with ExitStack() as hooks:
                if self.recipe.rescale_norms:
                    self._read_shares(layer, shares, hooks)
                if experts:
                    hooks.callback(experts.watch(layer).remove)
                output, activations = layer.watched(self.teacher[i].to(self.runtime.device), points)
            self.teacher[i] = output
            for target, value in zip(targets, activations, strict=True):
                target[i] = self.cut.project(value)
            progress.advance(self.blocks.context)
        self.num_passed = number + 1
        return targets, shares

    def _read_shares(self, layer: Layer, shares: dict[str, list[Tensor]], hooks: ExitStack) -> None:
        for norm in self.cut.teacher.family.layer_norms:
            module, of_norm = layer.module_of(norm), shares.setdefault(norm.weight_name(), [])
            handle = module.register_forward_pre_hook(
                lambda _, inputs, of_norm=of_norm: of_norm.append(self.share(inputs[0]))
            )
            hooks.callback(handle.remove)

    def _refit(self, number: int, writers: list[Writer], targets: list[Stream]) -> None:
        """Correct the writers of a layer in turn, each towards its target, and move the student's stream past it."""
        student = self.student_layers.load(number)
        for writer, target in zip(writers, targets, strict=False):  # the last one's is the teacher's stream itself
            weight = self.current[writer.row, None]
            width, size = weight.shape[writer.dim], self.cut.student.axis_size("hidden")
            moment, cross = (torch.zeros(width, n, device=self.runtime.device) for n in (width, size))
            inputs_point = student.module_of(writer.row), "input"
            for i in range(len(self.blocks)):
                stream, wanted = self.student[i].to(self.runtime.device), target[i].to(self.runtime.device)
                if writer.is_last:
                    output, [inputs] = student.watched(stream, [inputs_point])
                    wanted = self.cut.project(wanted)
                else:
                    inputs, output = student.within(stream, [inputs_point, writer.point(student)])
                x = inputs.flatten(0, -2).float()
                moment.addmm_(x.T, x)
                cross.addmm_(x.T, (wanted.float() - output.float()).flatten(0, -2))
            change = correction(moment, cross, self.recipe.ridge, self.blocks.num_tokens).movedim(-1, writer.dim)
            self.current[writer.row, None] = corrected = (weight.float() + change.cpu()).to(weight.dtype)
            module: Any = student.module_of(writer.row)
            module.weight.copy_(corrected)
        for i in range(len(self.blocks)):
            self.student[i] = student(self.student[i].to(self.runtime.device))

    def _student_tensor(self, row: Row, layer: int | None, expert: int | None) -> Tensor:
        if layer is None:
            return self.cut(row, None, expert)
        return self.current[row, expert] if (row, expert) in self.current else self.cut(row, layer, expert)

    def _new_stream(self) -> Stream:
        return Stream(self.blocks, self.cut.student.axis_size("hidden"), self.runtime.dtype)
