"""Our own measures of a model: perplexity, agreement with a teacher, speed, generated text, multiple choice."""

from typing import Any

from minitron.data.blocks import Blocks, load_tokenizer
from minitron.evaluation.continuation import PROMPT_TOKENS, continuation
from minitron.evaluation.perplexity import measure_perplexity
from minitron.model.checkpoint import Checkpoint
from minitron.progress import Progress

__all__ = ["measure"]


def measure(model: Any, checkpoint: Checkpoint, blocks: Blocks, *, stage: str, num_samples: int = 0) -> dict[str, Any]:
    """Return a model's parameter counts, perplexity and speed on some blocks, as `eval.json` holds them.

    With `num_samples`, also the texts that the model generates after the beginnings of as many blocks.
    """
    with Progress(stage, blocks.num_tokens) as progress:
        figures = measure_perplexity(model, blocks, progress.advance).to_dict()
    if num_samples:
        tokenizer = load_tokenizer(checkpoint.folder)
        prompts = blocks.ids[:num_samples, :PROMPT_TOKENS].split(1)
        figures["samples"] = [continuation(model, tokenizer, prompt) for prompt in prompts]
    return {
        "num_parameters": checkpoint.arch.num_parameters,
        "num_non_embedding_parameters": checkpoint.arch.num_non_embedding_parameters,
        **figures,
    }
