"""Reads an exported folder back in transformers, and compares it with the model that it was made of."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from minitron.data.blocks import Blocks
from minitron.errors import UserError
from minitron.evaluation import measure
from minitron.evaluation.agreement import Comparison, TeacherStates
from minitron.model import schemes
from minitron.model.checkpoint import Checkpoint
from minitron.model.language_model import module_of
from minitron.model.schemes import SCALE_DTYPE, Scheme
from minitron.progress import Progress
from minitron.recipe import data_in_words
from minitron.run import versions
from minitron.session import Session


def compare(session: Session, folder: Path, scheme: Scheme) -> dict[str, Any]:
    """Return what transformers computes from a folder, beside what the session's model computes, on evaluation text.

    transformers dequantises the weights, and its linear modules round their inputs as the folder states it; it rounds
    no inputs of experts. KL and agreement are those of `evaluation.agreement.Agreement`, with the session's model as
    the teacher. One model is in memory at a time.

    Raises:
        UserError: transformers holds another value in a matrix than the one that it was rounded to.
    """
    checkpoint, blocks, runtime = session.teacher, session.splits.evaluation, session.runtime
    states = TeacherStates(blocks)
    with session.teacher_model() as model:
        before = measure(model, checkpoint, blocks, stage="evaluate before", observer=states)
    model = load_quantised(folder, session, blocks)
    equal = _require_rounded(model, checkpoint, scheme)
    after = measure(model, checkpoint, blocks, stage=f"evaluate {scheme.name}", observer=Comparison(states))
    has_experts = any(row.is_per_expert for row in schemes.quantised_rows(checkpoint.arch))
    inputs = "rounded, but not those of experts" if has_experts else "rounded"
    return {
        "engine": f"transformers {version('transformers')} with compressed-tensors {version('compressed-tensors')}",
        "inputs": inputs if scheme.activations else "as they are",
        "matrices_equal": equal,
        "perplexity_before": before["perplexity"],
        "perplexity": after["perplexity"],
        "kl": after["kl"],
        "agreement": after["top1"],
        "num_tokens": after["num_tokens"],
        "context": blocks.context,
        "data": data_in_words(session.recipe.data),
        "seed": session.recipe.seed,
        "device": str(runtime.device),
        "dtype": runtime.dtype_name,
        "versions": versions(),
    }


def load_quantised(folder: Path, session: Session, blocks: Blocks) -> Any:
    """Return transformers' model of an exported folder, its weights dequantised, as its first pass leaves them."""
    runtime = session.runtime
    with Progress(f"load {folder.name}"), _without_bars():
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=runtime.dtype,
            attn_implementation=runtime.attention,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
        model = model.to(runtime.device).eval()
        with torch.no_grad():
            model(input_ids=blocks.ids[:1, :1].to(runtime.device), use_cache=False)
    return model


@contextmanager
def _without_bars() -> Iterator[None]:
    """Discard the progress bars that compressed-tensors draws; a bar of this project covers them."""
    with open(os.devnull, "w", encoding="utf-8") as nothing, redirect_stderr(nothing):
        yield


def _require_rounded(model: Any, checkpoint: Checkpoint, scheme: Scheme) -> int:
    """Check that a model's linear modules hold the values that their matrices are rounded to; return how many do.

    Matrices of experts are not compared: transformers joins them.
    """
    rows = [row for row in schemes.quantised_rows(checkpoint.arch) if not row.is_per_expert]
    places = [place for place in checkpoint.arch.places() if place.row in rows]
    with Progress("compare weights", len(places), "matrices") as progress:
        for row, layer, _ in places:
            weight = checkpoint.tensor(row.tensor_name(layer))
            expected = schemes.rounded(weight, schemes.scales(weight, scheme), scheme)
            held: Any = module_of(model, row, layer).weight
            if not torch.equal(held.detach().cpu().to(SCALE_DTYPE), expected):
                raise UserError(f"transformers reads other values of {row.tensor_name(layer)} than were written")
            progress.advance(1)
    return len(places)
