"""Compares the next-token distributions of a model and its teacher, without holding tokens × vocabulary."""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from minitron.data.blocks import Blocks
from minitron.data.spelling import Pieces
from minitron.data.stream import Stream
from minitron.model.language_model import Head

CHUNK_TOKENS = 256
"""The number of tokens whose logits are formed at once."""


@dataclass(frozen=True)
class Agreement:
    """Figures of a model and its teacher, over all tokens that are predicted."""

    kl: float
    """KL divergence Σ p (log p − log q) in nats per token, with p the teacher's distribution and q the model's.

    The papers call it the distillation loss (arXiv 2407.14679, table 1).
    """
    top1: float
    """Share of tokens for which both models find the same next token likeliest."""

    def to_dict(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        return asdict(self)


class TeacherStates:
    """A teacher's last hidden states on some blocks, and its head: all that its logits need once the model is released.

    They take hidden × dtype bytes per token, in memory or in a file (`Stream`).
    """

    def __init__(self, blocks: Blocks, pieces: Pieces | None = None) -> None:
        """`pieces` write the teacher's tokens where the other model has fewer; it reads `blocks.whole` then."""
        self.blocks, self.pieces = blocks, pieces
        self.stream: Stream | None = None
        self.head: Head | None = None

    def observe(self, number: int, hidden: Tensor, head: Head) -> None:
        """Keep the states (1, T, hidden) of the block of a number; see `perplexity.Observer`."""
        if self.stream is None:
            self.stream = Stream(self.blocks, hidden.shape[-1], hidden.dtype)
            self.head = Head(head.weight.detach(), head.softcap)
        self.stream[number] = hidden

    def are_known(self, number: int) -> Tensor:
        """Return the positions of a block, (T,), whose next token both models predict."""
        block = self.blocks[number : number + 1]
        counted = (block.targets >= 0).flatten()
        return counted if block.whole is None else counted & (block.whole.places.flatten() >= 0)

    def logits(self, number: int, positions: Tensor) -> Tensor:
        """Return the teacher's logits at some positions (n,) of a block, over the tokens of the other model."""
        assert self.stream is not None
        assert self.head is not None
        whole, device = self.blocks.whole, positions.device
        if whole is not None:
            positions = whole.places[number].to(device)[positions]
        logits = self.head.logits(self.stream[number].to(device).flatten(0, 1)[positions])
        return logits if self.pieces is None else self.pieces.to(device).merged_(logits)


class Comparison:
    """Compares a model that runs with the states of its teacher, block by block."""

    def __init__(self, teacher: TeacherStates) -> None:
        self.teacher = teacher
        self.kl, self.num_agreed, self.num_tokens = 0.0, 0, 0

    @torch.no_grad()
    def observe(self, number: int, hidden: Tensor, head: Head) -> None:
        """Add the tokens of the block of a number, from the model's states (1, T, hidden); see `perplexity.Observer`.

        Logits are formed for at most `CHUNK_TOKENS` tokens at once, in float32, or in float64 if the states are
        float64. If one vocabulary is padded to a greater length, only the tokens that both models have are compared.
        """
        positions = self.teacher.are_known(number).nonzero().flatten().to(hidden.device)
        for chunk in positions.split(CHUNK_TOKENS):
            logits = [self.teacher.logits(number, chunk), head.logits(hidden.flatten(0, 1)[chunk])]
            vocab = min(each.shape[-1] for each in logits)
            log_p, log_q = (each[:, :vocab].log_softmax(dim=-1) for each in logits)  # (chunk, vocab)
            self.kl += float(kl_terms(log_p, log_q).sum())
            self.num_agreed += int((log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).sum())
            self.num_tokens += len(log_p)

    @property
    def agreement(self) -> Agreement:
        """The means over all tokens of the blocks that were observed."""
        return Agreement(self.kl / self.num_tokens, self.num_agreed / self.num_tokens)


def kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the terms p (log p − log q) of a KL divergence, from logarithms of probabilities of equal shape.

    `distillation.losses.forward_kl_` computes the divergence in place, with its gradient, and rounds otherwise.
    """
    return log_p.exp() * (log_p - log_q)
