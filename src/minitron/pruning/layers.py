"""A checkpoint run layer by layer, each loaded from disk when its turn comes: for models larger than memory.

A layer runs inside a model of its own family that has this one layer, so that masks, positions and whatever else a
family gives to its layers are made by transformers as ever; only the residual stream is put in and taken out here.
"""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from tempfile import TemporaryFile
from typing import IO, Any

import torch
from torch import Tensor, nn

from minitron.data.blocks import Blocks
from minitron.model.anatomy import Row
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint, student_config
from minitron.model.language_model import Point, build_model, entering, leaving, watching
from minitron.model.source import cache_folder

SPILL_BYTES = 2**30
"""A stream larger than this lies in a file instead of in memory."""


class Stream:
    """The residual stream of some blocks at one depth: entry i is that of block i, (1, T, hidden).

    Larger than `SPILL_BYTES`, it lies in a nameless file in the cache folder, since that of temporary files is often
    memory.
    """

    def __init__(self, blocks: Blocks, hidden_size: int, dtype: torch.dtype) -> None:
        self.shape, self.dtype = (1, blocks.context, hidden_size), dtype
        self.num_bytes = blocks.context * hidden_size * dtype.itemsize
        self.entries: list[Tensor | None] = [None] * len(blocks)
        self.file: IO[bytes] | None = None
        if len(blocks) * self.num_bytes > SPILL_BYTES:
            cache_folder().mkdir(parents=True, exist_ok=True)
            self.file = TemporaryFile(dir=cache_folder())  # noqa: SIM115

    def __del__(self) -> None:
        if self.file is not None:
            self.file.close()

    def __iter__(self) -> Iterator[Tensor]:
        return (self[i] for i in range(len(self.entries)))

    def __getitem__(self, i: int) -> Tensor:
        if self.file is None:
            entry = self.entries[i]
            assert entry is not None, f"block {i} was never written"
            return entry
        self.file.seek(i * self.num_bytes)
        return torch.frombuffer(bytearray(self.file.read(self.num_bytes)), dtype=self.dtype).view(self.shape)

    def __setitem__(self, i: int, value: Tensor) -> None:
        value = value.detach().to("cpu", self.dtype).contiguous()
        if self.file is None:
            self.entries[i] = value
        else:
            self.file.seek(i * self.num_bytes)
            self.file.write(value.view(torch.uint8).numpy().data)


@dataclass(frozen=True)
class Layer:
    """One layer in memory, in a model around it; modules are named as in the whole model."""

    number: int
    model: Any
    arch: Arch
    beside: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = field(default_factory=dict)
    """What the model gives to the layer beside the stream, by length."""

    def module(self, name: str) -> nn.Module:
        """The module that `name`, with `{i}` for the layer's number, stands for."""
        found: nn.Module = self.model.get_submodule(name.replace("{i}", "0"))
        return found

    def stored_module(self, name: str) -> nn.Module:
        """The same for a name as files have it, which may begin otherwise than in memory."""
        found: nn.Module = self.model.base_model.get_submodule(name.replace("{i}", "0").split(".", 1)[1])
        return found

    def __call__(self, stream: Tensor) -> Tensor:
        """What the layer makes of the residual stream (1, T, hidden)."""
        context = stream.shape[1]
        if context not in self.beside:  # masks and positions are the same for every stream of this length
            self.beside[context] = self.entered(torch.zeros(1, context, dtype=torch.int64, device=stream.device))[1:]
        args, kwargs = self.beside[context]
        return leaving(self.module(self.arch.family.layer)(stream, *args, **kwargs))

    def entered(self, ids: Tensor) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
        """What the model gives to the layer for token ids (1, T): the stream, and what it passes beside it."""
        found: list[Any] = []

        def reached(_: nn.Module, args: Any, kwargs: Any) -> None:
            found.append(entering(args, kwargs))
            raise _ReachedError

        handle = self.module(self.arch.family.layer).register_forward_pre_hook(reached, with_kwargs=True)
        with suppress(_ReachedError):
            self.model.base_model(input_ids=ids, use_cache=False)
        handle.remove()
        [entry] = found
        return entry  # type: ignore[no-any-return]

    def watched(self, stream: Tensor, points: list[Point]) -> tuple[Tensor, list[Tensor]]:
        """The layer's output, and what there is at some points within, (1, T, width) each."""
        with watching(points) as seen:
            output = self(stream)
        return output, [value.view(*stream.shape[:-1], -1) for value in seen]

    def within(self, stream: Tensor, points: list[Point]) -> list[Tensor]:
        """What there is at some points, (1, T, width) each; nothing that comes after them is computed."""
        with watching(points, _stop_when_all_are_seen) as seen, suppress(_ReachedError):
            self(stream)
        return [value.view(*stream.shape[:-1], -1) for value in seen]


def _stop_when_all_are_seen(seen: list[Any]) -> None:
    if all(value is not None for value in seen):
        raise _ReachedError


class _ReachedError(Exception):
    """What is wanted of a forward pass has been seen."""


@dataclass(frozen=True)
class Layers:
    """Layers of one shape, `arch`, numbered as in the checkpoint that they are of or are cut from.

    `tensor` gives the tensor of a row, a layer of the checkpoint and an expert of `arch`.
    """

    checkpoint: Checkpoint
    arch: Arch
    tensor: Callable[[Row, int | None, int | None], Tensor]
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def of(cls, checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> "Layers":
        """Those of a checkpoint as it lies on disk."""
        return cls(
            checkpoint, checkpoint.arch, lambda *place: checkpoint.tensor(Row.tensor_name(*place)), device, dtype
        )

    def load(self, number: int) -> Layer:
        """The layer of that number, alone, on the device."""

        def tensor(row: Row, expert: int | None) -> Tensor:
            # What stands outside the layers takes no part.
            value = self.tensor(row, number, expert) if row.is_per_layer else None
            return torch.zeros(row.shape(alone.axis_size)) if value is None else value

        alone = self._alone(number, vocab_size=1)
        return self._build(number, alone, tensor)

    def embedded(self, blocks: Blocks) -> Stream:
        """What enters the first layer."""
        # Only the rows of the embedding that the blocks use are needed, and nothing of the layer.
        vocabulary, ids = blocks.ids.unique(return_inverse=True)
        alone = self._alone(0, vocab_size=len(vocabulary))

        def tensor(row: Row, expert: int | None) -> Tensor:
            if row.is_per_layer:
                return torch.zeros(row.shape(alone.axis_size))
            value = self.tensor(row, None, expert)
            return value[vocabulary] if (("vocab",),) in row.dimensions[:1] else value

        first = self._build(0, alone, tensor)
        stream = Stream(blocks, self.arch.axis_size("hidden"), self.dtype)
        for i, block in enumerate(ids.split(1)):
            stream[i] = first.entered(block.to(self.device))[0]
        return stream

    def _alone(self, number: int, vocab_size: int) -> Arch:
        kinds = self.checkpoint.arch.layers[number : number + 1]
        sizes = {**self.arch.sizes, **self.checkpoint.arch.depth_of(kinds), "vocab_size": vocab_size}
        return replace(self.arch, sizes=sizes, layers=kinds)

    def _build(self, number: int, alone: Arch, tensor: Callable[[Row, int | None], Tensor]) -> Layer:
        config = student_config(self.checkpoint, alone, [number])
        config.pad_token_id = None  # it is beyond such a vocabulary
        tensors = ((row.tensor_name(layer, expert), tensor(row, expert)) for row, layer, expert in alone.places())
        return Layer(number, build_model(config, tensors, self.device, self.dtype), self.arch)
