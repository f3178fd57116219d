"""Rounds the matrices of a graph to integers of eight bits, with ONNX Runtime's own tool."""

import logging
from pathlib import Path
from typing import Any

from minitron.formats.onnx.graph import quiet, write_graph
from minitron.progress import Progress

BLOCK = 32
"""The number of weights that share a scale."""
WITH_INTEGERS = 4
"""The level of accuracy at which ONNX Runtime rounds activations to eight bits, too, and multiplies integers.

At others it makes each matrix in float32 again, and takes about eight times as long for a token as without rounding.
"""


def store_transposed(graph: Any) -> None:
    """Store the matrices of a graph that it would transpose while it runs, so that they can be rounded.

    In a tied model that is the embeddings, which the graph reads in two layouts: they are stored twice from then on.
    """
    from onnxscript.optimizer import fold_constants

    fold_constants(graph, input_size_limit=2**62, output_size_limit=2**62, should_fold=_is_transposed_weight)


def quantise(source: Path, target: Path) -> None:
    """Write a copy of a graph with its matrices in integers of eight bits; embeddings keep their type."""
    import onnx_ir

    tools = _tools()
    with Progress("round to int8"), quiet():
        tool = tools.MatMulNBitsQuantizer(
            str(source), bits=8, block_size=BLOCK, is_symmetric=True, accuracy_level=WITH_INTEGERS
        )
        tool.process()
        write_graph(onnx_ir.from_proto(tool.model.model), target)


def _tools() -> Any:
    """Import ONNX Runtime's tool, which sets up logging for the whole process when it is imported."""
    level, handlers = logging.root.level, list(logging.root.handlers)
    from onnxruntime.quantization import matmul_nbits_quantizer

    logging.root.setLevel(level)
    logging.root.handlers = handlers
    return matmul_nbits_quantizer


def _is_transposed_weight(node: Any) -> bool:
    return bool(node.op_type == "Transpose" and node.inputs[0].is_initializer())
