"""How far a student's next-token distribution is from its teacher's: pure functions of logits, with their gradients.

A `Comparison` takes the teacher's and the student's logits, (n, vocab) each, in float32 or better. It returns each
token's loss, (n,), summed over the vocabulary, and leaves in the place of the student's logits the loss's gradient by
these; what the teacher's place holds then is of no use. p is the teacher's softmax, q the student's. A temperature is
the caller's matter.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

Comparison = Callable[[Any, Tensor], Tensor]


def forward_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Σ p (log p − log q): what Minitron trains with (arXiv 2407.14679, section 3 and table 15)."""
    log_p, log_q = _log_softmax_(teacher), _log_softmax_(student)
    p = log_p.exp()
    loss: Tensor = torch.linalg.vecdot(log_p.sub_(log_q), p)
    log_q.exp_().sub_(p)
    return loss


def reverse_kl(teacher: Tensor, student: Tensor) -> Tensor:
    """Σ q (log q − log p): seeks one of the teacher's modes rather than all (MiniLLM, arXiv 2306.08543)."""
    log_p, log_q = _log_softmax_(teacher), _log_softmax_(student)
    parts = log_p.neg_().add_(log_q)
    q = log_q.exp_()
    loss = parts.mul_(q).sum(dim=-1)
    q.mul_(-loss[:, None]).add_(parts)
    return loss


def jsd(teacher: Tensor, student: Tensor, beta: float) -> Tensor:
    """β Σ p (log p − log m) + (1 − β) Σ q (log q − log m) with m = βp + (1 − β)q (GKD, arXiv 2306.13649, section 2)."""
    # From here on p and q carry their shares β and 1 − β, whose logarithms come off the sums again.
    log_p, log_q = _log_softmax_(teacher).add_(math.log(beta)), _log_softmax_(student).add_(math.log(1 - beta))
    log_m = torch.logaddexp(log_p, log_q)
    of_teacher = log_p.exp()
    loss = log_p.sub_(log_m).mul_(of_teacher).sum(dim=-1) - beta * math.log(beta)
    del of_teacher
    parts = log_m.neg_().add_(log_q).sub_(math.log(1 - beta))
    q = log_q.exp_()
    of_student = parts.mul_(q).sum(dim=-1)
    q.mul_(of_student[:, None] / (beta - 1)).add_(parts)
    return loss + of_student


def mse(teacher: Tensor, student: Tensor) -> Tensor:
    """Σ (s − t)² of the logits themselves."""
    difference = student.sub_(teacher)
    loss: Tensor = torch.linalg.vecdot(difference, difference)
    difference.mul_(2)
    return loss


def cosine(teacher: Tensor, student: Tensor) -> Tensor:
    """1 − cos(t, s) of the logits themselves."""
    length = torch.linalg.vector_norm(student, dim=-1, keepdim=True).clamp_min(1e-12)
    towards = teacher.div_(torch.linalg.vector_norm(teacher, dim=-1, keepdim=True).clamp_min(1e-12))
    own = student.div_(length)
    cos = torch.linalg.vecdot(towards, own)[:, None]
    own.mul_(cos).sub_(towards).div_(length)
    loss: Tensor = 1 - cos.squeeze(-1)
    return loss


def with_tail(teacher: Tensor, student: Tensor, comparison: Comparison, top_k: int) -> Tensor:
    """A comparison over the teacher's k most likely tokens and, as one more class, all others together.

    Both distributions stay whole: unlike renormalising within the k, this sees probability that the student gives to
    the others.
    """
    return against_classes(classes_of(teacher, top_k), student, comparison)


def classes_of(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens (n, k), and logits (n, k + 1), the last that of all others; overwrites its argument."""
    indices = logits.topk(top_k, dim=-1, sorted=False).indices
    return indices, _classes_(logits, indices)


def against_classes(teacher: tuple[Tensor, Tensor], student: Tensor, comparison: Comparison) -> Tensor:
    """A comparison with what `classes_of` gives, where no more of the teacher is known."""
    indices, classes = teacher
    own = _classes_(student, indices)
    others = own[:, -1:].clone()
    loss = comparison(classes, own)  # its gradient is in `own` now
    # A class of many tokens has their logsumexp as its logit, whose gradient is the softmax among them.
    student.sub_(others).exp_().mul_(own[:, -1:]).scatter_(-1, indices, own[:, :-1])
    return loss


def comparison_of(kind: str, beta: float = 0.5, top_k: int | None = None, of_classes: bool = False) -> Comparison:
    """The comparison that a recipe describes; with `of_classes`, one whose teacher is given as `classes_of` gives it.

    Raises:
        KeyError: there is no such kind.
    """
    found = partial(jsd, beta=beta) if kind == "jsd" else COMPARISONS[kind]
    if of_classes:
        return partial(against_classes, comparison=found)
    return found if top_k is None else partial(with_tail, comparison=found, top_k=top_k)


COMPARISONS: dict[str, Comparison] = {
    "forward_kl": forward_kl,
    "reverse_kl": reverse_kl,
    "jsd": partial(jsd, beta=0.5),
    "mse": mse,
    "cosine": cosine,
}


def _classes_(logits: Tensor, indices: Tensor) -> Tensor:
    """Those at `indices` and the logsumexp of the others; at `indices` the argument becomes −∞."""
    chosen = logits.gather(-1, indices)
    others = logits.scatter_(-1, indices, -torch.inf).logsumexp(dim=-1, keepdim=True)
    return torch.cat([chosen, others], dim=-1)


def _log_softmax_(logits: Tensor) -> Tensor:
    """Log-softmax, in place."""
    return torch.log_softmax(logits, dim=-1, out=logits)
