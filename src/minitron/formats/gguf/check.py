"""Compares a GGUF file in llama.cpp with the model folder that it was made of, in transformers."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from minitron.errors import UserError
from minitron.formats.gguf import llama_cpp
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


def compare(path: Path, checkpoint: Checkpoint, tokenizer: Any, *, is_quantised: bool) -> dict[str, Any]:
    """Return how far llama.cpp's model is from transformers' on the built-in texts, and whether tokens are equal.

    The KL divergence is that of llama.cpp's distribution of the next token from transformers', in nats, averaged over
    the tokens of all texts; agreement is the share of tokens after which both find one and the same token likeliest.

    Raises:
        UserError: the file is not quantised, and llama.cpp computes another function or reads other tokens.
    """
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    reading = llama_cpp.read(path, list(TEXTS), ids)
    model = load_model(checkpoint, torch.device("cpu"), torch.float32)
    kl, agreed, counted = 0.0, 0, 0
    with torch.no_grad():
        for sequence, logits in zip(ids, reading.logits, strict=True):
            p = model(torch.tensor([sequence])).logits[0].float().log_softmax(-1)
            q = torch.from_numpy(logits).float().log_softmax(-1)
            kl += float((p.exp() * (p - q)).sum())
            agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
            counted += len(sequence)
    equal = sum(ours == theirs for ours, theirs in zip(ids, reading.ids, strict=True))
    figures = {
        "engine": f"llama.cpp (llama-cpp-python {reading.version})",
        "kl": kl / counted,
        "agreement": agreed / counted,
        "num_tokens": counted,
        "texts": len(TEXTS),
        "texts_with_equal_tokens": equal,
    }
    if not is_quantised and not (np.isfinite(kl) and kl / counted <= LARGEST_KL):
        raise UserError(f"llama.cpp computes another function of this model: KL {kl / counted:.4f} nats per token")
    if equal < len(TEXTS):
        other = next(text for text, a, b in zip(TEXTS, ids, reading.ids, strict=True) if a != b)
        raise UserError(f"llama.cpp reads other tokens than transformers, for example in {other[:40]!r}")
    return figures
