"""Compares what an engine computes with what transformers computes from the model folder that was exported."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minitron.errors import UserError
from minitron.model.checkpoint import Checkpoint
from minitron.model.language_model import load_model

TEXTS = (
    "The quick brown fox jumps over the lazy dog, 1,234 times in 56 years; it's what they'll do.",
    "def area(radius: float) -> float:\n    return 3.14159 * radius ** 2  # in m²\n\n\tif x != 0x1F: pass",
    "Größere Übungen für Frühaufsteher — naïve café, garçon, ½ l Öl.",
    "Съешь ещё этих мягких французских булок, да выпей чаю.",
    "敏捷的棕色狐狸跳过了懒狗。素早い茶色の狐がのろまな犬を飛び越える。",
    "الثعلب البني السريع يقفز فوق الكلب الكسول. שועל חום מהיר. तेज़ भूरी लोमड़ी।",
    "🦙🚀 emoji 👩‍💻👍🏽 and   spaces\n\n\nand lines\r\nend",
)
"""English with numbers, code, several scripts, and emoji."""
LARGEST_KL = 0.01
"""The mean KL divergence, in nats per token, above which a file that is not quantised holds another model."""
Divergence = Callable[[Tensor, Any], tuple[Tensor, Tensor]]
"""From log-probabilities (tokens, vocabulary) and an engine's prediction to the KL divergence of each token, and the
token that the engine finds likeliest after it."""


def of_logits(expected: Tensor, logits: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the divergence of an engine's logits (tokens, vocabulary), and its likeliest tokens."""
    predicted = torch.from_numpy(logits).float().log_softmax(-1)
    return (expected.exp() * (expected - predicted)).sum(-1), predicted.argmax(-1)


def agreement(
    checkpoint: Checkpoint,
    sequences: Sequence[list[int]],
    predictions: Iterable[Any],
    *,
    divergence: Divergence = of_logits,
) -> dict[str, Any]:
    """Return how far an engine's predictions of the next tokens of sequences are from those of transformers.

    `kl` is the KL divergence from transformers' distribution to the engine's, in nats, averaged over the `num_tokens`
    tokens of all sequences; `agreement` is the share of tokens after which both find one and the same token likeliest.
    transformers computes in float32 on the CPU.
    """
    model = load_model(checkpoint, torch.device("cpu"), torch.float32)
    kl, agreed, counted = 0.0, 0, 0
    with torch.no_grad():
        for sequence, prediction in zip(sequences, predictions, strict=True):
            expected = model(torch.tensor([sequence])).logits[0].float().log_softmax(-1)
            diverging, likeliest = divergence(expected, prediction)
            kl += float(diverging.sum())
            agreed += int((expected.argmax(-1) == likeliest).sum())
            counted += len(sequence)
    return {"kl": kl / counted, "agreement": agreed / counted, "num_tokens": counted}


def require_agreement(engine: str, figures: dict[str, Any], largest: float = LARGEST_KL) -> None:
    """Check that a file holds the model that was exported, up to a KL divergence that its type explains.

    Raises:
        UserError: the KL divergence is above `largest`, or not a number.
    """
    if not figures["kl"] <= largest:
        raise UserError(f"{engine} computes another function of this model: KL {figures['kl']:.4f} nats per token")
