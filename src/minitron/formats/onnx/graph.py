"""A transformers model as one ONNX graph, which reads a prompt and continues it with the keys and values so far.

Inputs and outputs have the names that Optimum and Transformers.js expect of a decoder: `input_ids`, `attention_mask`,
`position_ids` and `past_key_values.{layer}.key` and `.value` go in, `logits` and `present.{layer}.key` and `.value`
come out. Keys and values are of shape (batch, key-value heads, tokens, channels of a head), without a past of 0 tokens.
"""

import io
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from minitron.errors import UserError
from minitron.progress import Progress

BATCH, PAST, NEW = 2, 5, 3
"""Sizes of the example that is traced: sizes of 1 would become constants of the graph."""
OPSET = 21
"""The version of ONNX's operators, the first that ONNX Runtime's tool for rounding accepts without a change."""


def trace(model: Any) -> Any:
    """Return the graph of a causal language model as an `onnx_ir.Model`, by the exporter of transformers.

    Sequences, their length, and the length of their past may be of any number. Sliding windows are part of the graph:
    the masks of their layers apply them, and the keys and values of all tokens are kept.

    Raises:
        UserError: the model computes something that the exporter cannot put into a graph.
    """
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from transformers.exporters import OnnxConfig, OnnxExporter

    any_size = torch.export.Dim.AUTO
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("new")}
    kept = {0: sizes[0], 2: torch.export.Dim("past")}
    example = _example(model)
    shapes = {
        "input_ids": sizes,
        "attention_mask": {0: sizes[0], 1: any_size},
        "position_ids": sizes,
        "past_key_values": [kept] * (2 * len(example["past_key_values"])),
    }
    with Progress("trace the model"), quiet():
        config = OnnxConfig(dynamic=True, dynamic_shapes=shapes, opset_version=OPSET)
        try:
            graph, _ = OnnxExporter().export_program(model, example, config)
        except Exception as error:  # of torch's, onnxscript's and transformers' own kinds
            reason = " ".join(str(error).split())[:300]
            raise UserError(f"transformers cannot trace this {model.config.model_type} model: {reason}") from error
    ClearMetadataAndDocStringPass()(graph)  # every node's place in the sources, with the paths of this machine
    for value in (*graph.graph.inputs, *graph.graph.outputs):
        value.name = _usual(value.name)
    _name_sizes(graph.graph)
    return graph


def write_graph(graph: Any, path: Path) -> None:
    """Write a graph, its weights in a file beside it, which may be larger than the 2 GB of a file of protobuf."""
    import onnx_ir

    onnx_ir.save(graph, path, external_data=data_of(path).name)


def data_of(path: Path) -> Path:
    """Return the file with the weights of a graph, where Transformers.js looks for it."""
    return path.with_name(f"{path.name}_data")


def _example(model: Any) -> dict[str, Any]:
    """Return tokens that follow a past, with the past's keys and values as the model itself makes them."""
    vocabulary = model.config.vocab_size
    tokens = torch.arange(BATCH * (PAST + NEW)).remainder(vocabulary).reshape(BATCH, -1)
    # A cache of one kind for all layers: one that drops what a window has left could be traced for one length only.
    cache = DynamicCache()
    with torch.no_grad():
        model(tokens[:, :PAST], past_key_values=cache, use_cache=True)
    return {
        "input_ids": tokens[:, PAST:].contiguous(),
        "attention_mask": torch.ones_like(tokens),
        "position_ids": torch.arange(PAST, PAST + NEW).repeat(BATCH, 1),
        "past_key_values": cache,
    }


def _usual(name: str) -> str:
    """Return the usual name of an input or output that transformers names by its place in the cache."""
    place = re.fullmatch(r"(input|output)\.past_key_values\.layers\.(\d+)\.(key|value)s", name)
    if place is None:
        return name
    side, layer, kind = place.groups()
    return f"{'past_key_values' if side == 'input' else 'present'}.{layer}.{kind}"


def _name_sizes(graph: Any) -> None:
    """Give the sizes that may be any number their usual names, by which Transformers.js makes the empty past."""
    import onnx_ir

    shapes = {value.name: value.shape for value in graph.inputs}
    sizes = (
        (shapes["input_ids"], ("batch_size", "sequence_length")),
        (shapes["attention_mask"], (None, "total_sequence_length")),
        (shapes["past_key_values.0.key"], (None, None, "past_sequence_length")),
    )
    names = {str(shape[axis]): name for shape, words in sizes for axis, name in enumerate(words) if name}

    def usual(size: Any) -> Any:
        if not isinstance(size, onnx_ir.SymbolicDim) or size.value is None:
            return size
        return re.sub(r"\w+", lambda word: names.get(word[0], word[0]), size.value)

    for value in (*graph.inputs, *(output for node in graph.all_nodes() for output in node.outputs)):
        if value.shape is not None:
            value.shape = onnx_ir.Shape([usual(size) for size in value.shape])


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the libraries' notes off the terminal: which versions they were tested with, each of their own steps."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
