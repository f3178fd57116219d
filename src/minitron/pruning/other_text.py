"""Text unlike the calibration text, for the moment of the stream: what the model writes itself, and random tokens.

A student that is cut along the directions of one kind of text loses what other texts need, and training on that kind
does not bring it back. Text that a model writes itself is a sample of everything that it was trained on
(docs/studies/token-efficiency.md).
"""

from typing import Any

import torch
from rich.filesize import decimal
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from minitron.data.blocks import Blocks
from minitron.errors import UserError
from minitron.model.checkpoint import Checkpoint
from minitron.model.drawing import drawn_after
from minitron.model.language_model import load_model
from minitron.progress import Progress
from minitron.recipe import CalibrationRecipe
from minitron.runtime import Runtime

SHARE = 1 / 4
"""The number of blocks of each kind of other text, as a share of the blocks of calibration text."""
LENGTH = 128
"""The most tokens of one text that the model writes: longer texts take more steps, and each step reads all weights."""


def other_text(checkpoint: Checkpoint, blocks: Blocks, *, recipe: CalibrationRecipe, runtime: Runtime) -> Blocks:
    """Return blocks that the model writes, and then as many blocks of random tokens.

    Their number is `SHARE` of that of the calibration blocks, or one. Blocks that are longer than `LENGTH` hold several
    texts, one after the other, as calibration blocks do. With `calibration.other_text: random`, there are random tokens
    alone; else the memory holds the model (`require_memory_to_write`).
    """
    num_blocks, vocab_size = max(1, round(SHARE * len(blocks))), checkpoint.arch.axis_size("vocab")
    drawn = random_ids(num_blocks, blocks.context, vocab_size, runtime.seed)
    if recipe.other_text == "random":
        return _blocks_of(drawn)
    model = load_model(checkpoint, runtime.device, _dtype(runtime), runtime.attention)
    length = min(LENGTH, blocks.context)
    texts = written(model, drawn.flatten()[: -(-drawn.numel() // length), None], length, seed=runtime.seed)
    return _blocks_of(torch.cat([texts.flatten()[: drawn.numel()].view_as(drawn), drawn]))


def require_memory_to_write(checkpoint: Checkpoint, recipe: CalibrationRecipe, runtime: Runtime) -> None:
    """Check that a model that has to write text fits in the memory of its device, before any work.

    Raises:
        UserError: it does not.
    """
    needed, free = checkpoint.arch.num_parameters * _dtype(runtime).itemsize, runtime.free_memory
    if recipe.other_text == "written" and free is not None and needed > free:
        raise UserError(
            f"{checkpoint.folder.name} writes text for its calibration, and takes {decimal(needed)} in memory, where "
            f"{decimal(free)} are free; --set calibration.other_text=random needs one layer at a time"
        )


def written(model: Any, first: Tensor, length: int, *, seed: int) -> Tensor:
    """Return tokens (N, length): the first ones (N, 1), and what the model draws after them at temperature 1.

    This is how LLM-QAT (arXiv 2305.17888) makes text for training, and arXiv 2410.17170 for calibration.
    """
    if length == 1:
        return first
    device = next(model.parameters()).device
    ours = torch.random.fork_rng([device] if device.type == "cuda" else [])
    with Progress("write other text", first.numel() * (length - 1)) as progress, ours:
        torch.manual_seed(seed)
        return drawn_after(model, first, length - 1, StoppingCriteriaList([_Advance(progress)])).cpu()


def random_ids(num_blocks: int, context: int, vocab_size: int, seed: int) -> Tensor:
    """Return tokens (num_blocks, context) drawn at random from the vocabulary."""
    return torch.randint(vocab_size, (num_blocks, context), generator=torch.Generator().manual_seed(seed))


class _Advance(StoppingCriteria):  # type: ignore[misc]
    """Show the progress of a generation, and never stop it."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.progress.advance(len(input_ids))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _blocks_of(ids: Tensor) -> Blocks:
    return Blocks(ids, torch.zeros_like(ids, dtype=torch.int32))


def _dtype(runtime: Runtime) -> torch.dtype:
    """Return the dtype in which a model writes: on CPUs, products of few rows in half precision are slow."""
    return runtime.dtype if runtime.device.type == "cuda" else runtime.weights_dtype
