"""The experts of GPT-OSS in MXFP4: numbers of four bits, 32 of which share an exponent."""

import torch
from torch import Tensor

from minitron.model.quantised.layout import Layout, Stored


def _shape(stored: Stored) -> tuple[int, ...]:
    """Return the shape (experts, inputs, outputs) of values that are packed as (experts, outputs, groups, bytes)."""
    (_, packed), (_, exponents) = stored.header("_blocks"), stored.header("_scales")
    if len(packed) != 4 or packed[:-1] != exponents:
        raise stored.refusal(f"does not fit its exponents of shape {exponents}")
    experts, outputs, groups, size = packed
    return experts, groups * size * 2, outputs


def _read(stored: Stored) -> Tensor:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    # A number of MXFP4, two bits and an exponent, is exact in bfloat16.
    values: Tensor = convert_moe_packed_tensors(stored["_blocks"], stored["_scales"], dtype=torch.bfloat16)
    return values


MXFP4 = Layout(values="_blocks", weight="", needs=("_scales",), may_have=(), shape=_shape, read=_read)
