"""Compares the next-token distributions of a model and its teacher, without holding tokens × vocabulary."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minitron.data.blocks import Blocks
from minitron.model.language_model import Headless

CHUNK_TOKENS = 256
"""The number of tokens whose logits are formed at once."""


@dataclass(frozen=True)
class Agreement:
    """Figures of a model and its teacher, over all tokens that are predicted."""

    kl: float
    """KL divergence Σ p (log p − log q) in nats per token, with p the teacher's distribution and q the model's."""
    top1: float
    """Share of tokens for which both models find the same next token likeliest."""

    def to_dict(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        return asdict(self)


@torch.no_grad()
def measure_agreement(
    model: nn.Module, teacher: nn.Module, blocks: Blocks, advance: Callable[[int], None] = lambda _: None
) -> Agreement:
    """Run the blocks through both models, one block at a time; `advance` receives the number of tokens done.

    If one vocabulary is padded to a greater length, only the tokens that both models have are compared.

    Raises:
        UserError: the blocks hold no token to predict, see `Blocks.require_targets`.
    """
    blocks.require_targets("agreement")
    models, device = [Headless(teacher), Headless(model)], next(model.parameters()).device
    kl, agreed, counted = 0.0, 0, 0
    for block in blocks.split(1):
        is_counted = (block.targets >= 0).to(device)
        outputs = [
            each(block.ids.to(device), lambda hidden, head, mask=is_counted: (hidden[mask], head)) for each in models
        ]
        for start in range(0, int(is_counted.sum()), CHUNK_TOKENS):
            chunk = slice(start, start + CHUNK_TOKENS)
            logits = [head.logits(hidden[chunk]) for hidden, head in outputs]
            vocab = min(each.shape[-1] for each in logits)
            log_p, log_q = (each[:, :vocab].log_softmax(dim=-1) for each in logits)  # (chunk, vocab)
            kl += float(kl_terms(log_p, log_q).sum())
            agreed += int((log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).sum())
            counted += len(log_p)
        advance(block.num_tokens)
    return Agreement(kl / counted, agreed / counted)


def kl_terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Return the terms p (log p − log q) of a KL divergence, from logarithms of probabilities of equal shape.

    `distillation.losses.forward_kl_` computes the divergence in place, with its gradient, and rounds otherwise.
    """
    return log_p.exp() * (log_p - log_q)
