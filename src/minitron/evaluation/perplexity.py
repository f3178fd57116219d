"""Measures perplexity and bits per byte over blocks, without holding tokens × vocabulary."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minitron.data.blocks import Blocks
from minitron.errors import UserError
from minitron.model.language_model import Head, Headless

CHUNK_TOKENS = 256
"""The number of tokens whose logits are formed at once."""

Observer = Callable[[int, Tensor, Head], None]
"""Receives the number of a block, its last hidden states (1, T, hidden) and the head that makes logits of them."""


@dataclass(frozen=True)
class Perplexity:
    """Figures of one model on some blocks; every block is a context of its own."""

    perplexity: float
    bits_per_byte: float
    num_tokens: int
    """The number of predicted tokens: all but the first of each block, and in chats those of the assistant."""
    context: int
    """The number of tokens in a block."""
    tokens_per_second: float
    """Speed of this measurement at batch size 1, an observer's work included."""

    def to_dict(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        return asdict(self)


@torch.no_grad()
def measure_perplexity(
    model: nn.Module,
    blocks: Blocks,
    *,
    advance: Callable[[int], None] = lambda _: None,
    observe: Observer | None = None,
) -> Perplexity:
    """Run the blocks through a causal language model, one at a time; `advance` receives the number of tokens done.

    `observe` sees the last hidden states of every block, so that one pass serves several measurements.

    Raises:
        UserError: a logit is NaN; or the blocks hold no token to predict, see `Blocks.require_targets`.
    """
    blocks.require_targets("perplexity")
    headless = model if isinstance(model, Headless) else Headless(model)
    device = next(model.parameters()).device
    nll = torch.zeros((), dtype=torch.float64, device=device)
    started = time.perf_counter()
    for number, block in enumerate(blocks.split(1)):
        targets = block.targets.to(device)

        def read(hidden: Tensor, head: Head, number: int = number, targets: Tensor = targets) -> Tensor:
            if observe is not None:
                observe(number, hidden, head)
            return next_token_nll(hidden, head, targets)

        positions = None if block.positions is None else block.positions.to(device)
        nll += headless(block.ids.to(device), read, positions)
        advance(block.num_tokens)
    if torch.isnan(nll):
        raise UserError("the model's logits are NaN: its weights are broken, or the dtype is too small for it")
    is_counted = blocks.targets >= 0
    mean = float(nll) / (num_tokens := int(is_counted.sum()))
    seconds = time.perf_counter() - started
    return Perplexity(
        perplexity=math.exp(min(mean, 700.0)),
        bits_per_byte=float(nll) / math.log(2) / max(1, int(blocks.num_bytes[:, 1:][is_counted[:, :-1]].sum())),
        num_tokens=num_tokens,
        context=blocks.context,
        tokens_per_second=blocks.num_tokens / seconds,
    )


def next_token_nll(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """Return the negative log-likelihood of the targets in nats, summed, as a float64 scalar.

    `hidden` is (B, T, hidden). `targets` (B, T) holds the next token of each position, negative where none is counted.
    Logits are formed for at most `CHUNK_TOKENS` tokens at once, in float32, or in float64 if the states are float64,
    and formed again in the backward pass.
    """
    is_counted = targets >= 0
    states, labels = hidden[is_counted], targets[is_counted]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for chunk, chunk_labels in zip(states.split(CHUNK_TOKENS), labels.split(CHUNK_TOKENS), strict=True):
            args = (_chunk_nll, chunk.to(dtype), head, chunk_labels)
            total = total + checkpoint(*args, use_reentrant=False, preserve_rng_state=False).double()
    return total


def _chunk_nll(states: Tensor, head: Head, labels: Tensor) -> Tensor:
    return nn.functional.cross_entropy(head.logits(states), labels, reduction="sum")
