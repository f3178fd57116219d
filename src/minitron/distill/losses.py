"""How far a student's next-token distribution is from its teacher's: pure functions of logits, with their gradients.

A `Comparison` takes the teacher's and the student's logits, (n, vocab) each, in float32 or better, and may overwrite
both. It returns each token's loss, (n,), summed over the vocabulary, and the loss's gradient by the student's logits,
(n, vocab). p is the teacher's softmax, q the student's.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

Comparison = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def forward_kl(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """Σ p (log p − log q): what Minitron trains with (arXiv 2407.14679, section 3 and table 15)."""
    log_p, log_q = _log_softmax_(teacher), _log_softmax_(student)
    p = log_p.exp()
    loss = log_p.sub_(log_q).mul_(p).sum(dim=-1)
    return loss, log_q.exp_().sub_(p)


def reverse_kl(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """Σ q (log q − log p): seeks one of the teacher's modes rather than all (MiniLLM, arXiv 2306.08543)."""
    log_p, log_q = _log_softmax_(teacher), _log_softmax_(student)
    parts = log_p.neg_().add_(log_q)
    q = log_q.exp_()
    loss = parts.mul_(q).sum(dim=-1)
    return loss, parts.addcmul_(q, loss[:, None], value=-1)


def jsd(teacher: Tensor, student: Tensor, beta: float) -> tuple[Tensor, Tensor]:
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
    return loss + of_student, parts.addcmul_(q, of_student[:, None], value=-1 / (1 - beta))


def mse(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """Σ (s − t)² of the logits themselves."""
    difference = student.sub_(teacher)
    loss = torch.linalg.vecdot(difference, difference)
    return loss, difference.mul_(2)


def cosine(teacher: Tensor, student: Tensor) -> tuple[Tensor, Tensor]:
    """1 − cos(t, s) of the logits themselves."""
    length = torch.linalg.vector_norm(student, dim=-1, keepdim=True).clamp_min(1e-12)
    towards = teacher.div_(torch.linalg.vector_norm(teacher, dim=-1, keepdim=True).clamp_min(1e-12))
    own = student.div_(length)
    cos = torch.linalg.vecdot(towards, own)[:, None]
    return 1 - cos.squeeze(-1), own.mul_(cos).sub_(towards).div_(length)


def tempered(teacher: Tensor, student: Tensor, comparison: Comparison, temperature: float) -> tuple[Tensor, Tensor]:
    """A comparison of logits divided by τ, times τ², so that gradients keep their size.

    (Hinton et al., arXiv 1503.02531, section 2.)
    """
    loss, gradient = comparison(teacher.div_(temperature), student.div_(temperature))
    return loss.mul_(temperature**2), gradient.mul_(temperature)


def with_tail(teacher: Tensor, student: Tensor, comparison: Comparison, top_k: int) -> tuple[Tensor, Tensor]:
    """A comparison over the teacher's k most likely tokens and, as one more class, all others together.

    Both distributions stay whole: unlike renormalising within the k, this sees probability that the student gives to
    the others.
    """
    indices = teacher.topk(top_k, dim=-1, sorted=False).indices
    return against_classes(indices, _classes_(teacher, indices), student, comparison)


def against_classes(indices: Tensor, classes: Tensor, student: Tensor, comparison: Comparison) -> tuple[Tensor, Tensor]:
    """The same where of the teacher only that is known: the tokens `indices` (n, k), and logits `classes` (n, k + 1),
    the last of which is that of all other tokens together."""
    own = _classes_(student, indices)
    others = own[:, -1:].clone()
    loss, of_classes = comparison(classes, own)
    # A class of many tokens has their logsumexp as its logit, whose gradient is the softmax among them.
    gradient = student.sub_(others).exp_().mul_(of_classes[:, -1:])
    return loss, gradient.scatter_(-1, indices, of_classes[:, :-1])


def comparison_of(kind: str, temperature: float, beta: float, top_k: int | None) -> Comparison:
    """The comparison that a recipe's `distill.loss` describes.

    Raises:
        KeyError: there is no such kind.
    """
    found = COMPARISONS[kind]
    if kind == "jsd":
        found = partial(jsd, beta=beta)
    if top_k is not None:
        found = partial(with_tail, comparison=found, top_k=top_k)
    return found if temperature == 1.0 else partial(tempered, comparison=found, temperature=temperature)


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
    return logits.sub_(logits.logsumexp(dim=-1, keepdim=True))
