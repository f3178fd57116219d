"""Distillation losses fused with the output projections: logits exist for some tokens at a time, never for all."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minitron.distillation.losses import Comparison
from minitron.model.language_model import Head

LOGITS_BYTES = {"cpu": 3 * 2**24, "cuda": 2**29}
"""Size of a buffer of logits, of which there are two: as large as matrix products need it."""
FEWEST_TOKENS = 256
"""Whose logits a buffer holds in any case: with fewer, products wait for the output matrix to be read."""
ROWS_BYTES = {"cpu": 2**21, "cuda": 2**29}
"""Size of the part that is compared at a time: on a CPU what its caches hold, since it is gone over many times."""


@dataclass(frozen=True)
class States:
    """A distribution for each token, as last hidden states (…, hidden) in front of a head."""

    hidden: Tensor
    head: Head

    @property
    def vocab(self) -> int:
        """How many tokens the distributions are over."""
        return len(self.head.weight)

    def at(self, positions: Tensor) -> "States":
        """Those of some positions, by a mask."""
        return States(self.hidden[positions], self.head)

    def ready(self, vocab: int, _: torch.dtype, operands: torch.dtype) -> "States":
        """The same over the first tokens of the vocabulary, with one dimension for all positions."""
        return States(self.hidden.flatten(0, -2), Head(self.head.weight[:vocab].to(operands), self.head.softcap))

    def rows(self, part: slice, temperature: float, buffer: Tensor | None = None) -> Callable[[slice], Tensor]:
        """Logits of some positions, given out (n, vocab) at a time and each once."""
        logits = _product(self.hidden[part], self.head.weight.T, buffer)
        return lambda rows: _cooled_(_capped_(logits[rows], self.head.softcap), temperature)


@dataclass(frozen=True)
class TopTokens:
    """The k likeliest tokens of each distribution, (…, k), and logits (…, k + 1), as `losses.classes_of` gives them.

    The logits are those at the temperature of the loss.
    """

    indices: Tensor
    classes: Tensor
    vocab: int

    def at(self, positions: Tensor) -> "TopTokens":
        """Those of some positions, by a mask."""
        return TopTokens(self.indices[positions], self.classes[positions], self.vocab)

    def ready(self, vocab: int, dtype: torch.dtype, _: torch.dtype) -> "TopTokens":
        """The same with one dimension for all positions."""
        if vocab < self.vocab:
            raise ValueError(f"the student has {vocab} tokens, the teacher's classes are of {self.vocab}")
        return TopTokens(self.indices.flatten(0, -2).long(), self.classes.flatten(0, -2).to(dtype), vocab)

    def rows(self, part: slice, _: float, __: Tensor | None = None) -> Callable[[slice], tuple[Tensor, Tensor]]:
        """Indices and classes of some positions, given out (n, k) and (n, k + 1) at a time."""
        indices, classes = self.indices[part], self.classes[part]
        return lambda rows: (indices[rows], classes[rows].clone())


def logit_loss(
    student: Tensor,
    head: Head,
    teacher: States | TopTokens,
    comparison: Comparison,
    num_tokens: int,
    temperature: float = 1.0,
    labels: Tensor | None = None,
    label_weight: float = 0.0,
    num_labels: int = 1,
    operands: torch.dtype | None = None,
    chunk_tokens: int | None = None,
) -> Tensor:
    """`τ²/num_tokens · Σ_tokens comparison + label_weight/num_labels · Σ_labels cross-entropy`, a scalar.

    The comparison is of logits divided by τ; τ² keeps its gradients' size (Hinton et al., arXiv 1503.02531, section 2).
    The counts are those over all ranks and accumulation steps, so that the parts of a batch add up. Of two vocabularies
    of different length the entries that both have are compared: the others are padding.

    Args:
        student: (…, student hidden) last hidden states; the gradient flows into them.
        head: the student's, (vocab, student hidden); the gradient flows into its weight.
        teacher: what the teacher says of the same tokens.
        comparison: see `losses`; it gets float32 logits, or float64 where the student's states are.
        num_tokens: what the sum of the comparison is divided by.
        temperature: τ.
        labels: (…), the next tokens, −100 where there is none; None where they take no part.
        label_weight: weight of their cross-entropy.
        num_labels: what the sum of that is divided by.
        operands: bfloat16 to round what matrix products are of, as autocast does in the layers; they are added up in
            float32 all the same, so that logits are never rounded themselves.
        chunk_tokens: tokens whose logits are held at once; the result does not depend on it but for rounding.

    Forward and gradients never hold tokens × vocabulary: the gradients are formed chunk by chunk in the forward pass
    and kept at the size of the inputs.
    """
    if chunk_tokens is None:
        chunk_tokens = max(FEWEST_TOKENS, LOGITS_BYTES[student.device.type] // (4 * head.weight.shape[0]))
    if labels is not None:
        labels = labels.flatten()
    result: Tensor = _LogitLoss.apply(
        student.flatten(0, -2), head.weight, head.softcap, teacher, comparison, num_tokens, temperature,
        labels, label_weight / num_labels, operands, chunk_tokens,
    )  # fmt: skip
    return result


class _LogitLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,  # (N, student hidden)
        weight: Tensor,  # (vocab, student hidden)
        softcap: float | None,
        teacher: States | TopTokens,
        comparison: Comparison,
        num_tokens: int,
        temperature: float,
        labels: Tensor | None,  # (N,)
        label_weight: float,
        operands: torch.dtype | None,
        chunk_tokens: int,
    ) -> Tensor:
        dtype = torch.promote_types(student.dtype, torch.float32)
        vocab = min(len(weight), teacher.vocab)
        operands = operands or dtype
        matrix, teacher = weight[:vocab].to(operands), teacher.ready(vocab, dtype, operands)
        grad_student = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros(weight.shape, dtype=dtype, device=weight.device) if ctx.needs_input_grad[1] else None
        total = torch.zeros((), dtype=torch.float64, device=student.device)
        num_chunks = max(1, -(-len(student) // chunk_tokens))
        chunk_tokens = max(1, -(-len(student) // num_chunks))  # all of one size, but for rounding
        # Taken once: memory fresh from the system is dear on a CPU.
        buffer = torch.empty(chunk_tokens, vocab, dtype=dtype, device=student.device)
        of_teacher = torch.empty_like(buffer) if isinstance(teacher, States) else None
        num_rows = max(1, ROWS_BYTES[student.device.type] // (vocab * dtype.itemsize))
        for start in range(0, len(student), chunk_tokens):
            part = slice(start, start + chunk_tokens)
            states = student[part].to(operands)
            logits = _product(states, matrix.T, buffer)
            said = teacher.rows(part, temperature, of_teacher)
            of_chunk = None if labels is None or not label_weight else labels[part]
            for first in range(0, len(logits), num_rows):
                rows = slice(first, first + num_rows)
                total += _compare_(
                    logits[rows], said(rows), comparison, num_tokens, softcap, temperature,
                    None if of_chunk is None else of_chunk[rows], label_weight,
                )  # fmt: skip
            gradient = logits
            if grad_student is not None:
                grad_student[part] = _product(gradient, matrix).to(grad_student.dtype)
            if grad_weight is not None:
                _add_product_(grad_weight[:vocab], gradient.T, states)
        ctx.gradients = grad_student, grad_weight if grad_weight is None else grad_weight.to(weight.dtype)
        return total.to(dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        # Scaled in place, so that no second copy of the head's size is made; a second backward finds nothing.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("this loss can be differentiated once")
        scaled = [gradient if gradient is None else gradient.mul_(grad_outputs[0].to(gradient.dtype))
                  for gradient in gradients]  # fmt: skip
        return *scaled, *([None] * 9)


def _compare_(
    logits: Tensor,
    said: Any,
    comparison: Comparison,
    num_tokens: int,
    softcap: float | None,
    temperature: float,
    labels: Tensor | None,
    label_weight: float,
) -> Tensor:
    """What some rows of logits (n, vocab) add to the loss; they become its gradient by what came out of the product."""
    _capped_(logits, softcap)
    # d cap(x)/dx = 1 − (cap(x)/c)²
    slope = (logits / softcap).square_().neg_().add_(1) if softcap else None
    of_labels = None if labels is None else _cross_entropy(logits, labels)
    total = comparison(said, _cooled_(logits, temperature)).double().sum() * (temperature**2 / num_tokens)
    logits.mul_(temperature / num_tokens)
    if of_labels is not None:
        total += of_labels[0].double().sum() * label_weight
        logits.add_(of_labels[1], alpha=label_weight)
    if slope is not None:
        logits.mul_(slope)
    return total


def _cross_entropy(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of each token that has a label, (n,), and its gradient (n, vocab)."""
    is_label = labels >= 0
    chosen = labels.clamp_min(0)[:, None]
    log_q = logits - logits.logsumexp(dim=-1, keepdim=True)
    loss = -log_q.gather(-1, chosen).squeeze(-1) * is_label
    gradient = log_q.exp_().scatter_add_(-1, chosen, logits.new_full(chosen.shape, -1.0))
    return loss, gradient.mul_(is_label[:, None])


def _product(a: Tensor, b: Tensor, buffer: Tensor | None = None) -> Tensor:
    """a @ b, of operands in b's dtype, in float32 or better; in the first rows of `buffer` if there is one."""
    a, out = a.to(b.dtype), None if buffer is None else buffer[: len(a)]
    if b.dtype == torch.bfloat16 and b.is_cuda:
        return torch.mm(a, b, out_dtype=torch.float32, out=out)
    if b.dtype == torch.bfloat16:
        a, b = a.float(), b.float()
    return torch.mm(a, b, out=out)


def _add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add that to `total`."""
    if b.dtype == torch.bfloat16 and b.is_cuda:
        torch.addmm(total, a.to(b.dtype), b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.to(b.dtype).to(total.dtype), b.to(total.dtype))


def _capped_(logits: Tensor, softcap: float | None) -> Tensor:
    """Soft-capped logits, in place."""
    return logits.div_(softcap).tanh_().mul_(softcap) if softcap else logits


def _cooled_(logits: Tensor, temperature: float) -> Tensor:
    """Logits divided by a temperature, in place."""
    return logits if temperature == 1.0 else logits.div_(temperature)
