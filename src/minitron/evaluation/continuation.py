"""How a model goes on from some tokens: for people to read, not a figure."""

from typing import Any

import torch
from torch import Tensor

PROMPT_TOKENS = 16
NUM_TOKENS = 32


@torch.no_grad()
def continuation(model: Any, tokenizer: Any, ids: Tensor) -> str:
    """The likeliest next token, 32 times over, after the prompt `ids` (1, T); prompt and continuation as text."""
    device = next(model.parameters()).device
    prompt = ids.to(device)
    found = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NUM_TOKENS, do_sample=False,
        pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
    )  # fmt: skip
    return str(tokenizer.decode(found[0].tolist()))
