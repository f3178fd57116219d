"""Measures a model: perplexity, agreement with a teacher, speed, peak memory, generated text and multiple choice."""

from typing import Any

from minitron.data.blocks import Blocks
from minitron.data.tokens import load_tokenizer
from minitron.errors import courtesy
from minitron.evaluation.agreement import Comparison, TeacherStates
from minitron.evaluation.generation import PROMPT_TOKENS, greedy_continuation
from minitron.evaluation.perplexity import measure_perplexity
from minitron.model.checkpoint import Checkpoint
from minitron.progress import Progress

__all__ = ["measure"]


def measure(
    model: Any,
    checkpoint: Checkpoint,
    blocks: Blocks,
    *,
    stage: str,
    num_samples: int = 0,
    observer: TeacherStates | Comparison | None = None,
) -> dict[str, Any]:
    """Return the parameter counts of a model and its perplexity and speed on `blocks`, as `eval.json` holds them.

    With `num_samples`, the figures also hold the text that the model generates after the first tokens of each of the
    first `num_samples` blocks. An `observer` keeps the states of a teacher, or compares the model with such states,
    which adds the KL and the agreement. `stage` is the name under which progress is shown.
    """
    observe = observer.observe if observer else None
    with Progress(stage, blocks.num_tokens) as progress:
        figures = measure_perplexity(model, blocks, advance=progress.advance, observe=observe).to_dict()
    if isinstance(observer, Comparison):
        figures |= observer.agreement.to_dict()
    if num_samples:
        with courtesy("generated text"):
            tokenizer = load_tokenizer(checkpoint.folder)
            prompts = blocks.ids[:num_samples, :PROMPT_TOKENS].split(1)
            figures["samples"] = [greedy_continuation(model, tokenizer, prompt) for prompt in prompts]
    return {
        "num_parameters": checkpoint.arch.num_parameters,
        "num_non_embedding_parameters": checkpoint.arch.num_non_embedding_parameters,
        **figures,
    }
