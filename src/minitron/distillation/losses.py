"""Distances of a student's next-token distribution from its teacher's, with their gradients, computed in place.

A `Comparison` takes the logits of teacher and student, (n, vocab) each, in float32 or better, and returns each token's
loss, (n,), summed over the vocabulary. Both tensors are overwritten: `student` receives the gradient of the loss by the
student's logits, `teacher` is scratch; hence the trailing underscores. p is the teacher's softmax, q the student's.
Logits are already divided by the temperature. `differentiable` makes a comparison of a plain function.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

Comparison = Callable[[Any, Tensor], Tensor]
"""A function of teacher outputs and of the student's logits, which it overwrites; see the module's docstring."""


def differentiable(function: Callable[[Tensor, Tensor], Tensor]) -> Comparison:
    """Make a comparison of a plain function (teacher logits, student logits), (n, vocab) each, → losses (n,).

    The gradient is autograd's, for the tokens of one chunk at a time; the function must not change its arguments. The
    comparison raises a ValueError where the function does not return one loss per token: a mean over the tokens of a
    chunk would depend on the size of chunks.
    """

    def comparison(teacher: Tensor, student: Tensor) -> Tensor:
        with torch.enable_grad():
            logits = student.detach().clone().requires_grad_()
            losses = function(teacher, logits)
            if losses.shape != logits.shape[:1]:
                raise ValueError(f"a loss of {len(logits)} tokens has shape {tuple(losses.shape)}: not one per token")
            (gradient,) = torch.autograd.grad(losses.sum(), logits)
        student.copy_(gradient)
        return losses.detach()

    return comparison


def forward_kl_(teacher: Tensor, student: Tensor) -> Tensor:
    """Compute Σ p (log p − log q), which Minitron trains with (arXiv 2407.14679, section 3 and table 15)."""
    log_p, log_q = _log_softmax_(teacher), _log_softmax_(student)
    p = log_p.exp()
    loss: Tensor = torch.linalg.vecdot(log_p.sub_(log_q), p)
    log_q.exp_().sub_(p)
    return loss


def reverse_kl_(teacher: Tensor, student: Tensor) -> Tensor:
    """Compute Σ q (log q − log p), which seeks one of the teacher's modes, not all (MiniLLM, arXiv 2306.08543)."""
    log_p, log_q = _log_softmax_(teacher), _log_softmax_(student)
    terms = log_p.neg_().add_(log_q)
    q = log_q.exp_()
    loss = terms.mul_(q).sum(dim=-1)
    q.mul_(-loss[:, None]).add_(terms)
    return loss


def jsd_(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """Compute β Σ p (log p − log m) + (1 − β) Σ q (log q − log m), m = βp + (1 − β)q.

    This is the generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649, section 2).
    """
    # p and q carry their shares β and 1 − β from here; the logarithms of the shares are subtracted from the sums again.
    log_p, log_q = _log_softmax_(teacher).add_(math.log(beta)), _log_softmax_(student).add_(math.log(1 - beta))
    log_m = torch.logaddexp(log_p, log_q)
    p = log_p.exp()
    loss = log_p.sub_(log_m).mul_(p).sum(dim=-1) - beta * math.log(beta)
    del p
    terms = log_m.neg_().add_(log_q).sub_(math.log(1 - beta))
    q = log_q.exp_()
    student_loss = terms.mul_(q).sum(dim=-1)
    q.mul_(student_loss[:, None] / (beta - 1)).add_(terms)
    return loss + student_loss


def mse_(teacher: Tensor, student: Tensor) -> Tensor:
    """Compute Σ (s − t)² of the student's logits s and the teacher's logits t."""
    difference = student.sub_(teacher)
    loss: Tensor = torch.linalg.vecdot(difference, difference)
    difference.mul_(2)
    return loss


def cosine_(teacher: Tensor, student: Tensor) -> Tensor:
    """Compute 1 − cos(t, s) of the student's logits s and the teacher's logits t."""
    length = torch.linalg.vector_norm(student, dim=-1, keepdim=True).clamp_min(1e-12)
    target = teacher.div_(torch.linalg.vector_norm(teacher, dim=-1, keepdim=True).clamp_min(1e-12))
    direction = student.div_(length)
    cos = torch.linalg.vecdot(target, direction)[:, None]
    direction.mul_(cos).sub_(target).div_(length)
    loss: Tensor = 1 - cos.squeeze(-1)
    return loss


def of_probabilities_(teacher: Tensor, student: Tensor, comparison: Comparison) -> Tensor:
    """Compare p and q instead of logits: Σ (q − p)² or 1 − cos(p, q), as Minitron writes MSE and cosine (section 3).

    The mean over the vocabulary in place of the sum would divide the squared error by a constant.
    """
    p, q = torch.softmax(teacher, dim=-1, out=teacher), torch.softmax(student, dim=-1, out=student)
    kept = q.clone()
    loss = comparison(p, q)  # `q` now holds the gradient by the probabilities
    q.sub_(torch.linalg.vecdot(q, kept)[:, None]).mul_(kept)
    return loss


def with_tail_(teacher: Tensor, student: Tensor, comparison: Comparison, top_k: int) -> Tensor:
    """Compare over the teacher's k most likely tokens and, as one more class, all other tokens together.

    Both distributions stay complete: unlike a renormalisation over k tokens, this includes the probability that the
    student assigns to other tokens.
    """
    return against_classes_(classes_of_(teacher, top_k), student, comparison)


def classes_of_(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Return the k likeliest tokens (n, k), and logits (n, k + 1), the last of all other tokens; overwrite `logits`."""
    indices = logits.topk(top_k, dim=-1, sorted=False).indices
    return indices, _classes_(logits, indices)


def against_classes_(teacher: tuple[Tensor, Tensor], student: Tensor, comparison: Comparison) -> Tensor:
    """Compare with the result of `classes_of_`, where no more of the teacher is known."""
    indices, teacher_classes = teacher
    student_classes = _classes_(student, indices)
    tail = student_classes[:, -1:].clone()
    loss = comparison(teacher_classes, student_classes)  # `student_classes` now holds its gradient
    # A class of many tokens has their logsumexp as its logit, whose gradient is the softmax among them.
    student.sub_(tail).exp_().mul_(student_classes[:, -1:]).scatter_(-1, indices, student_classes[:, :-1])
    return loss


def comparison_of(kind: str, beta: float = 0.5, top_k: int | None = None, of_classes: bool = False) -> Comparison:
    """Return the comparison that a recipe describes; with `of_classes`, for a teacher known by `classes_of_` only.

    Raises:
        KeyError: there is no such kind.
    """
    comparison = partial(jsd_, beta=beta) if kind == "jsd" else COMPARISONS[kind]
    if of_classes:
        return partial(against_classes_, comparison=comparison)
    return comparison if top_k is None else partial(with_tail_, comparison=comparison, top_k=top_k)


COMPARISONS: dict[str, Comparison] = {
    "forward_kl": forward_kl_,
    "reverse_kl": reverse_kl_,
    "jsd": partial(jsd_, beta=0.5),
    "mse": mse_,
    "cosine": cosine_,
    "probability_mse": partial(of_probabilities_, comparison=mse_),
    "probability_cosine": partial(of_probabilities_, comparison=cosine_),
}
UNSCALED = frozenset({"cosine", "probability_mse", "probability_cosine"})
"""Losses that are not multiplied by τ². The cosine of logits does not depend on τ, and the papers write no factor."""


def _classes_(logits: Tensor, indices: Tensor) -> Tensor:
    """Return the logits at `indices` and the logsumexp of the others; set the logits at `indices` to −∞."""
    chosen = logits.gather(-1, indices)
    others = logits.scatter_(-1, indices, -torch.inf).logsumexp(dim=-1, keepdim=True)
    return torch.cat([chosen, others], dim=-1)


def _log_softmax_(logits: Tensor) -> Tensor:
    """Compute the log-softmax in place."""
    return torch.log_softmax(logits, dim=-1, out=logits)
