"""What a config states about quantised weights, by method; a further method is a function and a line of `METHODS`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from minitron.errors import UserError
from minitron.files import read_json
from minitron.model.quantised.bitsandbytes import FOUR_BITS, LLM_INT8
from minitron.model.quantised.layout import Quantisation
from minitron.model.quantised.mxfp4 import MXFP4
from minitron.model.quantised.packed import PACKED
from minitron.model.quantised.scaled import SCALED, SCALED_INV
from minitron.model.quantised.transposed import AWQ, GPTQ

PACKED_FORMAT = "pack-quantized"
COMPRESSED_FORMATS = {
    **dict.fromkeys(("float-quantized", "int-quantized", "naive-quantized"), (8,)),
    PACKED_FORMAT: (2, 4, 8),
}
"""The formats of compressed-tensors that can be read, and the bits that a weight may have in each."""


def stated_quantisation(folder: Path) -> dict[str, Any]:
    """Return what a folder's config states about quantised weights; empty where it states nothing.

    NVIDIA Model Optimizer may state it in `hf_quant_config.json`, a file beside the config.
    """
    values = read_json(folder / "config.json")
    if not isinstance(values, dict):
        return {}
    stated = values.get("quantization_config") or values.get("compression_config")
    if not stated and (folder / "hf_quant_config.json").is_file():
        optimizer = read_json(folder / "hf_quant_config.json")
        stated = optimizer.get("quantization") if isinstance(optimizer, dict) else None
        return {"quant_method": "modelopt", **stated} if isinstance(stated, dict) else {}
    return stated if isinstance(stated, dict) else {}


def read_quantisation(folder: Path, stated: dict[str, Any]) -> Quantisation:
    """Return how the weights of a folder are quantised; `stated` names a method in `METHODS`.

    Raises:
        UserError: the config states a layout that cannot be read.
    """
    return METHODS[stated["quant_method"]](folder, stated)


def _fp8(folder: Path, stated: dict[str, Any]) -> Quantisation:
    block = stated.get("weight_block_size")
    layouts = (SCALED, SCALED_INV)
    return Quantisation("fp8", layouts, (8,), block=None if block is None else _block(folder, block))


def _modelopt(folder: Path, stated: dict[str, Any]) -> Quantisation:
    _require(folder, "quant_algo", stated.get("quant_algo"), ("FP8",))
    return Quantisation("modelopt", (SCALED, SCALED_INV), (8,))


def _mxfp4(folder: Path, stated: dict[str, Any]) -> Quantisation:
    return Quantisation("mxfp4", (MXFP4,), (4,))


def _compressed_tensors(folder: Path, stated: dict[str, Any]) -> Quantisation:
    blocks, widths, packed_bits = set(), set(), set()
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
        widths.add(bits)
        if format == PACKED_FORMAT:
            packed_bits.add(bits)
        if weights.get("strategy") == "group":
            blocks.add(_block(folder, [1, weights.get("group_size")]))
        elif weights.get("strategy") == "block":
            blocks.add(_block(folder, weights.get("block_structure")))
    if len(blocks) > 1 or len(packed_bits) > 1:
        several = sorted(blocks) if len(blocks) > 1 else sorted(packed_bits)
        raise UserError(f"{folder} holds weights quantised in blocks, or packed in bits, of several sizes: {several}")
    return Quantisation(
        "compressed-tensors",
        (PACKED, SCALED, SCALED_INV),
        tuple(sorted(widths)),
        packed_bits=next(iter(packed_bits), None),
        block=next(iter(blocks), None),
    )


def _awq(folder: Path, stated: dict[str, Any]) -> Quantisation:
    version = str(stated.get("version") or stated.get("format") or "gemm").lower()
    _require(folder, "version", version, ("gemm",))
    return _in_groups(folder, stated, "awq", bits=(4,))


def _gptq(folder: Path, stated: dict[str, Any]) -> Quantisation:
    format = str(stated.get("checkpoint_format") or stated.get("format") or "gptq").lower()
    _require(folder, "checkpoint_format", format, ("gptq", "gptq_v2"))
    _require(folder, "is_marlin_format", bool(stated.get("is_marlin_format")), (False,))
    return _in_groups(folder, stated, "gptq", bits=(2, 4, 8), stores_zeros_less_one=format == "gptq")


def _in_groups(
    folder: Path, stated: dict[str, Any], method: str, *, bits: tuple[int, ...], stores_zeros_less_one: bool = False
) -> Quantisation:
    """Return the quantisation of AWQ or GPTQ, which quantise `group_size` inputs in a row, or all of them (−1)."""
    _require(folder, "bits", stated.get("bits"), bits)
    size = stated.get("group_size", 128)
    return Quantisation(
        method,
        (AWQ if method == "awq" else GPTQ,),
        (stated["bits"],),
        packed_bits=stated["bits"],
        block=None if size in {-1, None} else _block(folder, [1, size]),
        stores_zeros_less_one=stores_zeros_less_one,
    )


def _bitsandbytes(folder: Path, stated: dict[str, Any]) -> Quantisation:
    bits = next((bits for bits in (4, 8) if stated.get(f"load_in_{bits}bit")), None)
    _require(folder, "load_in_4bit and load_in_8bit", bits is not None, (True,))
    return Quantisation("bitsandbytes", (*FOUR_BITS, LLM_INT8), (bits or 8,))


METHODS: dict[str, Callable[[Path, dict[str, Any]], Quantisation]] = {
    "fp8": _fp8,
    "compressed-tensors": _compressed_tensors,
    "modelopt": _modelopt,
    "mxfp4": _mxfp4,
    "awq": _awq,
    "gptq": _gptq,
    "bitsandbytes": _bitsandbytes,
}
"""How the entries of each method are read; `weights.DEQUANTISED` lists the methods where torch is not imported."""


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
