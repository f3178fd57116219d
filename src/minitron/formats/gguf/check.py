"""Compares a GGUF file in llama.cpp with the model folder that it was made of, in transformers."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron.errors import UserError
from minitron.formats.agreement import TEXTS, agreement, require_agreement
from minitron.formats.gguf import llama_cpp
from minitron.model.checkpoint import Checkpoint

LIKELIEST = 4096
"""The number of tokens whose probabilities are compared one by one. All others are one class, which can only lower the
divergence."""


def compare(path: Path, checkpoint: Checkpoint, tokenizer: Any, *, is_quantised: bool) -> dict[str, Any]:
    """Return how far llama.cpp's model is from transformers' on the built-in texts, and whether tokens are equal.

    Raises:
        UserError: the file is not quantised, and llama.cpp computes another function or reads other tokens.
    """
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    reading = llama_cpp.read(path, list(TEXTS), ids, likeliest=LIKELIEST)
    equal = sum(ours == theirs for ours, theirs in zip(ids, reading.ids, strict=True))
    figures = {
        "engine": f"llama.cpp (xllamacpp {reading.version})",
        **agreement(checkpoint, ids, reading.predictions, divergence=of_likeliest),
        "texts": len(TEXTS),
        "texts_with_equal_tokens": equal,
    }
    if not is_quantised:
        require_agreement("llama.cpp", figures)
    if equal < len(TEXTS):
        other = next(text for text, a, b in zip(TEXTS, ids, reading.ids, strict=True) if a != b)
        raise UserError(f"llama.cpp reads other tokens than transformers, for example in {other[:40]!r}")
    return figures


def of_likeliest(expected: Tensor, prediction: llama_cpp.Prediction) -> tuple[Tensor, Tensor]:
    """Return the divergence of predictions, and the likeliest tokens; see `agreement.Divergence`."""
    return divergence(expected, prediction), torch.from_numpy(prediction.tokens[:, 0])


def divergence(expected: Tensor, prediction: llama_cpp.Prediction) -> Tensor:
    """Return the KL divergence of predictions from the expected log-probabilities (tokens, vocabulary), token by token.

    Tokens that llama.cpp does not list among its likeliest are one class.
    """
    q = torch.from_numpy(prediction.log_probabilities).float()
    p = expected.gather(1, torch.from_numpy(prediction.tokens))
    listed = (p.exp() * (p - q)).sum(-1)
    if p.shape[1] == expected.shape[1]:
        return listed
    others_p, others_q = ((1 - each.exp().sum(-1)).clamp(min=1e-9) for each in (p, q))
    return listed + others_p * (others_p / others_q).log()
