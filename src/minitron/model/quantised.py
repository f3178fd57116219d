"""Reads the tensors of a folder whose weights are quantised, each in floating point.

A quantised matrix is stored as numbers of eight or four bits and the scales that they are multiplied by: one for the
matrix, for each of its rows, or for each block of it. The layouts are those of `compressed-tensors` (`float-quantized`,
`int-quantized`, `naive-quantized`, and `pack-quantized` without zero points), of FP8 in blocks as DeepSeek and Qwen
release it (transformers' `FineGrainedFP8Config`), of NVIDIA Model Optimizer's FP8, and of the MXFP4 experts of GPT-OSS.
Tensors are read one by one, and no code of the folder is run.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron.errors import UserError
from minitron.files import read_json
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint
from minitron.model.config import read_config
from minitron.model.weights import DEQUANTISED, FLOATS, QUANTISED_ENTRIES, locate_tensors

PACKED_FORMAT = "pack-quantized"
COMPRESSED_FORMATS = {
    **dict.fromkeys(("float-quantized", "int-quantized", "naive-quantized"), (8,)),
    PACKED_FORMAT: (4, 8),
}
"""The formats of compressed-tensors that can be read, and the bits that a weight may have in each."""
WEIGHT_SCALES = ("_scale", "_scale_inv")
"""What follows the name of a matrix in the name of its scales; both kinds are multiplied by."""
ZERO_POINT = "_zero_point"
PACKED, SHAPE = "_packed", "_shape"
"""What follows the name of a matrix in the names of its values, packed in integers of 32 bits, and of its shape."""
BLOCKS, EXPONENTS = "_blocks", "_scales"
"""What follows the name of an MXFP4 tensor in the names of its packed values and of its exponents."""
OF_ACTIVATIONS = (
    *("input_scale", "input_zero_point", "activation_scale", "output_scale", "output_zero_point"),
    *("q_scale", "k_scale", "v_scale"),
)
"""Last parts of the names of tensors that quantise activations or the KV cache, which are left out."""
FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Quantisation:
    """How the weights of a folder are quantised, as its config states it."""

    method: str
    block: tuple[int, int] | None = None
    """Rows and columns of a matrix that share a scale; None: all of a matrix, or all of a row."""
    packed_bits: int | None = None
    """The bits of a weight where several are packed in one integer."""


@dataclass(frozen=True)
class QuantisedFolder:
    """A folder of quantised weights; nothing is read but its config and the headers of its files."""

    checkpoint: Checkpoint
    quantisation: Quantisation
    dtype: torch.dtype
    """The dtype that matrices are dequantised to: the config's own, else bfloat16."""

    @property
    def num_bytes(self) -> int:
        """About the size of the dequantised weights."""
        shapes = {name: self.checkpoint.shape(name) for name in self.checkpoint.tensors}
        held = {BLOCKS: 2, PACKED: 32 // (self.quantisation.packed_bits or 32)}
        counts = (
            math.prod(shape) * next((held[kind] for kind in held if name.endswith(kind)), 1)
            for name, shape in shapes.items()
        )
        return sum(counts) * self.dtype.itemsize

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

    def tensors(self, advance: Callable[[int], None] = lambda _: None) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor in floating point, by name; those that are not quantised keep their dtype.

        `advance` is called with the numbers of bytes that were yielded.

        Raises:
            UserError: a tensor has no scales, scales have no tensor, or their shapes do not fit; or no tensor is
                quantised.
        """
        names = self.checkpoint.tensors
        scales = {
            name: scale
            for name in names
            for suffix in WEIGHT_SCALES
            if (scale := name.removesuffix(PACKED) + suffix) in names
        }
        shapes = {name: name.removesuffix(PACKED) + SHAPE for name in scales if name.endswith(PACKED)}
        zero_points = {name: name + ZERO_POINT for name in scales if name + ZERO_POINT in names}
        exponents = {
            name: exponent
            for name in names
            if name.endswith(BLOCKS) and (exponent := name.removesuffix(BLOCKS) + EXPONENTS) in names
        }
        if not scales and not exponents:
            raise UserError(
                f"{self.checkpoint.folder}: the config states weights quantised by {self.quantisation.method}, "
                "but no tensor has scales"
            )
        beside = {*shapes.values(), *scales.values(), *zero_points.values(), *exponents.values()}
        for name in names:
            if name in beside or name.rpartition(".")[2] in OF_ACTIVATIONS:
                continue
            if name in exponents:
                value = self._from_mxfp4(name, exponents[name])
            elif name in scales:
                value = self._scaled(name, scales[name], zero_points.get(name))
            elif (dtype := self.checkpoint.stored_dtype(name)) in FLOATS and not name.endswith(WEIGHT_SCALES):
                value = self.checkpoint.tensor(name)
            else:
                raise UserError(
                    f"{self.checkpoint.folder}: tensor {name} ({dtype}) is neither a weight in floating point "
                    "nor a quantised one with its scales"
                )
            advance(value.nbytes)
            yield (name.removesuffix(BLOCKS).removesuffix(PACKED) if name in {*exponents, *shapes} else name), value

    def _scaled(self, name: str, scale: str, zero_point: str | None) -> Tensor:
        """Return the matrix (q - zero point) · scale, computed in float32."""
        if name.endswith(PACKED):
            values = self._unpacked(name)
            return (values * self._spread(scale, values)).to(self.dtype)
        dtype = self.checkpoint.stored_dtype(name)
        if dtype not in {"F8_E4M3", "F8_E5M2", "I8"} or len(self.checkpoint.shape(name)) != 2:
            raise UserError(
                f"{self.checkpoint.folder}: tensor {name} ({dtype}, {list(self.checkpoint.shape(name))}) has scales, "
                "but is not a matrix of FP8 or int8"
            )
        values = self.checkpoint.tensor(name).float()
        if zero_point:
            values -= self._spread(zero_point, values)
        values *= self._spread(scale, values)
        return values.to(self.dtype)

    def _unpacked(self, name: str) -> Tensor:
        """Return the matrix of integers, in float32, that is packed along its rows, the lowest bits first."""
        bits, shape = self.quantisation.packed_bits, name.removesuffix(PACKED) + SHAPE
        packed = self.checkpoint.tensor(name)
        stated = self.checkpoint.tensor(shape).tolist() if shape in self.checkpoint.tensors else []
        if not bits or packed.dtype != torch.int32 or not _holds(list(packed.shape), stated, bits):
            raise UserError(
                f"{self.checkpoint.folder}: tensor {name} of shape {list(packed.shape)} does not hold a matrix of "
                f"shape {stated} in {bits} bits"
            )
        shifts = torch.arange(0, 32, bits, dtype=torch.int32)
        unsigned = (packed[..., None] >> shifts) & ((1 << bits) - 1)
        return unsigned.flatten(1)[:, : stated[1]].float() - (1 << (bits - 1))

    def _spread(self, name: str, values: Tensor) -> Tensor:
        """Return the scales or zero points of a matrix, repeated so that they can be multiplied by it."""
        scales = self.checkpoint.tensor(name)
        if scales.dtype == torch.uint8:
            raise UserError(f"{self.checkpoint.folder}: tensor {name} holds exponents, not scales: not supported")
        scales = scales.float()
        if scales.numel() == 1:
            return scales.reshape(1, 1)
        for axis, size in enumerate(values.shape):
            block = self.quantisation.block[axis] if self.quantisation.block else size
            if scales.ndim != 2 or scales.shape[axis] not in {1, size, math.ceil(size / block)}:
                raise UserError(
                    f"{self.checkpoint.folder}: tensor {name} of shape {list(scales.shape)} does not fit a matrix of "
                    f"shape {list(values.shape)} with blocks of {self.quantisation.block or 'one row, or the matrix'}"
                )
            if scales.shape[axis] not in {1, size}:
                scales = scales.repeat_interleave(block, dim=axis).narrow(axis, 0, size)
        return scales

    def _from_mxfp4(self, blocks: str, exponents: str) -> Tensor:
        """Return the experts' matrices (experts, input, output) of packed values (experts, output, groups, bytes)."""
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        packed, shape = self.checkpoint.shape(blocks), self.checkpoint.shape(exponents)
        if len(packed) != 4 or packed[:-1] != shape:
            raise UserError(
                f"{self.checkpoint.folder}: tensor {blocks} of shape {list(packed)} does not fit its exponents of "
                f"shape {list(shape)}"
            )
        values: Tensor = convert_moe_packed_tensors(
            self.checkpoint.tensor(blocks), self.checkpoint.tensor(exponents), dtype=self.dtype
        )
        return values


def open_quantised(folder: Path, family: str | None = None) -> QuantisedFolder | None:
    """Return a folder whose config states a quantisation that can be read; None where it states none or another.

    Raises:
        UserError: the config states a layout of a method in `DEQUANTISED` that cannot be read, or see `read_config` and
            `locate_tensors`.
    """
    if not (folder / "config.json").is_file():
        return None
    stated = _stated(folder)
    if stated.get("quant_method") not in DEQUANTISED:
        return None
    quantisation = _quantisation(folder, stated)
    config = read_config(folder, family)
    files = locate_tensors(folder, getattr(config, "transformers_weights", None))
    checkpoint = Checkpoint(folder, config, Arch.from_config(config.to_dict()), files)
    return QuantisedFolder(checkpoint, quantisation, config.dtype if config.dtype in FLOAT_DTYPES else torch.bfloat16)


def _stated(folder: Path) -> dict[str, Any]:
    values = read_json(folder / "config.json")
    if not isinstance(values, dict):
        return {}
    stated = values.get("quantization_config") or values.get("compression_config")
    if not stated and (folder / "hf_quant_config.json").is_file():
        optimizer = read_json(folder / "hf_quant_config.json")
        stated = optimizer.get("quantization") if isinstance(optimizer, dict) else None
        return {"quant_method": "modelopt", **stated} if isinstance(stated, dict) else {}
    return stated if isinstance(stated, dict) else {}


def _quantisation(folder: Path, stated: dict[str, Any]) -> Quantisation:
    """Return what a config states about the weights; see the documents of compressed-tensors and of transformers.

    Raises:
        UserError: it states a layout that cannot be read.
    """
    method = stated["quant_method"]
    if method == "modelopt":
        _require(folder, "quant_algo", stated.get("quant_algo"), ("FP8",))
        return Quantisation("modelopt")
    if method == "fp8":
        block = stated.get("weight_block_size")
        return Quantisation("fp8", None if block is None else _block(folder, block))
    if method == "mxfp4":
        return Quantisation("mxfp4")
    blocks, packed_bits = set(), set()
    for entry in ("sparsity_config", "transform_config"):
        values = stated.get(entry) or {}
        if values.get("config_groups") or values.get("format", "dense") != "dense":
            raise UserError(f"{folder} holds weights that are also pruned or rotated ({entry}), which are not read")
    for group in (stated.get("config_groups") or {}).values():
        if not (weights := group.get("weights")):
            continue
        format, bits = str(group.get("format") or stated.get("format")), weights.get("num_bits")
        _require(folder, "format", format, tuple(COMPRESSED_FORMATS))
        _require(folder, "num_bits", bits, COMPRESSED_FORMATS[format])
        if format == PACKED_FORMAT:
            _require(folder, "symmetric", weights.get("symmetric", True), (True,))
            packed_bits.add(bits)
        if weights.get("strategy") == "group":
            blocks.add(_block(folder, [1, weights.get("group_size")]))
        elif weights.get("strategy") == "block":
            blocks.add(_block(folder, weights.get("block_structure")))
    if len(blocks) > 1 or len(packed_bits) > 1:
        several = sorted(blocks) if len(blocks) > 1 else sorted(packed_bits)
        raise UserError(f"{folder} holds weights quantised in blocks, or packed in bits, of several sizes: {several}")
    return Quantisation("compressed-tensors", next(iter(blocks), None), next(iter(packed_bits), None))


def _holds(packed: list[int], shape: list[int], bits: int) -> bool:
    """Return whether integers of 32 bits of one shape hold the entries of a matrix of another."""
    return len(shape) == 2 and packed == [shape[0], math.ceil(shape[1] * bits / 32)]


def _require(folder: Path, entry: str, value: Any, accepted: tuple[Any, ...]) -> None:
    if value not in accepted:
        raise UserError(
            f"{folder} holds quantised weights of {entry} {value}; those of {', '.join(map(str, accepted))} can be "
            "dequantised; of others, take an unquantised checkpoint"
        )


def _block(folder: Path, stated: Any) -> tuple[int, int]:
    if isinstance(stated, list) and len(stated) == 2 and all(type(size) is int and size > 0 for size in stated):
        return stated[0], stated[1]
    raise UserError(f"{folder}: the config states blocks of {stated}, not two counts of rows and columns")
