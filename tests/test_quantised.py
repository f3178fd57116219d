"""Teachers with quantised weights: what is read equals a direct formula, and transformers' own dequantisation."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, FineGrainedFP8Config, Mxfp4Config
from transformers.integrations.mxfp4 import FP4_VALUES

from minitron.errors import UserError
from minitron.history import History, history_of
from minitron.model.checkpoint import Checkpoint
from minitron.model.crosscheck import require_one_reading
from minitron.model.source import cache_folder, open_teacher
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
    """Pack signed integers in the bits of 32-bit integers, by text: the last of eight hexadecimal digits is first."""
    digits, per = bits // 4, 32 // bits
    rows = []
    for row in values.tolist():
        texts = [f"{value + 2 ** (bits - 1):0{digits}x}" for value in row]
        texts += ["0" * digits] * (-len(texts) % per)
        words = [int("".join(reversed(texts[i : i + per])), 16) for i in range(0, len(texts), per)]
        rows.append([word - 2**32 if word >= 2**31 else word for word in words])
    return torch.tensor(rows, dtype=torch.int32)


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


@pytest.mark.parametrize("bits", [4, 8])
def test_packed_integers_are_unpacked(tmp_path: Path, bits: int) -> None:
    folder = make_model(tmp_path / "model", "llama-tied", intermediate_size=60)  # which eight does not divide
    generator, stored = torch.Generator().manual_seed(bits), load_file(folder / "model.safetensors")
    expected = dict(stored)
    for name in [name for name in stored if name.endswith("_proj.weight")]:
        rows, columns = stored.pop(name).shape
        values = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns), generator=generator)
        pieces = {"": values, SCALES: torch.rand(rows, columns // 12, generator=generator)}
        stored |= {name + "_packed": packed(values, bits), name + "_shape": torch.tensor([rows, columns])}
        stored[name + SCALES] = pieces[SCALES]
        expected[name] = by_entry(pieces, (1, 12))
    stated = {"num_bits": bits, "strategy": "group", "group_size": 12}
    write(folder, stored, compressed("pack-quantized", **stated))
    teacher = open_teacher(str(folder))
    assert not list(differences(teacher, expected))
    require_one_reading(teacher)
    write(folder, stored, compressed("pack-quantized", **{**stated, "num_bits": 12 - bits}))  # the control
    with pytest.raises(UserError, match=f"does not hold a matrix of shape .* in {12 - bits} bits"):
        open_teacher(str(folder))
    write(folder, stored, compressed("pack-quantized", **stated, symmetric=False))
    with pytest.raises(UserError, match="symmetric False; those of True"):
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
    assert history_of(first) == history_of(folder) != History()
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
        (stating(quant_method="gptq", bits=4), r"\(gptq\); convert them .* one of fp8, compressed-tensors"),
        (stating(quant_method="bitsandbytes"), r"\(bitsandbytes\); convert"),
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
