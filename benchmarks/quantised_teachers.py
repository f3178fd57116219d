"""Checks that quantised matrices are read as the libraries that write them dequantise them, entry by entry.

    python benchmarks/quantised_teachers.py [--size 256]

Each library packs a random matrix, Minitron reads the tensors from a file, and the library dequantises them. A line
states the largest difference, and that of a control: the matrix read with one piece of the layout misread. Libraries
that are not installed are left out, with a line that states it: compressed-tensors (0.20; 0.9 for
columns ordered by activation), gptqmodel, autoawq, bitsandbytes.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from minitron.model.checkpoint import Checkpoint
from minitron.model.quantised.layout import find_matrices
from minitron.model.quantised.methods import read_quantisation
from minitron.model.weights import locate_tensors

Case = tuple[str, dict[str, Any], dict[str, Any], dict[str, Tensor], Tensor]
"""A name, what a config states, what a misread config states, the stored tensors, and what the library reads."""
GROUP = 32


def read(tensors: dict[str, Tensor], stated: dict[str, Any]) -> Tensor:
    """Return the one quantised matrix among tensors, as Minitron reads it."""
    with tempfile.TemporaryDirectory() as folder:
        save_file({f"x.{name}": value.contiguous() for name, value in tensors.items()}, f"{folder}/model.safetensors")
        checkpoint: Any = Checkpoint(Path(folder), None, None, locate_tensors(Path(folder)))  # type: ignore[arg-type]
        [matrix] = find_matrices(checkpoint, read_quantisation(Path(folder), stated))
        assert matrix.name == "x.weight"
        value = matrix.layout.read(matrix)
        assert tuple(value.shape) == matrix.layout.shape(matrix)
        return value


def compressed_tensors(size: int) -> Iterator[Case]:
    """Packed weights with and without zero points, and with columns ordered by their activations."""
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    weight = torch.randn(size + 4, size)
    for bits in (2, 4, 8):
        for symmetric in (True, False):
            stated = {"num_bits": bits, "strategy": "group", "group_size": GROUP, "symmetric": symmetric}
            half = 2 ** (bits - 1)
            scales = weight.unflatten(1, (-1, GROUP)).abs().amax(2) / (half - 0.5)
            zeros = torch.zeros_like(scales, dtype=torch.int8)
            if not symmetric:
                zeros = torch.randint(-half, half, scales.shape).to(torch.int8)
            scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**stated))
            state = {"weight": weight, "weight_scale": scales, "weight_zero_point": zeros}
            tensors, expected = _packed_by_compressed_tensors(state, scheme)
            name = f"compressed-tensors {version('compressed-tensors')}, {bits} bits, symmetric {symmetric}"
            yield name, _compressed(stated), _compressed(stated), tensors, expected


def _packed_by_compressed_tensors(state: dict[str, Tensor], scheme: Any) -> tuple[dict[str, Tensor], Tensor]:
    from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor

    tensors = PackedQuantizationCompressor.compress(state, scheme)
    return tensors, PackedQuantizationCompressor.decompress(tensors, scheme)["weight"]


def ordered_by_activations(size: int) -> Iterator[Case]:
    """Packed weights of compressed-tensors up to 0.12, whose columns have groups in any order."""
    from compressed_tensors.compressors.quantized_compressors.pack_quantized import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs

    weight, groups = torch.randn(size + 4, size), torch.arange(size)[torch.randperm(size)] // GROUP
    stated = {"num_bits": 4, "strategy": "group", "group_size": GROUP, "actorder": "group"}
    args, compressor = QuantizationArgs(**stated), PackedQuantizationCompressor()
    scales = torch.rand(size + 4, size // GROUP) / 4 + 0.1
    state = {"scale": scales, "quantization_args": args, "g_idx": groups.int()}
    tensors = compressor.compress_weight(weight=weight, **state)
    tensors |= {"weight_scale": scales, "weight_g_idx": groups.int()}
    expected = compressor.decompress_weight(dict(tensors), args)
    name = f"compressed-tensors {version('compressed-tensors')}, columns ordered by activation"
    yield name, _compressed(stated), _compressed(stated), tensors, expected


def _compressed(weights: dict[str, Any]) -> dict[str, Any]:
    groups = {"group_0": {"targets": ["Linear"], "weights": weights}}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}


def gptqmodel(size: int) -> Iterator[Case]:
    """GPTQ of all bits, both formats of zero points, inputs in order and ordered by activation; and AWQ."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization.config import QuantizeConfig
    from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module, convert_gptq_v2_to_v1_format_module
    from gptqmodel.version import __version__

    for kind, bits in (("gptq", 2), ("gptq", 4), ("gptq", 8), ("awq", 4)):
        for is_ordered in (False, True) if kind == "gptq" else (False,):
            groups = torch.arange(size)[torch.randperm(size) if is_ordered else slice(None)] // GROUP
            linear, scales, zeros = _quantised(size, groups, bits)
            options = {"bits": bits, "group_size": GROUP, "sym": False, "desc_act": is_ordered, "bias": False}
            sizes = {"in_features": size, "out_features": size + 32, "register_buffers": True}
            module = (TorchLinear if kind == "gptq" else AwqTorchLinear)(**options, **sizes)
            module.pack(linear, scales, zeros, groups.int())
            stated = {"quant_method": kind, "bits": bits, "group_size": GROUP}
            name = f"GPTQModel {__version__}, {kind}, {bits} bits" + (", by activation" if is_ordered else "")
            if kind == "awq":
                expected = module._dequantize_weight_for_inference(torch.zeros(1, size), dtype=torch.float16).T
                yield name, stated, stated, dict(module.named_buffers()), expected
                continue
            for format in ("gptq_v2", "gptq"):
                if format == "gptq":
                    convert_gptq_v2_to_v1_format_module(module, QuantizeConfig(bits=bits))
                names = ("qweight", "qzeros", "scales", "g_idx")
                tensors = {each: getattr(module, each).clone() for each in names}
                if format == "gptq":
                    convert_gptq_v1_to_v2_format_module(module, bits, torch.int32)
                other = "gptq" if format == "gptq_v2" else "gptq_v2"
                module.post_init()
                expected = module.dequantize_weight().T
                read_as = ({**stated, "checkpoint_format": each} for each in (format, other))
                yield f"{name}, {format}", *read_as, tensors, expected


def autoawq(size: int) -> Iterator[Case]:
    """AWQ, packed by AutoAWQ's own linear layer and read by its own function."""
    import awq
    from awq.modules.linear.gemm import WQLinear_GEMM
    from awq.utils.packing_utils import dequantize_gemm

    linear, scales, zeros = _quantised(size, torch.arange(size) // GROUP, 4)
    module = WQLinear_GEMM.from_linear(linear, 4, GROUP, False, scales.T.contiguous(), zeros.T.contiguous())
    tensors = {name: getattr(module, name).cpu() for name in ("qweight", "qzeros", "scales")}
    stated = {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}
    expected = dequantize_gemm(tensors["qweight"], tensors["qzeros"], tensors["scales"], 4, GROUP).T
    yield f"AutoAWQ {awq.__version__}", stated, stated, tensors, expected


def _quantised(size: int, groups: Tensor, bits: int) -> tuple[torch.nn.Linear, Tensor, Tensor]:
    """Return a linear layer whose weights are exact in some bits, its scales and its zero points (outputs, groups)."""
    outputs = size + 32
    scales = (torch.rand(outputs, size // GROUP) / 64 + 0.01).half().float()
    zeros = torch.randint(0, 2**bits, scales.shape).float()
    values = torch.randint(0, 2**bits, (outputs, size)).float()
    linear = torch.nn.Linear(size, outputs, bias=False)
    linear.weight.data = (values - zeros[:, groups]) * scales[:, groups]
    return linear, scales, zeros


def bitsandbytes(size: int) -> Iterator[Case]:
    """LLM.int8, and nf4 and fp4 with and without quantised scales, also of a matrix that blocks do not divide.

    Its rows are of odd length: for rows of even length that are not whole blocks, the CPU kernel of bitsandbytes 0.50.2
    takes the wrong scales, as its own generic version shows (`_dequantize_4bit_compute`).
    """
    from bitsandbytes import functional

    name = f"bitsandbytes {version('bitsandbytes')}"
    stated = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    values, scales, _ = functional.int8_vectorwise_quant(torch.randn(size, size).half())
    expected = functional.int8_vectorwise_dequant(values, scales)
    yield f"{name}, int8", stated, stated, {"weight": values, "SCB": scales}, expected
    stated = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    for kind in ("nf4", "fp4"):
        for nested in (False, True):
            for columns in (size, size + 3):
                weight = torch.randn(size + 1, columns)
                packed, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
                tensors = {"weight": packed} | {
                    f"weight.{part}": value for part, value in state.as_dict(packed=True).items()
                }
                expected = functional.dequantize_4bit(packed, state)
                yield f"{name}, {kind}, nested {nested}, {columns} columns", stated, stated, tensors, expected


def misread(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors of which one that decides values is in another order."""
    deciding = ("weight_g_idx", "weight_zero_point", "weight_scale", "SCB", "weight.absmax", "qzeros")
    name = next(name for name in deciding if name in tensors)
    return {**tensors, name: tensors[name].roll(1, 0)}


def main() -> None:
    """Print a line per case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256)
    size = parser.parse_args().size
    sources: tuple[Callable[[int], Iterator[Case]], ...] = (
        *(compressed_tensors, ordered_by_activations, gptqmodel, autoawq, bitsandbytes),
    )
    for source in sources:
        torch.manual_seed(0)
        try:
            for name, stated, other, tensors, expected in source(size):
                found = read(tensors, stated)
                control = read(misread(tensors) if other == stated else tensors, other)
                unit = expected.dtype
                difference, misreading = ((each.to(unit) - expected).abs().max().item() for each in (found, control))
                print(f"{name}: largest difference {difference:.3g}, control {misreading:.3g}", flush=True)
        except (ImportError, PackageNotFoundError) as error:
            print(f"{source.__name__}: left out ({error})")


if __name__ == "__main__":
    main()
