"""Fuses distillation losses with the output projections: logits exist for some tokens at a time, never for all."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from minitron.distillation.losses import Comparison
from minitron.model.language_model import Head, soft_capped
from minitron.model.memory import FEWEST_TOKENS, ROWS_BYTES, tokens_at_once


@dataclass(frozen=True)
class States:
    """Teacher outputs as last hidden states (…, hidden) and the head that makes logits of them."""

    hidden: Tensor
    head: Head

    @property
    def vocab(self) -> int:
        """The number of tokens in the vocabulary."""
        return len(self.head.weight)

    def at(self, positions: Tensor) -> "States":
        """Select positions by a mask."""
        return States(self.hidden[positions], self.head)

    def prepared(self, vocab: int, _: torch.dtype, operands: torch.dtype) -> "States":
        """Restrict the head to the first `vocab` tokens, and flatten positions into one dimension."""
        return States(self.hidden.flatten(0, -2), Head(self.head.weight[:vocab].to(operands), self.head.softcap))

    def rows(self, part: slice, temperature: float, buffer: Tensor | None = None) -> Callable[[slice], Tensor]:
        """Compute the logits of some positions; return a function that yields each (n, vocab) of them once."""
        logits = _product(self.hidden[part], self.head.weight.T, buffer)
        return lambda rows: _divide_(soft_capped(logits[rows], self.head.softcap, in_place=True), temperature)


@dataclass(frozen=True)
class TopTokens:
    """Teacher outputs as the k likeliest tokens (…, k) and logits (…, k + 1), the last one of all other tokens.

    See `losses.classes_of`. The logits are already divided by the temperature of the loss.
    """

    indices: Tensor
    classes: Tensor
    vocab: int

    def at(self, positions: Tensor) -> "TopTokens":
        """Select positions by a mask."""
        return TopTokens(self.indices[positions], self.classes[positions], self.vocab)

    def prepared(self, vocab: int, dtype: torch.dtype, _: torch.dtype) -> "TopTokens":
        """Flatten positions into one dimension.

        Raises:
            ValueError: the student has fewer tokens than the teacher.
        """
        if vocab < self.vocab:
            raise ValueError(f"the student has {vocab} tokens, the teacher's classes are of {self.vocab}")
        return TopTokens(self.indices.flatten(0, -2).long(), self.classes.flatten(0, -2).to(dtype), vocab)

    def rows(self, part: slice, _: float, __: Tensor | None = None) -> Callable[[slice], tuple[Tensor, Tensor]]:
        """Return a function that yields indices (n, k) and classes (n, k + 1) of some positions."""
        indices, classes = self.indices[part], self.classes[part]
        return lambda rows: (indices[rows], classes[rows].clone())


TeacherOutputs = States | TopTokens


@dataclass(frozen=True)
class Labels:
    """The text's own next tokens, whose cross-entropy is added to a comparison of logits."""

    tokens: Tensor
    """(…), the next tokens, −100 where there is none."""
    weight: float
    num_labels: int = 1
    """What the sum of the cross-entropy is divided by."""


@dataclass(frozen=True)
class LossOptions:
    """What `logit_loss` can vary."""

    temperature: float = 1.0
    """τ, by which logits are divided."""
    scales: bool = True
    """Whether the comparison is multiplied by τ², which keeps the size of its gradients (Hinton et al., arXiv
    1503.02531, section 2)."""
    labels: Labels | None = None
    operands: torch.dtype | None = None
    """bfloat16 to round the operands of matrix products, as autocast does in the layers. Products are summed in
    float32, so that logits are never rounded themselves."""
    chunk_tokens: int | None = None
    """Tokens whose logits are held at a time; by default see `tokens_at_once`. It changes the result by rounding
    only."""


def logit_loss(
    student: Tensor,
    head: Head,
    teacher: TeacherOutputs,
    comparison: Comparison,
    num_tokens: int,
    options: LossOptions | None = None,
) -> Tensor:
    """Return `τ²/num_tokens · Σ_tokens comparison + weight/num_labels · Σ_labels cross-entropy`, a scalar.

    The comparison is of logits divided by τ; τ² is left out where the options do not scale. The counts are those over
    all ranks and accumulation steps, so that the parts of a batch add up. Where one of two vocabularies is padded to be
    longer, the tokens that both have are compared.

    Args:
        student: (…, student hidden) last hidden states; the gradient flows into them.
        head: the student's head, (vocab, student hidden); the gradient flows into its weight.
        teacher: the teacher's outputs on the same tokens.
        comparison: see `losses`; it receives float32 logits, or float64 where the student's states are float64.
        num_tokens: the number by which the sum of the comparison is divided.
        options: temperature, labels, and how the products are computed.

    Forward and gradients never hold tokens × vocabulary: gradients are formed chunk by chunk in the forward pass and
    kept at the size of the inputs. The result can be differentiated once.
    """
    return logit_losses(student, head, teacher, comparison, num_tokens, options)[0]


def logit_losses(
    student: Tensor,
    head: Head,
    teacher: TeacherOutputs,
    comparison: Comparison,
    num_tokens: int,
    options: LossOptions | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what `logit_loss` returns, and each token's part of it without labels, (…).

    No gradient flows through the parts.
    """
    options = options or LossOptions()
    if options.chunk_tokens is None:
        num_states = student.shape[:-1].numel()
        chunk_tokens = tokens_at_once(num_states, head.weight.shape[0], student.device.type)
        options = replace(options, chunk_tokens=chunk_tokens)
    if options.labels is not None:
        options = replace(options, labels=replace(options.labels, tokens=options.labels.tokens.flatten()))
    task = _Task(teacher, comparison, num_tokens, options, head.softcap)
    total, each = _LogitLoss.apply(student.flatten(0, -2), head.weight, task)
    return total, each.view(student.shape[:-1])


@dataclass(frozen=True)
class _Task:
    """All inputs of a loss that no gradient flows into."""

    teacher: TeacherOutputs
    comparison: Comparison
    num_tokens: int
    options: LossOptions
    softcap: float | None

    @property
    def scale(self) -> float:
        """The factor of the comparison of one token."""
        return (self.options.temperature**2 if self.options.scales else 1.0) / self.num_tokens

    def compare_(self, logits: Tensor, teacher_rows: Any, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the part of the loss that some rows of logits (n, vocab) make up; replace the rows by its gradient.

        Also returned are the rows' comparisons (n,), unscaled. The gradient is with respect to the result of the
        product, before the soft-cap. `labels` are the rows' own (n,).
        """
        temperature = self.options.temperature
        soft_capped(logits, self.softcap, in_place=True)
        # d cap(x)/dx = 1 − (cap(x)/c)²
        slope = (logits / self.softcap).square_().neg_().add_(1) if self.softcap else None
        label_loss = None if labels is None else _cross_entropy(logits, labels)
        losses = self.comparison(teacher_rows, _divide_(logits, temperature)).double()
        total = losses.sum() * self.scale
        logits.mul_(self.scale / temperature)
        if label_loss is not None and self.options.labels is not None:
            weight = self.options.labels.weight / self.options.labels.num_labels
            total += label_loss[0].double().sum() * weight
            logits.add_(label_loss[1], alpha=weight)
        if slope is not None:
            logits.mul_(slope)
        return total, losses


class _LogitLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, weight: Tensor, task: _Task) -> tuple[Tensor, Tensor]:
        """`student` is (N, student hidden), `weight` (vocab, student hidden)."""
        dtype = torch.promote_types(student.dtype, torch.float32)
        vocab, options = min(len(weight), task.teacher.vocab), task.options
        operands = options.operands or dtype
        matrix, teacher = weight[:vocab].to(operands), task.teacher.prepared(vocab, dtype, operands)
        grad_student = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        each = torch.empty(len(student), dtype=torch.float64, device=student.device)
        num_chunks = max(1, -(-len(student) // (options.chunk_tokens or FEWEST_TOKENS)))
        chunk_tokens = max(1, -(-len(student) // num_chunks))  # chunks of equal size, but for rounding
        # Buffers are allocated once: fresh memory from the operating system is expensive on a CPU.
        buffer = torch.empty(chunk_tokens, vocab, dtype=dtype, device=student.device)
        teacher_buffer = None
        if isinstance(teacher, States):
            teacher_buffer = buffer.new_empty(chunk_tokens, len(teacher.head.weight))
        num_rows = max(1, ROWS_BYTES[student.device.type] // (vocab * dtype.itemsize))
        labels = options.labels.tokens if options.labels is not None and options.labels.weight else None
        for start in range(0, len(student), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            states = student[part].to(operands)
            logits = _product(states, matrix.T, buffer)
            teacher_rows = teacher.rows(part, options.temperature, teacher_buffer)
            chunk_labels = None if labels is None else labels[part]
            for first in range(0, len(logits), num_rows):
                rows = slice(first, first + num_rows)
                row_labels = None if chunk_labels is None else chunk_labels[rows]
                added, each[part][rows] = task.compare_(logits[rows], teacher_rows(rows), row_labels)
                total += added
            gradient = logits
            if grad_student is not None:
                grad_student[part] = _product(gradient, matrix).to(grad_student.dtype)
            if grad_weight is not None:
                _add_product_(grad_weight[:vocab], gradient.T, states)
        ctx.gradients = grad_student, grad_weight if grad_weight is None else grad_weight.to(weight.dtype)
        each *= task.scale
        ctx.mark_non_differentiable(each)
        return total.to(dtype), each

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        # Gradients are scaled in place, so that there is no second copy of the head's size; they are gone afterwards.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("this loss can be differentiated once")
        scaled = [each if each is None else each.mul_(grad_outputs[0].to(each.dtype)) for each in gradients]
        return *scaled, None


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of each token, (n,), 0 without a label, and its gradient (n, vocab)."""
    is_label = labels >= 0
    chosen = labels.clamp_min(0)[:, None]
    log_q = logits - logits.logsumexp(dim=-1, keepdim=True)
    loss = -log_q.gather(-1, chosen).squeeze(-1) * is_label
    gradient = log_q.exp_().scatter_add_(-1, chosen, logits.new_full(chosen.shape, -1.0))
    return loss, gradient.mul_(is_label[:, None])


def _product(a: Tensor, b: Tensor, buffer: Tensor | None = None) -> Tensor:
    """Return a @ b with operands in b's dtype, in float32 or better; in the first rows of `buffer` if there is one."""
    a, out = a.to(b.dtype), None if buffer is None else buffer[: len(a)]
    if b.dtype == torch.bfloat16 and b.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    if b.dtype == torch.bfloat16:
        a, b = a.float(), b.float()
    return torch.mm(a, b, out=out)


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total`, with operands in b's dtype."""
    if b.dtype == torch.bfloat16 and b.is_cuda:
        torch.addmm(total, a.to(b.dtype), b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.to(b.dtype).to(total.dtype), b.to(total.dtype))


def _divide_(logits: Tensor, temperature: float) -> Tensor:
    """Divide logits by a temperature in place."""
    return logits if temperature == 1.0 else logits.div_(temperature)
