"""Matrices of bitsandbytes: LLM.int8, and the four-bit types nf4 and fp4, with scales that may be quantised themselves.

The layouts are those of bitsandbytes 0.50: `_ops.py`, `int8_vectorwise_dequant`; `functional.py`, `QuantState`, whose
values other than tensors are stored as the bytes of a JSON object; and `backends/default/ops.py`, `dequantize_4bit`.
"""

import json
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from minitron.model.quantised.layout import Layout, Stored
from minitron.model.quantised.scaled import scaled_shape

BYTES = {"U8": 1, "I8": 1, "F16": 2, "BF16": 2, "F32": 4, "F64": 8}
"""The dtypes in which pairs of four-bit numbers may be stored (`bnb_4bit_quant_storage`), and their bytes."""
ROWS_OF_INT8 = 0
"""The value of `weight_format` where rows are stored in their order."""
NESTED = (".nested_absmax", ".nested_quant_map")
"""The endings of the scales of scales, where these are quantised (`bnb_4bit_use_double_quant`)."""


@dataclass(frozen=True)
class FourBitState:
    """What is stored as JSON of a matrix of four bits."""

    shape: tuple[int, ...]
    block: int
    """How many numbers in a row share a scale, across rows."""
    nested_block: int
    """How many scales in a row share a scale of their own; 0 where scales are not quantised."""
    nested_offset: float
    """What is added to the scales."""


def _int8_shape(stored: Stored) -> tuple[int, ...]:
    shape, order = scaled_shape(stored), stored.optional("weight_format")
    if stored.header("SCB")[1] != [shape[0]]:
        raise stored.refusal(f"does not fit scales of shape {stored.header('SCB')[1]}")
    if order is not None and order.item() != ROWS_OF_INT8:
        raise stored.refusal("is stored in the order of a kernel, not row by row: not supported")
    return shape


def _read_int8(stored: Stored) -> Tensor:
    return stored["weight"] * stored["SCB"].float()[:, None] * (1 / 127)


def _four_bit_shape(stored: Stored) -> tuple[int, ...]:
    """Return the shape that the state holds, if the values and their scales are as many as it takes."""
    state = _state(stored)
    count, (dtype, values), blocks = math.prod(state.shape), stored.header(""), stored.header(".absmax")[1]
    size = BYTES.get(dtype, 0)
    is_whole = 0 <= 2 * math.prod(values) * size - count < 2 * size
    if not is_whole or blocks != [math.ceil(count / state.block)]:
        raise stored.refusal(
            f"does not hold a matrix of shape {state.shape} with {blocks} scales of {state.block} each"
        )
    return state.shape


def _read_four_bit(stored: Stored) -> Tensor:
    state, scales = _state(stored), stored[".absmax"]
    if state.nested_block:
        nested = stored[".nested_quant_map"][scales.int()]
        scales = _scaled_blocks(nested, stored[".nested_absmax"], state.nested_block) + state.nested_offset
    pairs = stored[""].flatten().view(torch.uint8)
    codes = torch.stack([pairs >> 4, pairs & 15], dim=1).flatten()[: math.prod(state.shape)]  # the high half is first
    return _scaled_blocks(stored[".quant_map"][codes.int()], scales, state.block).reshape(state.shape)


def _scaled_blocks(values: Tensor, scales: Tensor, size: int) -> Tensor:
    """Return values, each times the scale of its block of `size`; the last block may be shorter."""
    return values.float() * scales.float().repeat_interleave(size)[: len(values)]


def _state(stored: Stored) -> FourBitState:
    """Return what the JSON of a matrix states.

    Raises:
        UserError: it is not such an object.
    """
    name = next(name for name in stored.layout.needs if ".quant_state." in name)
    try:
        values = json.loads(bytes(stored[name].tolist()))
        nested = (values["nested_blocksize"], values["nested_offset"]) if NESTED[0] in stored.layout.needs else (0, 0)
        state = FourBitState(
            tuple(map(int, values["shape"])), int(values["blocksize"]), int(nested[0]), float(nested[1])
        )
    except (ValueError, KeyError, TypeError) as error:
        raise stored.refusal(f"has a state that cannot be read ({type(error).__name__}: {error})") from error
    if len(state.shape) != 2 or min(*state.shape, state.block) < 1:
        raise stored.refusal(f"has a state of shape {state.shape} and blocks of {state.block}")
    return state


def _four_bit(kind: str, nested: tuple[str, ...]) -> Layout:
    return Layout(
        values="",
        weight="",
        needs=(".absmax", ".quant_map", f".quant_state.bitsandbytes__{kind}", *nested),
        may_have=(),
        shape=_four_bit_shape,
        read=_read_four_bit,
    )


LLM_INT8 = Layout(
    values="weight",
    weight="weight",
    needs=("SCB",),
    may_have=("weight_format",),
    shape=_int8_shape,
    read=_read_int8,
)
FOUR_BITS = tuple(_four_bit(kind, nested) for kind in ("nf4", "fp4") for nested in (NESTED, ()))
