"""How far one model's next-token distributions are from another's, without holding tokens × vocabulary."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from minitron.data.blocks import Blocks
from minitron.model.language_model import Headless

CHUNK_TOKENS = 256


@dataclass(frozen=True)
class Agreement:
    """Of a model with its teacher, over all tokens whose next one is predicted."""

    kl: float
    """KL of the model's distribution from the teacher's, nats a token."""
    top1: float
    """Share of tokens where both hold the same next token for the likeliest."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@torch.no_grad()
def measure_agreement(
    model: nn.Module, teacher: nn.Module, blocks: Blocks, advance: Callable[[int], None] = lambda _: None
) -> Agreement:
    """Run the blocks through both models, one at a time; `advance` is told of tokens done.

    Where one vocabulary is padded to be longer, the tokens that both have are compared.
    """
    pair, device = [Headless(teacher), Headless(model)], next(model.parameters()).device
    kl, agreed, counted = 0.0, 0, 0
    for block in blocks.split(1):
        is_counted = (block.targets >= 0).to(device)
        states = [
            part(block.ids.to(device), lambda hidden, head, mask=is_counted: (hidden[mask], head)) for part in pair
        ]
        for start in range(0, int(is_counted.sum()), CHUNK_TOKENS):
            part = slice(start, start + CHUNK_TOKENS)
            logits = [head.logits(hidden[part]) for hidden, head in states]
            vocab = min(each.shape[-1] for each in logits)
            log_p, log_q = (each[:, :vocab].log_softmax(dim=-1) for each in logits)
            kl += float((log_p.exp() * (log_p - log_q)).sum())
            agreed += int((log_p.argmax(dim=-1) == log_q.argmax(dim=-1)).sum())
            counted += len(log_p)
        advance(block.num_tokens)
    return Agreement(kl / max(1, counted), agreed / max(1, counted))
