"""Matrices of GPTQ and AWQ: packed in integers of 32 bits, and stored transposed, inputs first.

GPTQ packs `qweight` (inputs · bits / 32, outputs) along the inputs and `qzeros` (groups, outputs · bits / 32) along the
outputs, and names in `g_idx` the group of every input, in any order where it quantised inputs by their activations
(`desc_act`): `nn_modules/qlinear/__init__.py` of GPTQModel 7.7.0, `dequantize_weight`. AWQ packs `qweight` (inputs,
outputs / 8) and `qzeros` along the outputs, eight of them in the order 0 2 4 6 1 3 5 7: `modules/linear/gemm.py` of
AutoAWQ 0.2.9, and `utils/packing_utils.py` there, `dequantize_gemm`.
"""

from torch import Tensor

from minitron.model.quantised.layout import Layout, Stored
from minitron.model.quantised.packed import WORD_BITS, num_words, packed_bits, unpack
from minitron.model.quantised.scaled import restore

PLACES_OF_AWQ = [0, 4, 1, 5, 2, 6, 3, 7]
"""The place within an integer, counted from the lowest bits, of each of eight outputs in a row."""


def _gptq_shape(stored: Stored) -> tuple[int, ...]:
    (dtype, words), (_, zeros), (_, scales) = (stored.header(ending) for ending in ("qweight", "qzeros", "scales"))
    bits = packed_bits(stored)
    inputs = stored.header("g_idx")[1][0] if "g_idx" in stored else words[0] * WORD_BITS // bits
    if dtype != "I32" or words != [num_words(inputs, bits), scales[-1]]:
        raise stored.refusal(f"does not hold {inputs} inputs and {scales[-1]} outputs in {bits} bits")
    _require_zeros(stored, zeros, scales)
    return scales[-1], inputs


def _read_gptq(stored: Stored) -> Tensor:
    (outputs, inputs), bits, zeros, scales = (
        _gptq_shape(stored),
        packed_bits(stored),
        stored["qzeros"],
        stored["scales"],
    )
    if stored.quantisation.stores_zeros_less_one:
        # Added to whole integers, as GPTQModel subtracted it: carries undo borrows (`utils/model.py`, v1 and v2).
        zeros = zeros + sum(1 << place for place in range(0, WORD_BITS, bits))
    groups = stored.optional("g_idx")
    if groups is not None and not groups.any():
        groups = None  # as text-generation-inference and exllama read files whose inputs are in order
    return restore(
        stored,
        unpack(stored["qweight"].T, bits)[:, :inputs],
        scales.T,
        zeros=unpack(zeros, bits)[:, :outputs].T,
        groups=None if groups is None else groups.long(),
    )


def _awq_shape(stored: Stored) -> tuple[int, ...]:
    (dtype, words), (_, zeros), (_, scales) = (stored.header(ending) for ending in ("qweight", "qzeros", "scales"))
    bits = packed_bits(stored)
    if dtype != "I32" or len(words) != 2 or words[1] != num_words(scales[-1], bits):
        raise stored.refusal(f"does not hold {scales[-1]} outputs in {bits} bits")
    _require_zeros(stored, zeros, scales)
    return scales[-1], words[0]


def _read_awq(stored: Stored) -> Tensor:
    bits = packed_bits(stored)
    values, zeros = (_in_order(unpack(stored[ending], bits)) for ending in ("qweight", "qzeros"))
    return restore(stored, values.T, stored["scales"].T, zeros=zeros.T)


def _in_order(values: Tensor) -> Tensor:
    """Return the numbers of AWQ (rows, outputs) with outputs in their order."""
    ordered: Tensor = values.unflatten(1, (-1, len(PLACES_OF_AWQ)))[..., PLACES_OF_AWQ]
    return ordered.flatten(1)


def _require_zeros(stored: Stored, zeros: list[int], scales: list[int]) -> None:
    bits = packed_bits(stored)
    if len(scales) != 2 or zeros != [scales[0], num_words(scales[1], bits)]:
        raise stored.refusal(
            f"has zero points of shape {zeros} and scales of shape {scales}, which do not fit {bits} bits"
        )


GPTQ = Layout(
    values="qweight",
    weight="weight",
    needs=("qzeros", "scales"),
    may_have=("g_idx",),
    shape=_gptq_shape,
    read=_read_gptq,
)
AWQ = Layout(
    values="qweight", weight="weight", needs=("qzeros", "scales"), may_have=(), shape=_awq_shape, read=_read_awq
)
