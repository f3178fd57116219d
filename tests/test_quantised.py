"""Teachers with quantised weights: what is read equals a direct formula, and transformers' own dequantisation."""

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config
from transformers.integrations.mxfp4 import FP4_VALUES

import minitron
from minitron.errors import UserError
from minitron.files import cache_folder
from minitron.history import History, history_of
from minitron.model import content
from minitron.model.checkpoint import Checkpoint
from minitron.model.crosscheck import require_one_reading
from minitron.model.quantised.methods import METHODS
from minitron.model.source import open_teacher
from minitron.model.weights import DEQUANTISED
from tests.conftest import make_model

Tensors = dict[str, Tensor]
Pieces = dict[str, Tensor]
SCALES, ZEROS = "_scale", "_zero_point"


def compressed(format: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": {"num_bits": 8, **weights}}
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}


def quantised(matrix: Tensor, block: tuple[int, int], dtype: torch.dtype, is_shifted: bool) -> Pieces:
    """Quantise a matrix in blocks, each with a scale of its own and, if `is_shifted`, a zero point."""
    rows, columns = matrix.shape
    grid = (-(-rows // block[0]), -(-columns // block[1]))
    scales, zeros, values = torch.zeros(grid), torch.zeros(grid), torch.zeros(rows, columns)
    largest = 127.0 if dtype == torch.int8 else 448.0
    for i in range(grid[0]):
        for j in range(grid[1]):
            place = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scales[i, j] = matrix[place].abs().max() / (largest - 8)
            zeros[i, j] = 5 if is_shifted else 0
            values[place] = matrix[place] / scales[i, j] + zeros[i, j]
    stored = values.round().to(dtype) if dtype == torch.int8 else values.to(dtype)
    return {"": stored, SCALES: scales} | ({ZEROS: zeros.to(torch.int8)} if is_shifted else {})


def by_entry(pieces: Pieces, block: tuple[int, int]) -> Tensor:
    """Dequantise a matrix entry by entry: the slow formula."""
    rows, columns = pieces[""].shape
    stored, scales = pieces[""].float().tolist(), pieces[SCALES].tolist()
    zeros = pieces.get(ZEROS, torch.zeros_like(pieces[SCALES])).tolist()
    at = [[(r // block[0], c // block[1]) for c in range(columns)] for r in range(rows)]
    return torch.tensor(
        [[(stored[r][c] - zeros[i][j]) * scales[i][j] for c, (i, j) in enumerate(at[r])] for r in range(rows)]
    )


WHOLE, ROW = (10**6, 10**6), (1, 10**6)
FP8, INT8 = torch.float8_e4m3fn, torch.int8
LAYOUTS: dict[str, tuple[dict[str, Any], tuple[int, int], torch.dtype, bool]] = {
    "per tensor": (compressed("float-quantized", strategy="tensor"), WHOLE, FP8, False),
    "per channel": (compressed("float-quantized", strategy="channel"), ROW, FP8, False),
    "blocks": (compressed("float-quantized", strategy="block", block_structure=[16, 8]), (16, 8), FP8, False),
    "blocks that do not divide": ({"quant_method": "fp8", "weight_block_size": [24, 20]}, (24, 20), FP8, False),
    "DeepSeek": ({"quant_method": "fp8", "weight_block_size": [8, 16]}, (8, 16), FP8, False),
    "int8": (compressed("int-quantized", strategy="channel"), ROW, INT8, False),
    "int8, shifted groups": (compressed("int-quantized", strategy="group", group_size=8), (1, 8), INT8, True),
    "Model Optimizer": ({"quant_method": "modelopt", "quant_algo": "FP8"}, WHOLE, FP8, False),
}


def packed(values: Tensor, bits: int) -> Tensor:
    """Pack numbers without sign along rows in integers of 32 bits, by text: the last digits are those of the first."""
    per = 32 // bits
    rows = []
    for row in values.tolist():
        texts = [f"{value:0{bits}b}" for value in row]
        texts += ["0" * bits] * (-len(texts) % per)
        words = [int("".join(reversed(texts[i : i + per])), 2) for i in range(0, len(texts), per)]
        rows.append([word - 2**32 if word >= 2**31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


@dataclass
class Grouped:
    """A random matrix of numbers without sign, whose columns in a group have a scale and a zero point per row."""

    values: Tensor
    zeros: Tensor
    scales: Tensor
    groups: Tensor

    @property
    def expected(self) -> Tensor:
        """The matrix, entry by entry: the slow formula."""
        rows, columns = self.values.shape
        values, zeros, scales, groups = (x.tolist() for x in (self.values, self.zeros, self.scales, self.groups))
        return torch.tensor(
            [[(values[r][c] - zeros[r][groups[c]]) * scales[r][groups[c]] for c in range(columns)] for r in range(rows)]
        )


def grouped(shape: torch.Size, bits: int, *, size: int, is_ordered: bool = False) -> Grouped:
    rows, columns = shape
    grid, generator = (rows, columns // size), torch.Generator().manual_seed(rows + columns + bits)
    order = torch.randperm(columns, generator=generator) if is_ordered else torch.arange(columns)
    return Grouped(
        torch.randint(0, 2**bits, shape, generator=generator),
        torch.randint(0, 2**bits, grid, generator=generator),
        torch.rand(grid, generator=generator),
        order // size,
    )


def store_matrices(
    folder: Path, stated: dict[str, Any], store: Callable[[torch.Size], tuple[Pieces, Tensor]]
) -> Tensors:
    """Replace the matrices of the layers by what `store` makes, each piece `x.ENDING`; return what is to be read."""
    stored: Tensors = {}
    expected: Tensors = load_file(folder / "model.safetensors")
    for name, value in expected.items():
        if not name.endswith("_proj.weight"):
            stored[name] = value
            continue
        pieces, expected[name] = store(value.shape)
        stored |= {name.removesuffix("weight") + ending: piece for ending, piece in pieces.items()}
    write(folder, stored, stated)
    return expected


def write(folder: Path, tensors: Tensors, quantization_config: dict[str, Any], **entries: Any) -> None:
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    config |= {"quantization_config": quantization_config, **entries}
    (folder / "config.json").write_text(json.dumps(config))


def quantise(folder: Path, layout: str) -> Tensors:
    """Quantise the matrices of the layers of a folder, and return what is to be read from it."""
    stated, block, dtype, is_shifted = LAYOUTS[layout]
    tensors = load_file(folder / "model.safetensors")
    stored: Tensors = {}
    expected = dict(tensors)
    for name, value in tensors.items():
        if value.ndim != 2 or ".layers." not in name:
            stored[name] = value
            continue
        pieces = quantised(value, block, dtype, is_shifted)
        suffix = "_scale_inv" if stated["quant_method"] == "fp8" else SCALES
        names = {"": name, SCALES: name + suffix, ZEROS: name + ZEROS}
        stored |= {names[kind]: piece for kind, piece in pieces.items()}
        stored[name.removesuffix("weight") + "input_scale"] = torch.ones(1)
        expected[name] = by_entry(pieces, block)
    write(folder, stored, stated)
    return expected


def differences(checkpoint: Checkpoint, expected: Tensors) -> Iterator[str]:
    for name in checkpoint.tensors:
        if not torch.equal(checkpoint.tensor(name), expected[name].to(checkpoint.dtype)):
            yield name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_quantised_teacher_is_read_in_floating_point(
    tmp_path: Path, layout: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_model(tmp_path / "model", "llama-tied")
    original = load_file(folder / "model.safetensors")
    expected = quantise(folder, layout)
    teacher = open_teacher(str(folder))
    assert "holds weights quantised by" in caplog.text
    assert "dequantised to float32" in caplog.text
    assert not list(differences(teacher, expected))
    matrices = [name for name, value in original.items() if not torch.equal(value, expected[name])]
    assert matrices
    assert set(differences(teacher, original)) == set(matrices)  # the control: rounding has changed them
    for name in matrices:
        assert (teacher.tensor(name) - original[name]).norm() < 0.05 * original[name].norm()
    require_one_reading(teacher)


@pytest.mark.parametrize(("bits", "is_ordered"), [(2, False), (4, False), (8, True)])
@pytest.mark.parametrize("is_symmetric", [True, False])
def test_packed_integers_are_unpacked(tmp_path: Path, bits: int, is_ordered: bool, is_symmetric: bool) -> None:
    def store(shape: torch.Size) -> tuple[Pieces, Tensor]:
        matrix = grouped(shape, bits, size=12, is_ordered=is_ordered)
        pieces = {"weight_packed": packed(matrix.values, bits), "weight_shape": torch.tensor(shape)}
        pieces["weight_scale"] = matrix.scales
        if is_symmetric:
            matrix.zeros.fill_(2 ** (bits - 1))
        else:
            pieces["weight_zero_point"] = packed(matrix.zeros.T, bits).T
        if is_ordered:
            pieces["weight_g_idx"] = matrix.groups.int()
        return pieces, matrix.expected

    folder = make_model(tmp_path / "model", "llama-tied", intermediate_size=60)  # which eight does not divide
    weights = {"num_bits": bits, "strategy": "group", "group_size": 12, "symmetric": is_symmetric}
    stated = compressed("pack-quantized", **weights)
    expected = store_matrices(folder, stated, store)
    teacher = open_teacher(str(folder))
    assert not list(differences(teacher, expected))
    require_one_reading(teacher)
    tensors = load_file(folder / "model.safetensors")
    write(folder, tensors, compressed("pack-quantized", **{**weights, "num_bits": 12 - bits if bits > 2 else 4}))
    with pytest.raises(UserError, match=r"does not hold a matrix of shape .* in . bits"):
        open_teacher(str(folder))
    changed = "_g_idx" if is_ordered else SCALES if is_symmetric else ZEROS  # the control
    write(folder, {name: x.flip(0) if name.endswith(changed) else x for name, x in tensors.items()}, stated)
    assert list(differences(open_teacher(str(folder)), expected))


@pytest.mark.parametrize(("bits", "is_ordered"), [(2, False), (4, True), (8, False)])
@pytest.mark.parametrize("format", ["gptq", "gptq_v2"])
def test_gptq_is_read_in_both_formats(tmp_path: Path, bits: int, is_ordered: bool, format: str) -> None:
    def store(shape: torch.Size) -> tuple[Pieces, Tensor]:
        matrix = grouped(shape, bits, size=12, is_ordered=is_ordered)
        zeros = packed(matrix.zeros.T, bits)
        if format == "gptq":
            zeros -= sum(2**place for place in range(0, 32, bits))
        pieces = {"qweight": packed(matrix.values, bits).T, "qzeros": zeros, "scales": matrix.scales.T}
        return pieces | {"g_idx": matrix.groups.int(), "bias": torch.zeros(shape[0])}, matrix.expected

    folder = make_model(tmp_path / "model", "llama-tied", intermediate_size=60)
    stated = {"quant_method": "gptq", "bits": bits, "group_size": 12}
    expected = store_matrices(folder, {**stated, "checkpoint_format": format}, store)
    teacher = open_teacher(str(folder))
    assert not list(differences(teacher, expected))
    require_one_reading(teacher)
    tensors = load_file(folder / "model.safetensors")
    if not is_ordered:
        in_order = {name: 0 * x if name.endswith("g_idx") else x for name, x in tensors.items()}
        write(folder, in_order, {**stated, "checkpoint_format": format})
        assert not list(differences(open_teacher(str(folder)), expected))
    write(folder, tensors, {**stated, "checkpoint_format": "gptq_v2" if format == "gptq" else "gptq"})  # the control
    assert list(differences(open_teacher(str(folder)), expected))


def in_awq(shape: torch.Size) -> tuple[Pieces, Tensor]:
    matrix = grouped(shape, 4, size=16)
    interleaved = torch.tensor([8 * (i // 8) + [0, 2, 4, 6, 1, 3, 5, 7][i % 8] for i in range(shape[0])])
    values, zeros = (packed(x.T[:, interleaved], 4) for x in (matrix.values, matrix.zeros))
    return {"qweight": values, "qzeros": zeros, "scales": matrix.scales.T}, matrix.expected


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm", "zero_point": True}


def test_awq_is_read_in_its_own_order(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama-tied")
    expected = store_matrices(folder, AWQ, in_awq)
    teacher = open_teacher(str(folder))
    assert not list(differences(teacher, expected))
    require_one_reading(teacher)
    tensors = load_file(folder / "model.safetensors")
    write(folder, {name: x.flip(1) if name.endswith("qzeros") else x for name, x in tensors.items()}, AWQ)
    assert list(differences(open_teacher(str(folder)), expected))


def in_four_bits(shape: torch.Size, kind: str, *, is_nested: bool) -> tuple[Pieces, Tensor]:
    """Store random numbers as bitsandbytes does, with tables and scales whose products are exact in float32."""
    generator, block, nested_block = torch.Generator().manual_seed(sum(shape)), 64, 4
    count = shape.numel()
    table = torch.randint(-64, 64, (16,), generator=generator) / 64
    codes = torch.randint(0, 16, (count,), generator=generator)
    scales = torch.randint(0, 256, (-(-count // block),), generator=generator)
    state: dict[str, Any] = {"quant_type": kind, "blocksize": block, "dtype": "float32", "shape": list(shape)}
    pieces = {"weight": (codes[::2] * 16 + codes[1::2])[:, None].to(torch.uint8), "weight.quant_map": table}
    if is_nested:
        nested_table = torch.randint(0, 256, (256,), generator=generator) / 256
        nested_scales = 2.0 ** torch.randint(-2, 2, (-(-len(scales) // nested_block),), generator=generator)
        state |= {"nested_blocksize": nested_block, "nested_dtype": "float32", "nested_offset": 0.75}
        pieces |= {"weight.absmax": scales.to(torch.uint8), "weight.nested_absmax": nested_scales}
        pieces["weight.nested_quant_map"] = nested_table
        pairs = enumerate(scales.tolist())
        scales = torch.tensor([nested_table[q] * nested_scales[i // nested_block] + 0.75 for i, q in pairs])
    else:
        scales = pieces["weight.absmax"] = scales / 64
    written = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    pieces[f"weight.quant_state.bitsandbytes__{kind}"] = written
    values = [table[code] * scales[i // block] for i, code in enumerate(codes.tolist())]
    return pieces, torch.tensor(values).reshape(shape)


FOUR_BITS = {"quant_method": "bitsandbytes", "load_in_4bit": True}


@pytest.mark.parametrize(("kind", "is_nested"), [("nf4", False), ("nf4", True), ("fp4", True)])
def test_four_bits_of_bitsandbytes_are_read(tmp_path: Path, kind: str, is_nested: bool) -> None:
    folder = make_model(tmp_path / "model", "llama-tied", intermediate_size=54)  # whose blocks are not whole
    expected = store_matrices(folder, FOUR_BITS, lambda shape: in_four_bits(shape, kind, is_nested=is_nested))
    teacher = open_teacher(str(folder))
    assert not list(differences(teacher, expected))
    require_one_reading(teacher)
    tensors = load_file(folder / "model.safetensors")
    write(folder, {name: x.roll(1) if name.endswith(".absmax") else x for name, x in tensors.items()}, FOUR_BITS)
    assert list(differences(open_teacher(str(folder)), expected))  # the control
    name = next(name for name in tensors if name.endswith("absmax" if is_nested else kind))
    write(folder, {each: tensors[each] for each in tensors if each != name}, FOUR_BITS)
    with pytest.raises(UserError, match="nor a quantised one with its scales"):
        open_teacher(str(folder))


def test_int8_of_bitsandbytes_is_read(tmp_path: Path) -> None:
    def store(shape: torch.Size) -> tuple[Pieces, Tensor]:
        generator = torch.Generator().manual_seed(sum(shape))
        values = torch.randint(-127, 128, shape, generator=generator).to(torch.int8)
        scales = torch.rand(shape[0], generator=generator) + 0.5
        expected = torch.tensor(
            [[q * s / 127 for q in row] for row, s in zip(values.tolist(), scales.tolist(), strict=True)]
        )
        return {"weight": values, "SCB": scales, "weight_format": torch.tensor(0, dtype=torch.uint8)}, expected

    folder = make_model(tmp_path / "model", "llama-tied")
    stated = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    expected = store_matrices(folder, stated, store)
    teacher = open_teacher(str(folder))
    for name in teacher.tensors:
        torch.testing.assert_close(teacher.tensor(name), expected[name], rtol=1e-6, atol=0)
    require_one_reading(teacher)
    tensors = load_file(folder / "model.safetensors")
    write(folder, {name: x.flip(0) if name.endswith("SCB") else x for name, x in tensors.items()}, stated)
    other = open_teacher(str(folder))
    assert any(
        not torch.allclose(other.tensor(name), expected[name], rtol=1e-3) for name in other.tensors
    )  # the control
    write(folder, {name: x + 1 if name.endswith("weight_format") else x for name, x in tensors.items()}, stated)
    with pytest.raises(UserError, match="in the order of a kernel"):
        open_teacher(str(folder))


def test_every_method_that_is_dequantised_can_be_read() -> None:
    assert set(DEQUANTISED) == set(METHODS)


def test_a_bias_that_the_model_lacks_is_left_out_only_if_it_is_zero(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama-biases")
    stated = load_file(folder / "model.safetensors")
    expected = store_matrices(folder, AWQ, in_awq)
    assert not list(differences(open_teacher(str(folder)), expected))  # biases of the model stay
    assert any(name.endswith("_proj.bias") and stated[name].any() for name in expected)
    for entry in ("attention_bias", "mlp_bias"):
        write(folder, load_file(folder / "model.safetensors"), AWQ, **{entry: False})
    with pytest.raises(UserError, match=r"no row of the llama table matches tensor .*bias"):
        open_teacher(str(folder))


def test_scales_that_are_read_otherwise_are_noticed(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama-tied")
    expected = quantise(folder, "blocks")
    transposed = compressed("float-quantized", strategy="block", block_structure=[8, 16])
    write(folder, load_file(folder / "model.safetensors"), transposed)
    with pytest.raises(UserError, match="does not fit a matrix of shape"):
        open_teacher(str(folder))
    tensors = load_file(folder / "model.safetensors")
    flipped = {name: value.flip(0) if name.endswith(SCALES) else value for name, value in tensors.items()}
    write(folder, flipped, LAYOUTS["blocks"][0])
    assert list(differences(open_teacher(str(folder)), expected))


def test_fp8_equals_what_transformers_dequantises(tmp_path: Path, input_ids: Tensor) -> None:
    folder = make_model(tmp_path / "model", "llama-tied")
    quantise(folder, "DeepSeek")
    teacher = open_teacher(str(folder))
    config = FineGrainedFP8Config(weight_block_size=(8, 16), dequantize=True)
    stock = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32)
    for name, value in stock.state_dict().items():
        if name in teacher.tensors:
            assert torch.equal(value, teacher.tensor(name)), name


def in_mxfp4(folder: Path) -> Tensors:
    """Store the experts of GPT-OSS in MXFP4, with random values, and return what is to be read."""
    tensors = load_file(folder / "model.safetensors")
    generator, stored, expected = torch.Generator().manual_seed(0), {}, dict(tensors)
    for name, value in tensors.items():
        if value.ndim != 3 or name.endswith("bias"):
            stored[name] = value
            continue
        experts, width, outputs = value.shape
        shape = (experts, outputs, width // 32)
        blocks = torch.randint(0, 256, (*shape, 16), generator=generator).to(torch.uint8)
        exponents = torch.randint(118, 124, shape, generator=generator).to(torch.uint8)
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": exponents}
        codes = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2).long()  # the low half of a byte is first
        scaled = torch.tensor(FP4_VALUES)[codes] * 2.0 ** (exponents.float()[..., None] - 127)
        expected[name] = scaled.flatten(-2).mT
    write(folder, stored, {"quant_method": "mxfp4"})
    return expected


def test_the_experts_of_gpt_oss_are_read_from_mxfp4(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "gpt_oss", hidden_size=64)
    original, expected = load_file(folder / "model.safetensors"), in_mxfp4(folder)
    teacher = open_teacher(str(folder))
    assert not list(differences(teacher, expected))
    assert list(differences(teacher, original))
    require_one_reading(teacher)
    stock = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=Mxfp4Config(dequantize=True), dtype=torch.float32
    )
    for name, value in stock.state_dict().items():
        assert torch.equal(value, teacher.tensor(name)), name


def test_weights_are_dequantised_once_with_their_history(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "llama-tied", seed=3)
    quantise(folder, "int8")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\nbase_model: someone/tiny\n---\n")
    first = open_teacher(str(folder)).folder
    assert first.is_relative_to(cache_folder())
    assert history_of(folder) != History()
    step = {"step": "dequantise", "method": "compressed-tensors", "bits": [8], "dtype": "float32"}
    assert history_of(first) == history_of(folder).then(step)
    assert (first / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert "quantization_config" not in json.loads((first / "config.json").read_text())
    written = (first / "model.safetensors").stat().st_mtime_ns
    assert open_teacher(str(folder)).folder == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith(SCALES))
    write(folder, {**tensors, name: 2 * tensors[name]}, LAYOUTS["int8"][0])
    assert open_teacher(str(folder)).folder != first


def stating(**stated: Any) -> Callable[[Path], None]:
    return lambda folder: write(folder, load_file(folder / "model.safetensors"), stated)


def without(suffix: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        quantise(folder, "per channel")
        tensors = load_file(folder / "model.safetensors")
        first = next(name for name in tensors if name.endswith(suffix))
        write(folder, {name: tensors[name] for name in tensors if name != first}, LAYOUTS["per channel"][0])

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (stating(quant_method="aqlm", bits=4), r"\(aqlm\); convert them .* one of fp8, compressed-tensors"),
        (stating(quant_method="gptq", bits=3), "bits 3; those of 2, 4, 8 can be"),
        (stating(quant_method="gptq", bits=4, checkpoint_format="marlin"), "format marlin; those of gptq, g"),
        (stating(quant_method="bitsandbytes"), "load_in_4bit and load_in_8bit False; those of True can be"),
        (stating(quant_method="awq", bits=4, version="gemv"), "version gemv; those of gemm can be"),
        (stating(quant_method="awq", bits=4, group_size=0), r"blocks of \[1, 0\], not two"),
        (stating(quant_method="modelopt", quant_algo="NVFP4"), "quant_algo NVFP4; those of FP8 can be"),
        (stating(**compressed("nvfp4-pack-quantized", num_bits=4)), "format nvfp4-pack-quantized; those of float-quan"),
        (stating(**compressed("int-quantized", num_bits=4)), "num_bits 4; those of 8 can be"),
        (stating(**compressed("int-quantized"), sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
        (stating(**compressed("int-quantized"), transform_config={"config_groups": {"R1": {}}}), "transform_config"),
        (stating(**compressed("int-quantized", strategy="block", block_structure="8x8")), "blocks of 8x8, not two"),
        (stating(quant_method="fp8"), "quantised by fp8, but no tensor has scales"),
        (without("q_proj.weight"), "_scale .* is neither a weight in floating point"),
        (without("weight_scale"), r"proj.weight \(F8_E4M3\) is neither"),
    ],
)  # fmt: skip
def test_what_cannot_be_dequantised_is_refused(tmp_path: Path, change: Callable[[Path], None], message: str) -> None:
    folder = make_model(tmp_path / "model", "llama-tied")
    change(folder)
    with pytest.raises(UserError, match=message) as caught:
        open_teacher(str(folder))
    assert "\n" not in str(caught.value)
    assert not list(cache_folder().glob(".*partial*"))


def test_a_student_states_how_the_weights_of_its_teacher_were_stored(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(f"{i} times {i} is {i * i}." for i in range(200)))
    settings: dict[str, Any] = {"data": str(tmp_path / "text.txt"), "context": 32, "device": "cpu"}
    cards = []
    for stated in (AWQ, None):
        place = tmp_path / ("quantised" if stated else "plain")
        folder = make_model(place / "model", "llama-tied")
        if stated:
            store_matrices(folder, stated, in_awq)
        minitron.prune(folder, place / "cut", num_hidden_layers=3, calibration={"tokens": 64}, **settings)
        minitron.distill(folder, place / "cut", place / "student", distill={"tokens": 64, "batch_size": 1}, **settings)
        steps = [step["step"] for step in history_of(place / "student").steps]
        assert steps == (["dequantise"] if stated else []) + ["prune", "distill"]
        cards.append((place / "student" / "README.md").read_text())
    assert "### Dequantisation of the teacher\n" in cards[0]
    assert cards[0].count("| weights stored | awq, 4 bits |\n| read in | float32 |") == 1
    assert "The teacher's weights were stored quantised (awq, 4 bits) and were read in float32." in cards[0]
    assert "quantis" not in cards[1]  # the control
    assert cards[0].splitlines()[-1] == cards[1].splitlines()[-1]
    assert "\n# model, " in cards[0]


def test_the_hash_of_files_is_kept_until_one_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other, cache = tmp_path / "weights", tmp_path / "config", tmp_path / "cache"
    path.write_bytes(b"one")
    other.write_bytes(b"{}")

    def found() -> str:
        return content.content_hash("files", [path, other], cache)

    def change(data: bytes) -> None:
        """Write other data of equal size and set the time of writing back."""
        times = path.stat()
        path.write_bytes(data)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    one = found()
    assert one == sha256(b"one{}").hexdigest()[:16]
    assert not cache.exists()  # the files have only just been written, and may be written again at an equal time
    monkeypatch.setattr(content, "SETTLED_NANOSECONDS", -(10**12))
    assert found() == one
    [kept] = [each for each in (cache / content.HASHES).iterdir() if each.name != "lock"]
    kept.write_text("0" * 16)
    assert found() == "0" * 16  # read from the cache, not from the files
    kept.write_text("0")
    assert found() == one  # a file that is cut off is not a hash
    change(b"two")
    assert found() == sha256(b"two{}").hexdigest()[:16]
    monkeypatch.setattr(content, "_stamp", lambda paths: "".join(str(each.stat().st_mtime_ns) for each in paths))
    two = found()
    change(b"six")
    assert found() == two  # the control: sizes and times of writing alone do not show the change
