"""Measures how large the inputs of the quantised matrices are, layer by layer, one layer in memory at a time."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minitron.errors import UserError
from minitron.model.anatomy import Row
from minitron.model.schemes import quantised_rows
from minitron.progress import Progress
from minitron.pruning.layers import Layer, Layers
from minitron.session import Session

Largest = dict[tuple[Row, int], float]
"""The largest magnitude of the inputs of a row's matrix in a layer.

vLLM joins matrices that read one activation (query, key and value; gate and up) and rounds it with one scale. Here each
of them has the largest magnitude of that activation, so that their scales agree.
"""


@torch.no_grad()
def largest_inputs(session: Session) -> Largest:
    """Run the calibration blocks of a session through its teacher, and return the largest inputs of every matrix.

    Raises:
        UserError: an activation is NaN or infinite.
    """
    checkpoint, runtime, blocks = session.teacher, session.runtime, session.calibration_blocks
    layers, depth = Layers.of(checkpoint, runtime), checkpoint.arch.axis_size("layer")
    seen: dict[tuple[Row, int], Tensor] = {}
    with Progress("measure inputs", depth * blocks.num_tokens, "tokens × layers") as progress:
        stream = layers.embedded(blocks)
        for number in range(depth):
            layer = layers.load(number)
            progress.note(f"layer {number + 1} of {depth}")
            with _reading(layer, seen):
                for i in range(len(blocks)):
                    stream[i] = layer(stream[i].to(runtime.device))
                    progress.advance(blocks.context)
    for (row, number), value in seen.items():
        if not torch.isfinite(value):
            raise UserError(
                f"the inputs of {row.tensor_name(number)} are not finite in {runtime.dtype_name}: a weight is "
                "broken, or the dtype is too small for the model"
            )
    return {place: float(value) for place, value in seen.items()}


@contextmanager
def _reading(layer: Layer, seen: dict[tuple[Row, int], Tensor]) -> Iterator[None]:
    """Add the largest inputs of a layer's matrices to those that were seen, while the block runs."""
    with ExitStack() as hooks:
        for row in quantised_rows(layer.arch):
            if row.kind in {None, layer.arch.layer_kind(layer.number)}:
                hooks.callback(_input_hook(layer.module_of(row), (row, layer.number), seen).remove)
        yield


def _input_hook(module: nn.Module, place: tuple[Row, int], seen: dict[tuple[Row, int], Tensor]) -> RemovableHandle:
    return module.register_forward_pre_hook(lambda _, inputs: _see(seen, place, inputs[0]))


def _see(seen: dict[tuple[Row, int], Tensor], place: tuple[Row, int], value: Tensor) -> None:
    # Of magnitudes, the maximum keeps NaN and infinity.
    largest = value.detach().abs().amax().float().cpu()
    seen[place] = torch.maximum(seen[place], largest) if place in seen else largest
