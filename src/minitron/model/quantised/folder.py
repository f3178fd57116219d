"""A folder of quantised weights: opened from its config and the headers of its files, and read tensor by tensor."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron.errors import UserError
from minitron.files import read_json
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint, expected_shapes
from minitron.model.config import read_config
from minitron.model.quantised.layout import Quantisation, Stored, find_matrices
from minitron.model.quantised.methods import METHODS, read_quantisation, stated_quantisation
from minitron.model.weights import FLOATS, QUANTISED_ENTRIES, locate_tensors

OF_ACTIVATIONS = (
    *("input_scale", "input_zero_point", "activation_scale", "output_scale", "output_zero_point"),
    *("q_scale", "k_scale", "v_scale"),
)
"""Last parts of the names of tensors that quantise activations or the KV cache, which are left out."""
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class QuantisedFolder:
    """A folder of quantised weights; nothing is read but its config, the headers of its files and a few shapes."""

    checkpoint: Checkpoint
    quantisation: Quantisation
    dtype: torch.dtype
    """The dtype that matrices are dequantised to: the config's own, else bfloat16."""

    @cached_property
    def matrices(self) -> dict[str, Stored]:
        """The quantised matrices, by the names of the tensors that hold their values."""
        return {each.beginning + each.layout.values: each for each in find_matrices(self.checkpoint, self.quantisation)}

    @cached_property
    def num_bytes(self) -> int:
        """About the size of the dequantised weights."""
        parts = {name for matrix in self.matrices.values() for name in matrix.names}
        plain = (self.checkpoint.shape(name) for name in self.checkpoint.tensors if name not in parts)
        shapes = (*plain, *(matrix.layout.shape(matrix) for matrix in self.matrices.values()))
        return sum(map(math.prod, shapes)) * self.dtype.itemsize

    @property
    def dtype_name(self) -> str:
        """The name of the dtype that matrices are dequantised to, as configs state it."""
        return str(self.dtype).removeprefix("torch.")

    def config_values(self) -> dict[str, Any]:
        """Return the entries of the config, without those on quantisation, as the dequantised weights need them."""
        values = read_json(self.checkpoint.folder / "config.json")
        for entry in (*QUANTISED_ENTRIES, "transformers_weights", "torch_dtype"):
            values.pop(entry, None)
        return {**values, "dtype": self.dtype_name}

    def require_readable(self) -> None:
        """Check, from headers alone, that every tensor is quantised in a known layout or in floating point.

        Raises:
            UserError: a tensor has no scales, scales have no tensor, or shapes do not fit each other or the config; or
                no tensor is quantised.
        """
        folder, method = self.checkpoint.folder, self.quantisation.method
        if not self.matrices:
            raise UserError(f"{folder}: the config states weights quantised by {method}, but no tensor has scales")
        expected = dict(expected_shapes(self.checkpoint.arch))
        for matrix in self.matrices.values():
            shape = matrix.layout.shape(matrix)
            if shape != expected.get(matrix.name, shape):
                raise matrix.refusal(f"makes shape {list(shape)}, the config makes it {list(expected[matrix.name])}")
        needed = tuple(ending for layout in self.quantisation.layouts for ending in layout.needs)
        for name in self._plain_names():
            dtype = self.checkpoint.stored_dtype(name)
            if dtype not in FLOATS or name.endswith(needed):
                raise UserError(
                    f"{folder}: tensor {name} ({dtype}) is neither a weight in floating point nor a quantised one with "
                    "its scales"
                )

    def tensors(self, advance: Callable[[int], None] = lambda _: None) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor in floating point, by name; those that are not quantised keep their dtype.

        `advance` is called with the numbers of bytes that were yielded.

        Raises:
            UserError: scales do not fit their matrix.
        """
        plain = set(self._plain_names())
        for name in self.checkpoint.tensors:
            if matrix := self.matrices.get(name):
                value = matrix.layout.read(matrix).to(self.dtype)
                advance(value.nbytes)
                yield matrix.name, value
            elif name in plain and not self._is_bias_of_nothing(name):
                value = self.checkpoint.tensor(name)
                advance(value.nbytes)
                yield name, value

    def _plain_names(self) -> Iterator[str]:
        """Yield the names of the tensors that hold no part of a quantised matrix, without those of activations."""
        parts = {name for matrix in self.matrices.values() for name in matrix.names}
        for name in self.checkpoint.tensors:
            if name not in parts and name.rpartition(".")[2] not in OF_ACTIVATIONS:
                yield name

    def _is_bias_of_nothing(self, name: str) -> bool:
        """Return whether a bias is zero where the model has none: AutoGPTQ stores one beside every matrix."""
        return (
            name.endswith(".bias")
            and name.removesuffix("bias") + "qweight" in self.matrices
            and self.checkpoint.arch.match(name) is None
            and not self.checkpoint.tensor(name).any()
        )


def open_quantised(folder: Path, family: str | None = None) -> QuantisedFolder | None:
    """Return a folder whose config states a quantisation that can be read; None where it states none or another.

    Raises:
        UserError: the config states a layout of a method in `METHODS` that cannot be read, see
            `QuantisedFolder.require_readable`, or see `read_config` and `locate_tensors`.
    """
    if not (folder / "config.json").is_file():
        return None
    stated = stated_quantisation(folder)
    if stated.get("quant_method") not in METHODS:
        return None
    quantisation = read_quantisation(folder, stated)
    config = read_config(folder, family)
    files = locate_tensors(folder, getattr(config, "transformers_weights", None))
    checkpoint = Checkpoint(folder, config, Arch.from_config(config.to_dict()), files)
    dtype = config.dtype if config.dtype in FLOAT_DTYPES else torch.bfloat16
    opened = QuantisedFolder(checkpoint, quantisation, dtype)
    opened.require_readable()
    return opened
