"""Exports a model as an ONNX graph, in a folder that Transformers.js, Optimum and onnxruntime-genai read."""

import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from minitron.data.tokens import load_tokenizer
from minitron.errors import UserError, nearest
from minitron.formats import Request
from minitron.formats.agreement import LARGEST_KL, TEXTS, agreement, require_agreement
from minitron.formats.onnx.companions import write_companions
from minitron.formats.onnx.decoder import Decoder, engine
from minitron.formats.onnx.graph import data_of, trace, write_graph
from minitron.formats.onnx.quantised import quantise, store_transposed
from minitron.model.checkpoint import Checkpoint
from minitron.model.language_model import load_model
from minitron.session import Session

TYPES = {"f32": ("", "fp32"), "f16": ("_fp16", "fp16"), "int8": ("_int8", "int8")}
"""The types of matrices: how the file's name ends, and what Transformers.js calls the type."""
ROUNDED = "int8"
LARGEST_KL_OF = {"f32": LARGEST_KL, "f16": 10 * LARGEST_KL, "int8": math.inf}
"""The KL divergence, in nats per token, above which a graph in a type holds another model.

In f16 activations are rounded too, at tokens with a large residual stream to few digits, in transformers as here.
"""


def export(session: Session, folder: Path, request: Request) -> dict[str, Any]:
    """Write onnx/model.onnx with its weights, configs and the tokenizer into an existing folder.

    Returns what was written and checked. By default matrices are float32, which holds bfloat16 exactly and which ONNX
    Runtime computes with on every processor; a model in float16 keeps its type.

    Raises:
        UserError: the graph cannot be what transformers computes, or the check finds that it is not.
    """
    checkpoint = session.teacher
    type = request.quantize or ("f16" if checkpoint.dtype == torch.float16 else "f32")
    require_graph(checkpoint, type)
    tokenizer = load_tokenizer(checkpoint.folder)
    ending, dtype = TYPES[type]
    path = folder / "onnx" / f"model{ending}.onnx"
    path.parent.mkdir()
    write_model(checkpoint, path, type)
    write_companions(folder, path, checkpoint, tokenizer=tokenizer, dtype=dtype)
    return {
        "file": str(path.relative_to(folder)),
        "type": type,
        "written_by": {library: version(library) for library in ("transformers", "torch", "onnxscript")},
        "num_bytes": path.stat().st_size + data_of(path).stat().st_size,
        "checked": check(checkpoint, tokenizer, path, type=type) if request.checks else None,
    }


def require_graph(checkpoint: Checkpoint, type: str) -> None:
    """Check that a model can be one graph whose state is the keys and values of its layers, in a type of `TYPES`.

    Raises:
        UserError: it cannot; the message is one line that names the reason.
    """
    arch, config = checkpoint.arch, checkpoint.config
    if type not in TYPES:
        raise UserError(f"--quantize {type}: {nearest(type, list(TYPES))}")
    if "mhead" in arch.axes:
        raise UserError(
            f"--format onnx does not take {arch.model_type} models: the usual inputs and outputs of a decoder are keys "
            "and values, and layers with Mamba have other states"
        )
    rope = getattr(config, "rope_parameters", None) or {}
    if "dynamic" in {entry.get("rope_type") for entry in (rope, *rope.values()) if isinstance(entry, dict)}:
        raise UserError(
            "--format onnx does not take rope_type dynamic: its frequencies depend on the length of the text"
        )
    if type == ROUNDED and ("expert" in arch.axes or arch.family.is_transposed):
        raise UserError(
            f"--quantize {type}: ONNX Runtime's tool leaves most matrices of {arch.model_type} models as they are, "
            "since it rounds plain products of matrices only: f16 halves them"
        )


def write_model(checkpoint: Checkpoint, path: Path, type: str) -> None:
    """Write the graph of a model, with the matrices in a type of `TYPES`."""
    dtype = torch.float16 if type == "f16" else torch.float32
    graph = trace(load_model(checkpoint, torch.device("cpu"), dtype))
    if type != ROUNDED:
        write_graph(graph, path)
        return
    store_transposed(graph)
    whole = path.with_name(".whole.onnx")
    write_graph(graph, whole)
    del graph  # and the model with it: the tool holds another copy
    quantise(whole, path)
    whole.unlink()
    data_of(whole).unlink()


def check(checkpoint: Checkpoint, tokenizer: Any, path: Path, *, type: str) -> dict[str, Any]:
    """Return how far ONNX Runtime's logits are from transformers' on the built-in texts.

    The first half of each text is read at once, the rest token by token, with the keys and values so far.

    Raises:
        UserError: the graph computes another function.
    """
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    logits = list(map(Decoder(path).logits, ids))  # before transformers' own copy of the model is in memory
    compared = agreement(checkpoint, ids, logits)
    require_agreement("onnxruntime", compared, LARGEST_KL_OF[type])
    return {"engine": engine(), **compared, "texts": len(ids)}
