"""Continues texts with tokens that a model draws from its own distribution."""

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteriaList


@torch.no_grad()
def drawn_after(model: Any, prompts: Tensor, length: int, criteria: StoppingCriteriaList | None = None) -> Tensor:
    """Draw `length` tokens at temperature 1 after each of the prompts (B, T); return both, (B, T + length).

    The settings of generation in the checkpoint (penalties, top-k, tokens that end a text) do not count. Logits that
    are NaN count as 0: what uses the text reports them.
    """
    sampling = GenerationConfig(
        max_new_tokens=length, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, remove_invalid_values=True,
        # No token has this number, so that every text has its full length.
        eos_token_id=model.get_output_embeddings().weight.shape[0], pad_token_id=0,
    )  # fmt: skip
    prompts = prompts.to(next(model.parameters()).device)
    output: Tensor = model.generate(
        inputs=prompts,
        attention_mask=torch.ones_like(prompts),
        generation_config=sampling,
        stopping_criteria=criteria,
    )
    return output
