"""Perplexity and bits per byte over blocks, without holding tokens × vocabulary."""

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minitron.data.blocks import Blocks
from minitron.errors import UserError
from minitron.model.language_model import Head, Headless

CHUNK_TOKENS = 256


@dataclass(frozen=True)
class Perplexity:
    """Figures of one model on some blocks; every block is a context of its own."""

    perplexity: float
    bits_per_byte: float
    num_tokens: int
    """Tokens predicted: all but the first of each block, in chats those of the assistant."""
    context: int
    tokens_per_second: float
    """Of the forward passes of this measurement, batch 1."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@torch.no_grad()
def measure_perplexity(model: nn.Module, blocks: Blocks, advance: Callable[[int], None] = lambda _: None) -> Perplexity:
    """Run the blocks through a causal language model, one at a time; `advance` is told of tokens done.

    Raises:
        UserError: a logit is NaN.
    """
    headless = model if isinstance(model, Headless) else Headless(model)
    device = next(model.parameters()).device
    nll = torch.zeros((), dtype=torch.float64, device=device)
    started = time.perf_counter()
    for block in blocks.split(1):
        nll += headless(block.ids.to(device), partial(next_token_nll, targets=block.targets.to(device)))
        advance(block.num_tokens)
    if torch.isnan(nll):
        raise UserError("the model gives NaN: its weights are broken, or the dtype is too small for it")
    is_counted = blocks.targets >= 0
    mean = float(nll) / max(1, num_tokens := int(is_counted.sum()))
    seconds = time.perf_counter() - started
    return Perplexity(
        perplexity=math.exp(min(mean, 700.0)),
        bits_per_byte=float(nll) / math.log(2) / max(1, int(blocks.num_bytes[:, 1:][is_counted[:, :-1]].sum())),
        num_tokens=num_tokens,
        context=blocks.context,
        tokens_per_second=blocks.num_tokens / seconds,
    )


def next_token_nll(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """Negative log-likelihood in nats, summed over the predicted tokens, as a float64 scalar.

    hidden (B, T, hidden), targets (B, T), each position's next token, negative where none is counted; logits are formed
    in float32 (or float64 when the states are) for at most `CHUNK_TOKENS` tokens at once, and again for the gradient
    where there is one.
    """
    is_counted = targets >= 0
    states, labels = hidden[is_counted], targets[is_counted]
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        for part, of_part in zip(states.split(CHUNK_TOKENS), labels.split(CHUNK_TOKENS), strict=True):
            total = (
                total
                + checkpoint(
                    _chunk_nll, part.to(dtype), head, of_part, use_reentrant=False, preserve_rng_state=False
                ).double()
            )
    return total


def _chunk_nll(states: Tensor, head: Head, labels: Tensor) -> Tensor:
    logits = states @ head.weight.to(states.dtype).T  # (chunk, vocab)
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return nn.functional.cross_entropy(logits, labels, reduction="sum")
