"""Noise on the embeddings of a model while it is trained (NEFTune, arXiv 2310.05914, section 2)."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def add_noise(embeddings: nn.Module, alpha: float) -> None:
    """Add uniform noise of at most α / √(T·hidden) to embeddings (B, T, hidden) wherever a gradient is computed."""
    embeddings.register_forward_hook(partial(_noisy, alpha))


def _noisy(alpha: float, _: nn.Module, __: Any, output: Tensor) -> Tensor | None:
    if not torch.is_grad_enabled():  # figures are those of the model itself
        return None
    most = alpha / (output.shape[1] * output.shape[2]) ** 0.5
    return output + torch.empty_like(output).uniform_(-most, most)
