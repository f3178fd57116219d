"""Distillation losses as pure functions, fused with the output projection.

Conventions: summed over the vocabulary, summed over tokens and divided by `num_tokens` (the count over all
ranks and accumulation steps, so that the parts of a batch add up), in float32 or better, times τ².
"""

from typing import Any

import torch
from torch import Tensor

CHUNK_TOKENS = 256
"""Logits are formed for this many tokens at once: three float32 buffers of chunk × vocabulary are live."""


def forward_kl(
    student_hidden: Tensor,
    student_head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor,
    num_tokens: int,
    temperature: float = 1.0,
    chunk_tokens: int = CHUNK_TOKENS,
    student_softcap: float | None = None,
    teacher_softcap: float | None = None,
) -> Tensor:
    """`τ²/num_tokens · Σ_tokens Σ_v p_v (log p_v − log q_v)`, p the teacher's and q the student's softmax at τ.

    Forward KL alone, at τ = 1, is what Minitron trains with (arXiv 2407.14679, section 3 and table 15; τ² as
    in Hinton et al., arXiv 1503.02531, section 2).

    Args:
        student_hidden: (…, student hidden) last hidden states; the gradient flows into them.
        student_head: (vocab, student hidden) output matrix; the gradient flows into it.
        teacher_hidden: (…, teacher hidden).
        teacher_head: (vocab, teacher hidden).
        num_tokens: what the sum over tokens is divided by.
        temperature: τ.
        student_softcap: c, where the student's logits are `c · tanh(raw / c)` (Gemma 2).
        teacher_softcap: the same of the teacher's.
        chunk_tokens: tokens whose logits are held at once; the result does not depend on it but for rounding.

    Returns:
        A scalar. Forward and gradients never hold tokens × vocabulary: the gradients are formed chunk by
        chunk in the forward pass and kept at the size of the inputs.
    """
    if student_head.shape[0] != teacher_head.shape[0]:
        raise ValueError(f"vocabularies differ: {student_head.shape[0]} and {teacher_head.shape[0]}")
    result: Tensor = _ForwardKL.apply(
        student_hidden.flatten(0, -2), student_head, teacher_hidden.flatten(0, -2), teacher_head,
        num_tokens, temperature, chunk_tokens, student_softcap, teacher_softcap,
    )  # fmt: skip
    return result


class _ForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,  # (N, Hs)
        student_head: Tensor,  # (V, Hs)
        teacher_hidden: Tensor,  # (N, Ht)
        teacher_head: Tensor,  # (V, Ht)
        num_tokens: int,
        temperature: float,
        chunk_tokens: int,
        student_softcap: float | None,
        teacher_softcap: float | None,
    ) -> Tensor:
        dtype = torch.promote_types(student_hidden.dtype, torch.float32)
        head_s, head_t = student_head.to(dtype), teacher_head.to(dtype)
        needs_gradient = any(ctx.needs_input_grad[:2])
        grad_hidden = torch.empty_like(student_hidden) if needs_gradient else None
        grad_head = torch.zeros_like(head_s) if needs_gradient else None
        total = torch.zeros((), dtype=torch.float64, device=student_hidden.device)
        for start in range(0, student_hidden.shape[0], chunk_tokens):
            part = slice(start, start + chunk_tokens)
            states = student_hidden[part].to(dtype)
            teacher_logits = _cap_(teacher_hidden[part].to(dtype) @ head_t.T, teacher_softcap)
            student_logits = _cap_(states @ head_s.T, student_softcap)
            # d cap(x)/dx = 1 − (cap(x)/c)²
            slope = (student_logits / student_softcap).square_().neg_().add_(1) if student_softcap else None
            loss, difference = _chunk(student_logits, teacher_logits, temperature)
            total += loss
            if grad_hidden is not None and grad_head is not None:
                # d/d(student logits) of τ² KL is τ (q − p).
                difference.mul_(temperature / num_tokens)
                if slope is not None:
                    difference.mul_(slope)
                grad_hidden[part] = (difference @ head_s).to(grad_hidden.dtype)
                grad_head.addmm_(difference.T, states)
            del difference, slope, student_logits, teacher_logits  # before the next chunk's logits are formed
        if grad_hidden is not None and grad_head is not None:
            ctx.gradients = grad_hidden, grad_head.to(student_head.dtype)
        return (total * (temperature**2 / num_tokens)).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        # Scaled in place, so that no second copy of the head's size is made; a second backward finds nothing.
        gradients, ctx.gradients = ctx.gradients, None
        if gradients is None:
            raise RuntimeError("forward_kl can be differentiated once")
        return *(gradient.mul_(grad_outputs[0].to(gradient.dtype)) for gradient in gradients), *([None] * 7)


def _chunk(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """KL summed over a chunk, and q − p (chunk, V); both arguments are overwritten."""
    log_q, log_p = _log_softmax_(student_logits, temperature), _log_softmax_(teacher_logits, temperature)
    p = log_p.exp()
    loss = log_p.sub_(log_q).mul_(p).sum(dim=-1).double().sum()
    return loss, log_q.exp_().sub_(p)


def _cap_(logits: Tensor, softcap: float | None) -> Tensor:
    """Soft-capped logits, in place."""
    return logits.div_(softcap).tanh_().mul_(softcap) if softcap else logits


def _log_softmax_(logits: Tensor, temperature: float) -> Tensor:
    """Log-softmax at a temperature, in place."""
    if temperature != 1.0:
        logits.div_(temperature)
    return logits.sub_(logits.logsumexp(dim=-1, keepdim=True))
