"""Rounding to eight and four bits: against compressed-tensors, against a slow formula, and which matrices it is for."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from minitron.errors import UserError
from minitron.model import schemes
from minitron.model.anatomy import in_backbone
from minitron.model.arch import Arch
from minitron.model.schemes import SCHEMES, Scheme, scheme_for
from tests.conftest import make_config, variant_arch, variants_that

ARGS: dict[str, dict[str, object]] = {
    "fp8": {"num_bits": 8, "type": "float", "strategy": "channel"},
    "int8": {"num_bits": 8, "type": "int", "strategy": "channel"},
    "int4": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128},
}
INPUTS: dict[str, dict[str, object]] = {"fp8": {"strategy": "tensor"}, "int8": {"strategy": "token", "dynamic": True}}


def matrix(seed: int = 0) -> torch.Tensor:
    """A matrix of heavy tails, with a row of zeros and one of small numbers."""
    values = torch.randn(24, 256, generator=torch.Generator().manual_seed(seed))
    weight = values * values.abs() * 0.02
    weight[3] = 0.0
    weight[5] *= 1e-6
    return weight


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_those_of_compressed_tensors(scheme: Scheme, dtype: torch.dtype) -> None:
    compression = pytest.importorskip("compressed_tensors.quantization")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    args, weight = compression.QuantizationArgs(**ARGS[scheme.name]), matrix().to(dtype)
    scales = schemes.scales(weight, scheme)
    # The library computes in the dtype of the weight; bfloat16 quotients round other entries to the next value.
    theirs = forward.quantize(weight.float(), scales.float(), None, args, dtype=scheme.dtype)
    ours = schemes.quantised(weight, scales, scheme)
    assert torch.equal(ours.float(), theirs.float())
    assert torch.equal(schemes.rounded(weight, scales, scheme), forward.dequantize(theirs, scales, None, args))
    assert not torch.equal(schemes.rounded(weight, scales * 2, scheme), schemes.rounded(weight, scales, scheme))
    again = schemes.rounded(weight, scales, scheme)
    assert torch.equal(schemes.rounded(again, scales, scheme), again)


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_are_those_of_compressed_tensors(name: str) -> None:
    compression = pytest.importorskip("compressed_tensors.quantization")
    forward = pytest.importorskip("compressed_tensors.quantization.lifecycle.forward")
    scheme, inputs = SCHEMES[name], matrix(1).view(2, 12, 256) * 100
    args = compression.QuantizationArgs(**{**ARGS[name], **INPUTS[name]})
    if scheme.activations == "token":
        scale, _ = compression.utils.compute_dynamic_scales_and_zp(inputs, args, torch.nn.Module())
        ours = schemes.rounded_inputs(inputs, scheme)
    else:
        scale = schemes.input_scale(inputs.abs().max() / 2, scheme)  # larger inputs are clipped
        ours = schemes.rounded_inputs(inputs, scheme, scale)
    assert torch.equal(ours, forward.fake_quantize(inputs, scale.float(), None, args))
    assert not torch.equal(ours, inputs)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_scales_have_the_least_squared_error_of_the_candidates(scheme: Scheme) -> None:
    weight = matrix(2)
    scales = schemes.scales(weight, scheme)
    group = scheme.group or weight.shape[1]
    for row, column in [(0, 0), (7, scales.shape[1] - 1), (11, 0)]:
        entries = weight[row, column * group : (column + 1) * group].tolist()
        errors = {}
        for factor in scheme.factors:
            scale = torch.tensor(max(map(abs, entries)) * factor / scheme.largest).bfloat16().item()
            values = [min(max(entry / scale, scheme.smallest), scheme.largest) for entry in entries]
            if scheme.dtype.is_floating_point:
                stored = torch.tensor(values).to(scheme.dtype).tolist()
            else:
                stored = [round(value) for value in values]
            errors[scale] = math.fsum((s * scale - e) ** 2 for s, e in zip(stored, entries, strict=True))
        assert scales[row, column].item() == pytest.approx(min(errors, key=lambda scale: errors[scale]), rel=1e-6)


@pytest.mark.parametrize("variant", variants_that(lambda arch: arch.model_type not in {"gpt2", "gpt_oss"}))
def test_the_linear_modules_of_layers_are_rounded_and_no_others(variant: str) -> None:
    arch = variant_arch(variant)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(make_config(variant)).base_model
    modules = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    names = {in_backbone(name).removesuffix(".weight") for name in schemes.quantised_tensors(arch)}
    assert {name for name in names if ".experts." not in name} == {
        name for name in modules if "layers" in name.split(".")
    }
    stacked = [value for name, value in model.named_parameters() if value.ndim == 3 and "conv" not in name]
    of_experts = [row for row in schemes.quantised_rows(arch) if row.is_per_expert]
    counts = (len(arch.layer_numbers(row.kind)) * math.prod(row.shape(arch.axis_size)) for row in of_experts)
    assert sum(counts) * arch.sizes.get("num_local_experts", 1) == sum(map(torch.numel, stacked))


def sized(**sizes: int) -> Arch:
    return Arch.from_config(make_config("llama", **sizes).to_dict())


def test_groups_divide_every_matrix() -> None:
    assert scheme_for("int4", sized(hidden_size=768, intermediate_size=256, head_dim=128)).group == 128
    assert scheme_for("int4", sized(hidden_size=768, intermediate_size=192, head_dim=128)).group == 64
    assert scheme_for("int4", sized(hidden_size=96, intermediate_size=64, head_dim=16)).group == 32
    assert scheme_for("fp8", sized(intermediate_size=72)).group is None
    with pytest.raises(UserError, match=r"multiple of 32, and .*down_proj.weight has 72 inputs"):
        scheme_for("int4", sized(hidden_size=96, intermediate_size=72, head_dim=16))


@pytest.mark.parametrize(("variant", "reason"), [("gpt2", "transposed"), ("gpt_oss", "in one tensor")])
def test_families_without_linear_modules_are_refused(variant: str, reason: str) -> None:
    with pytest.raises(UserError, match=reason):
        scheme_for("fp8", variant_arch(variant))
    with pytest.raises(UserError, match="scheme fp9"):
        scheme_for("fp9", variant_arch("llama"))
