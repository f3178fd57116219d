"""Holds hidden states of blocks of text, one tensor per block, in memory or in a file."""

from collections.abc import Iterator
from tempfile import TemporaryFile
from typing import IO

import torch
from torch import Tensor

from minitron.data.blocks import Blocks
from minitron.files import cache_folder

SPILL_BYTES = 2**30
"""A stream larger than this is kept in a file instead of in memory."""


class Stream:
    """The residual stream of some blocks at one depth, or the last hidden states: entry i is that of block i.

    Entries have the shape (1, T, hidden) and lie on the CPU. A stream larger than `SPILL_BYTES` is kept in an unnamed
    file in the cache folder; the folder of temporary files is often in memory itself.
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
