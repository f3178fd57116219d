"""The loss of a training step: teacher outputs, labels and intermediate places, accumulated over micro-batches."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor

from minitron.data.blocks import Blocks
from minitron.distillation.fused import Labels, LossOptions, TeacherOutputs, TopTokens, logit_losses
from minitron.distillation.intermediate import Intermediate, dynamic_weights
from minitron.distillation.losses import UNSCALED, Comparison, comparison_of
from minitron.distillation.teacher import Learning, Teacher
from minitron.evaluation.perplexity import next_token_nll
from minitron.model.language_model import Head, Headless, Readout
from minitron.recipe import DistillRecipe
from minitron.runtime import Runtime


@dataclass(frozen=True)
class Objective:
    """What a student minimises: the distance to a teacher's outputs, or without a teacher the text's cross-entropy."""

    teacher: Teacher | None
    recipe: DistillRecipe
    runtime: Runtime
    intermediate: Intermediate | None = None
    """Places within both models that are compared in addition to the logits."""

    def accumulate(self, student: Headless, blocks: Blocks, numbers: Tensor) -> Tensor:
        """Add one step's gradient to the student's, from this rank's share of the step's blocks, by `numbers` (B,).

        The gradient is that of the loss of the logits plus the weighted intermediate loss. A teacher that learns as
        well receives the gradient of its own cross-entropy.

        Returns this rank's part of four losses, (4,): the whole loss, the intermediate loss, what that adds to the
        whole, and the teacher's. The parts of all ranks add up to the mean over the step's tokens.
        """
        device, world = next(student.parameters()).device, self.runtime.world
        losses = torch.zeros(4, dtype=torch.float64, device=device)
        # The one place where losses are normalised: by the tokens of the whole step, on all ranks.
        counts = max(1, int(blocks.teaches.sum())), max(1, int((blocks.targets >= 0).sum()))
        mine = torch.arange(len(blocks)).chunk(world.size)[world.rank]
        with self.runtime.training():
            for part in mine.split(self.recipe.micro_batch_size):
                losses += self._micro_batch(student, blocks[part], numbers[part], counts)
        return losses

    def _micro_batch(self, student: Headless, block: Blocks, numbers: Tensor, counts: tuple[int, int]) -> Tensor:
        device, world, num_labels = next(student.parameters()).device, self.runtime.world, counts[1]
        losses = torch.zeros(4, dtype=torch.float64, device=device)
        ids, targets = block.ids.to(device), block.targets.to(device)
        positions = None if block.positions is None else block.positions.to(device)
        is_learnt = None if block.is_learnt is None else block.teaches.to(device)
        teacher_loss: Tensor | None = None
        with self.intermediate.watching() if self.intermediate else nullcontext():
            readout: Readout
            outputs: TeacherOutputs
            if self.teacher is None:
                readout = partial(_cross_entropy, targets=targets, num_labels=num_labels)
            else:
                if isinstance(self.teacher, Learning):
                    with self.runtime.autocast():
                        outputs, teacher_loss = self.teacher.learn(ids, positions, targets)
                else:
                    outputs = self.teacher(ids, numbers, positions)
                readout = self._readout(outputs, targets, is_learnt, counts)
            with self.runtime.autocast():
                computed = student(ids, readout, positions).view(-1)
        (computed[0] * world.size).backward()  # FSDP averages gradients over ranks; the loss is a sum already
        losses[: len(computed)] += computed.detach().double()
        if teacher_loss is not None:  # after the student's, which reads the teacher's output matrix as gathered
            teacher_loss = teacher_loss / num_labels
            (teacher_loss * world.size).backward()
            losses[3] += teacher_loss.detach()
        return losses

    def _readout(
        self, outputs: TeacherOutputs, targets: Tensor, is_learnt: Tensor | None, counts: tuple[int, int]
    ) -> Readout:
        """Return the readout that compares student and teacher; its result is the loss, or see `_with_intermediate`."""
        recipe, dtype = self.recipe, self.runtime.dtype
        on_cuda = targets.device.type == "cuda"
        options = LossOptions(
            temperature=recipe.temperature,
            scales=recipe.loss not in UNSCALED,
            labels=Labels(targets, recipe.label_weight, counts[1]) if recipe.label_weight else None,
            operands=dtype if on_cuda and dtype == torch.bfloat16 else None,
        )
        comparison = _comparison(recipe.loss, recipe.beta, recipe.top_k, isinstance(outputs, TopTokens), recipe.compile)
        compared = partial(
            _logit_loss,
            teacher=outputs,
            is_learnt=is_learnt,
            comparison=comparison,
            num_tokens=counts[0],
            options=options,
        )
        if not self.intermediate:
            return lambda hidden, head: compared(hidden, head)[0]
        between = partial(self.intermediate.losses, is_learnt, counts[0])
        return partial(_with_intermediate, compared=compared, between=between, weight=recipe.intermediate.weight)


def _with_intermediate(
    hidden: Tensor,
    head: Head,
    *,
    compared: Callable[[Tensor, Head], tuple[Tensor, Tensor]],
    between: Callable[[], Tensor],
    weight: float | None,
) -> Tensor:
    """Return the whole loss, the intermediate loss and what it adds, (3,).

    This runs inside `forward`, where FSDP gathers the projection's parameters.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        loss, of_logits = compared(hidden, head)
        intermediate = between()
        weights = dynamic_weights(of_logits, intermediate) if weight is None else weight
        added = (weights * intermediate).sum()
        return torch.stack([loss + added, intermediate.sum(), added])


@cache
def _comparison(kind: str, beta: float, top_k: int | None, of_classes: bool, is_compiled: bool) -> Comparison:
    comparison = comparison_of(kind, beta, top_k, of_classes)
    return torch.compile(comparison) if is_compiled else comparison


def _cross_entropy(hidden: Tensor, head: Head, targets: Tensor, num_labels: int) -> Tensor:
    return next_token_nll(hidden, head, targets) / num_labels


def _logit_loss(
    hidden: Tensor,
    head: Head,
    teacher: TeacherOutputs,
    is_learnt: Tensor | None,
    *,
    options: LossOptions,
    **rest: object,
) -> tuple[Tensor, Tensor]:
    """Return the loss, and each block's part of it without labels, (B,).

    Compared are only the positions whose next token is to be learnt, (B, T); None: all positions.
    """
    positions = hidden.shape[:2]
    if is_learnt is not None:
        hidden, teacher = hidden[is_learnt], teacher.at(is_learnt)
        if options.labels is not None:
            options = replace(options, labels=replace(options.labels, tokens=options.labels.tokens[is_learnt]))
    with torch.autocast(hidden.device.type, enabled=False):
        loss, each = logit_losses(hidden, head, teacher, options=options, **rest)  # type: ignore[arg-type]
    if is_learnt is not None:
        each = each.new_zeros(positions).masked_scatter(is_learnt, each)
    return loss, each.sum(dim=-1)
