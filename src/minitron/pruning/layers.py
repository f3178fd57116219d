"""Runs a checkpoint layer by layer, each layer loaded from disk when it runs: for models larger than memory.

A layer runs inside a model of its own family that has only this layer, so that transformers makes masks, positions and
all other inputs of the layer; this module only puts the residual stream in and takes it out.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from minitron.data.blocks import Blocks
from minitron.data.stream import Stream
from minitron.model.anatomy import Norm, Row
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint
from minitron.model.config import student_config
from minitron.model.language_model import Point, build_model, entering, leaving, module_of, watching
from minitron.runtime import Runtime


@dataclass(frozen=True)
class Layer:
    """One layer in memory, inside a model of one layer; modules are named as in the whole model."""

    number: int
    model: Any
    arch: Arch
    other_inputs: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    """The inputs that the model passes to the layer in addition to the stream, by the number of tokens."""

    def module(self, name: str) -> nn.Module:
        """Return the module of a name in memory, with `{i}` for the layer's number."""
        module: nn.Module = self.model.get_submodule(name.replace("{i}", "0"))
        return module

    def module_of(self, part: Row | Norm) -> nn.Module:
        """Return the module that holds a row's tensor, or that is a norm."""
        return module_of(self.model, part, 0)

    def __call__(self, stream: Tensor) -> Tensor:
        """Return the layer's output for a residual stream (1, T, hidden), of equal shape."""
        context = stream.shape[1]
        if context not in self.other_inputs:  # masks and positions depend on the number of tokens alone
            ids = torch.zeros(1, context, dtype=torch.int64, device=stream.device)
            self.other_inputs[context] = self.inputs(ids)[1:]
        args, kwargs = self.other_inputs[context]
        return leaving(self.module(self.arch.family.layer)(stream, *args, **kwargs))

    def inputs(self, ids: Tensor) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
        """Return what the model passes to the layer for token ids (1, T): the stream, and all other inputs."""
        calls: list[Any] = []

        def stop(_: nn.Module, args: Any, kwargs: Any) -> None:
            calls.append(entering(args, kwargs))
            raise _ReachedError

        handle = self.module(self.arch.family.layer).register_forward_pre_hook(stop, with_kwargs=True)
        with suppress(_ReachedError):
            self.model.base_model(input_ids=ids, use_cache=False)
        handle.remove()
        [call] = calls
        return call  # type: ignore[no-any-return]

    def watched(self, stream: Tensor, points: list[Point]) -> tuple[Tensor, list[Tensor]]:
        """Return the layer's output, and the activations at some points inside it, (1, T, width) each."""
        with watching(points) as activations:
            output = self(stream)
        return output, [value.view(*stream.shape[:-1], -1) for value in activations]

    def within(self, stream: Tensor, points: list[Point]) -> list[Tensor]:
        """Return the activations at some points, (1, T, width) each, without computing what comes after them."""
        with watching(points, _stop_at_the_last) as activations, suppress(_ReachedError):
            self(stream)
        return [value.view(*stream.shape[:-1], -1) for value in activations]


def _stop_at_the_last(activations: list[Any]) -> None:
    if all(value is not None for value in activations):
        raise _ReachedError


class _ReachedError(Exception):
    """Ends a forward pass that has produced all the activations that are needed."""


@dataclass(frozen=True)
class Layers:
    """The layers of a checkpoint, or of a model cut from it, numbered as in the checkpoint.

    `tensor` reads the tensor of a row, of a layer numbered as in the checkpoint and an expert numbered as in `arch`.
    """

    checkpoint: Checkpoint
    arch: Arch
    tensor: Callable[[Row, int | None, int | None], Tensor]
    runtime: Runtime

    @classmethod
    def of(cls, checkpoint: Checkpoint, runtime: Runtime) -> "Layers":
        """Return the layers of a checkpoint as they are on disk."""
        return cls(checkpoint, checkpoint.arch, lambda *place: checkpoint.tensor(Row.tensor_name(*place)), runtime)

    def load(self, number: int) -> Layer:
        """Load the layer of a number alone onto the device."""

        def tensor(row: Row, expert: int | None) -> Tensor:
            # Tensors outside the layers take no part in the forward pass of a layer.
            value = self.tensor(row, number, expert) if row.is_per_layer else None
            return torch.zeros(row.shape(arch.axis_size)) if value is None else value

        arch = self._of_one_layer(number, vocab_size=1)
        return self._build(number, arch, tensor)

    def embedded(self, blocks: Blocks) -> Stream:
        """Return the residual stream before the first layer."""
        # Of the embedding only the rows that the blocks use are loaded, and of the layer nothing.
        vocabulary, ids = blocks.ids.unique(return_inverse=True)
        arch = self._of_one_layer(0, vocab_size=len(vocabulary))

        def tensor(row: Row, expert: int | None) -> Tensor:
            if row.is_per_layer:
                return torch.zeros(row.shape(arch.axis_size))
            value = self.tensor(row, None, expert)
            return value[vocabulary] if (("vocab",),) in row.dimensions[:1] else value

        first = self._build(0, arch, tensor)
        stream = Stream(blocks, self.arch.axis_size("hidden"), self.runtime.dtype)
        for i, block in enumerate(ids.split(1)):
            stream[i] = first.inputs(block.to(self.runtime.device))[0]
        return stream

    def _of_one_layer(self, number: int, vocab_size: int) -> Arch:
        kinds = self.checkpoint.arch.layers[number : number + 1]
        sizes = {**self.arch.sizes, **self.checkpoint.arch.depth_of(kinds), "vocab_size": vocab_size}
        return replace(self.arch, sizes=sizes, layers=kinds)

    def _build(self, number: int, arch: Arch, tensor: Callable[[Row, int | None], Tensor]) -> Layer:
        config, runtime = student_config(self.checkpoint, arch, [number]), self.runtime
        config.pad_token_id = None  # the number is beyond the small vocabulary
        tensors = ((row.tensor_name(layer, expert), tensor(row, expert)) for row, layer, expert in arch.places())
        model = build_model(config, tensors, runtime.device, runtime.dtype, runtime.attention)
        return Layer(number, model, self.arch)
