"""Properties 3, 4, 6 and 7: permutations change nothing, a trimmed student is its masked teacher, and it reloads."""

import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from minitron.derivation.proof import permuted, random_importance
from minitron.errors import UserError
from minitron.model.anatomy import AXES
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.model.config import student_config
from minitron.model.language_model import build_model, load_model
from minitron.pruning.cut import Cut, write_pruned
from minitron.pruning.cut import cut_to as pruned_to
from minitron.pruning.selection import Kept, select
from minitron.recipe import CUT_ONLY
from tests.conftest import INPUT_IDS, VARIANTS, make_model, variants_by, variants_that

CPU = torch.device("cpu")


def build(teacher: Checkpoint, arch: Arch, kept: Kept) -> Any:
    config = student_config(teacher, arch, kept["layer"].tolist())
    return build_model(config, Cut(teacher.arch, arch, kept, teacher.tensor), CPU)


@torch.no_grad()
def logits(model: Any, input_ids: Tensor) -> Tensor:
    return model(input_ids=input_ids).logits  # type: ignore[no-any-return]


@cache
def whole_logits(folder: Path) -> Tensor:
    """Return the logits of a teacher, which several tests compare with."""
    return logits(load_model(open_checkpoint(folder), CPU, torch.float32), INPUT_IDS)


def everything(arch: Arch) -> Kept:
    """All entries of every axis, in order."""
    return select(random_importance(arch), arch, arch)


AXES_WITHIN_LAYERS = ["hidden", "ffn", "expert", "expert_ffn", "shared_ffn", "latent", "query", "kv", "mhead", "mchan"]


def prunes(arch: Arch, axis: str) -> bool:
    return axis in arch.prunable_axes


@pytest.mark.parametrize(("teacher", "axis"), variants_by(AXES_WITHIN_LAYERS, prunes), indirect=["teacher"])
def test_permuting_an_axis_leaves_the_logits_unchanged(teacher: Checkpoint, axis: str, input_ids: Tensor) -> None:
    kept = permuted(teacher.arch, axis)
    assert not torch.equal(kept[axis], everything(teacher.arch)[axis])
    expected = whole_logits(teacher.folder)
    torch.testing.assert_close(logits(build(teacher, teacher.arch, kept), input_ids), expected, atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize(("teacher", "axis"), variants_by(AXES_WITHIN_LAYERS, prunes), indirect=["teacher"])
def test_a_permutation_that_one_tensor_misses_changes_them(teacher: Checkpoint, axis: str, input_ids: Tensor) -> None:
    tensors = dict(Cut(teacher.arch, teacher.arch, permuted(teacher.arch, axis), teacher.tensor))
    missed, _ = along(teacher.arch, axis)
    tensors.update({name: teacher.tensor(name) for name in missed})
    layers = list(range(teacher.arch.axis_size("layer")))
    model = build_model(student_config(teacher, teacher.arch, layers), tensors.items(), CPU)
    expected = whole_logits(teacher.folder)
    assert (logits(model, input_ids) - expected).abs().max() > 1e-3


CUTS = {
    "ffn": {"intermediate_size": 40},
    "query": {"num_attention_heads": 3},
    "kv": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "kv and query": {"num_attention_heads": 2, "num_key_value_heads": 2},
    "expert": {"num_local_experts": 3},
    "expert_ffn": {"moe_intermediate_size": 16},
    "shared_ffn": {"moe_shared_expert_intermediate_size": 24},
    "latent": {"moe_latent_size": 8},
    "mhead": {"mamba_num_heads": 6},
    "mchan": {"mamba_head_dim": 4},
    "layer": {"num_hidden_layers": 2},
    "all but hidden": {"intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2,
                       "num_local_experts": 2, "moe_intermediate_size": 8, "moe_shared_expert_intermediate_size": 16,
                       "moe_latent_size": 8, "mamba_num_heads": 6, "mamba_head_dim": 4, "num_hidden_layers": 3},
}  # fmt: skip


@torch.no_grad()
def masked_logits(teacher: Checkpoint, kept: Kept, input_ids: Tensor) -> Tensor:
    """The teacher's with everything that is cut switched off by hand, module by module."""
    model, arch = load_model(teacher, CPU, torch.float32), teacher.arch
    with ExitStack() as stack:
        for layer in range(arch.axis_size("layer")):
            block = model.get_submodule(arch.family.layer.replace("{i}", str(layer)))
            if layer not in kept["layer"].tolist():
                stack.callback(block.register_forward_hook(pass_over, with_kwargs=True).remove)
            for tap in arch.layer_taps(layer):
                if tap.side != "routed" and len(tap.axes) == 1 and tap.axes != ("hidden",):
                    mask = torch.zeros(arch.axis_size(tap.axes[0]))
                    mask[kept[tap.axes[0]][layer]] = 1.0
                    module = model.get_submodule(tap.module.replace("{i}", str(layer)))
                    if tap.side == "input":
                        stack.callback(module.register_forward_pre_hook(masking(mask)).remove)
                    else:
                        stack.callback(module.register_forward_hook(lambda _, __, output, m=mask: output * m).remove)
            for module in block.modules():
                if hasattr(module, "conv1d"):
                    mask_mixer(module, kept["mhead"][layer], kept["mchan"][layer])
                if hasattr(module, "experts"):
                    ffn = kept["expert_ffn" if "expert_ffn" in kept else "ffn"][layer]
                    mask_experts(module, kept["expert"][layer], ffn)
        return logits(model, input_ids)


def pass_over(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    before = args[0] if args else kwargs["hidden_states"]
    return (before, *output[1:]) if isinstance(output, tuple) else before


def masking(mask: Tensor) -> Any:
    return lambda _, args: (args[0] * mask.repeat_interleave(args[0].shape[-1] // len(mask)),)


def mask_mixer(mixer: Any, heads: Tensor, channels: Tensor) -> None:
    """Without its convolution, x is zero and with it all that a head puts out; the norm then sees more zeros."""
    kept = torch.zeros(mixer.num_heads, mixer.head_dim, dtype=torch.bool)
    kept[heads[:, None], channels] = True
    cut = (~kept).flatten().nonzero().squeeze(-1)
    mixer.conv1d.weight[cut] = 0.0
    mixer.conv1d.bias[cut] = 0.0
    share = float(kept.float().mean())
    if hasattr(mixer, "norm") and hasattr(mixer.norm, "weight"):
        mixer.norm.weight.mul_(share**0.5)
        mixer.norm.variance_epsilon *= share


def mask_experts(moe: Any, experts: Tensor, ffn: Tensor) -> None:
    """Experts that are cut are never chosen; neurons that are cut are not read."""
    cut = torch.tensor([e for e in range(moe.experts.num_experts) if e not in experts.tolist()], dtype=torch.int64)
    router = moe.router if hasattr(moe, "router") else moe.gate
    if hasattr(router, "e_score_correction_bias"):
        router.e_score_correction_bias[cut] = -torch.inf
    forward, linear = router.forward, nn.functional.linear

    def route(states: Tensor) -> Any:
        with patch.object(nn.functional, "linear", lambda *args: linear(*args).index_fill(-1, cut, -torch.inf)):
            return forward(states)

    router.forward = route
    for e in range(moe.experts.num_experts):
        down = moe.experts.down_proj[e] if moe.experts.is_transposed else moe.experts.down_proj[e].T  # (ffn, hidden)
        gone = torch.ones(len(down), dtype=torch.bool)
        gone[ffn[e]] = False
        down[gone] = 0.0


def sizes_of(arch: Arch, cut: str) -> dict[str, int]:
    """Return the sizes that a cut changes, none where the family has no such axis."""
    prunable = {AXES[axis] for axis in arch.prunable_axes}
    sizes = {name: size for name, size in CUTS[cut].items() if name in prunable}
    if "num_hidden_layers" in sizes and arch.layer_counts:
        sizes["num_hidden_layers"] = len(arch.layer_counts) + sizes["num_hidden_layers"] - 2
    if "mamba_num_heads" in sizes:
        sizes["mamba_num_heads"] = arch.axis_size("mhead") // 2
    if arch.family.product and arch.family.product.axes[0] == "query":
        # Heads cannot leave without channels, and without channels nothing is a mask.
        sizes.pop("num_attention_heads", None)
    if arch.family.product and len({"mamba_num_heads", "mamba_head_dim"} & sizes.keys()) == 2:
        sizes.pop("mamba_head_dim")
    return sizes


def can_cut(arch: Arch, cut: str) -> bool:
    return bool(sizes_of(arch, cut))


def cut_to(arch: Arch, cut: str) -> Arch:
    return arch.resized(**sizes_of(arch, cut))


def cut_everywhere(arch: Arch) -> Arch:
    """A shape with every axis cut, hidden too."""
    product = arch.family.product
    if product and product.axes[0] == "query":
        return cut_to(arch, "all but hidden").resized(hidden_size=32, num_attention_heads=4)
    if product:
        return arch.resized(hidden_size=36, mamba_num_heads=6, mamba_head_dim=6, num_hidden_layers=3)
    return cut_to(arch, "all but hidden").resized(hidden_size=40)


def along(arch: Arch, axis: str) -> tuple[list[str], int]:
    """A tensor along an axis, in the last layer that has one (of experts, each one's), and the dimension along it."""
    found = [
        (row, dim)
        for row in arch.rows
        for dim, dimension in enumerate(row.dimensions)
        if any(axis in segment for segment in dimension) and (len(row.dimensions) > 1 or axis == "hidden")
    ]
    if axis == "hidden":  # the final norm, which the output matrix alone reads
        found = [(row, dim) for row, dim in found if not row.is_per_layer and len(row.dimensions) == 1]
    row, dim = found[-1]
    layer = arch.layer_numbers(row.kind)[-1] if row.is_per_layer else None
    experts = range(arch.axis_size("expert")) if row.is_per_expert else [None]
    return [row.tensor_name(layer, expert) for expert in experts], dim


@cache
def masked_logits_of(folder: Path, cut: str) -> Tensor:
    """Return the logits of a teacher that is masked to a cut of random importance, for the test and for its control."""
    teacher = open_checkpoint(folder)
    kept = select(random_importance(teacher.arch), teacher.arch, cut_to(teacher.arch, cut))
    return masked_logits(teacher, kept, INPUT_IDS)


@pytest.mark.parametrize(("teacher", "cut"), variants_by(CUTS, can_cut), indirect=["teacher"])
def test_a_trimmed_student_is_its_masked_teacher(teacher: Checkpoint, cut: str, input_ids: Tensor) -> None:
    arch = cut_to(teacher.arch, cut)
    kept = select(random_importance(teacher.arch), teacher.arch, arch)
    expected = masked_logits_of(teacher.folder, cut)
    student = build(teacher, arch, kept)
    assert sum(parameter.numel() for parameter in student.parameters()) == arch.num_parameters
    torch.testing.assert_close(logits(student, input_ids), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("teacher", variants_that(lambda arch: not arch.family.is_centred), indirect=True)
@torch.no_grad()
def test_a_student_without_some_channels_is_a_teacher_whose_channels_are_zero(
    teacher: Checkpoint, input_ids: Tensor
) -> None:
    """Where norms do not subtract the mean; they see the zeros too, so weights and epsilon make up for them."""
    arch = teacher.arch
    is_bound = arch.family.product is not None
    student = arch.resized(hidden_size=36, mamba_head_dim=6) if is_bound else arch.resized(hidden_size=24)
    kept = select(random_importance(arch), arch, student)
    share = student.axis_size("hidden") / arch.axis_size("hidden")
    model = load_model(teacher, CPU, torch.float32)
    gone = sorted(set(range(arch.axis_size("hidden"))) - set(kept["hidden"].tolist()))
    norms = [norm.module.replace("{i}", r"\d+") for norm in arch.family.norms]
    model.get_input_embeddings().weight[:, gone] = 0.0
    for name, module in model.named_modules():
        if hasattr(module, "conv1d"):
            layer = next(i for i in range(arch.axis_size("layer")) if f".{i}." in name)
            mask_mixer(module, kept["mhead"][layer], kept["mchan"][layer])
        if any(re.search(rf"(^|\.){norm}$", name) for norm in norms):
            offset = arch.family.norm_offset
            module.weight.copy_((module.weight + offset) * share**0.5 - offset)
            epsilon = "eps" if hasattr(module, "eps") else "variance_epsilon"
            setattr(module, epsilon, getattr(module, epsilon) * share)
            module.register_forward_pre_hook(lambda _, args: (args[0].index_fill(-1, torch.tensor(gone), 0.0),))
    torch.testing.assert_close(
        logits(build(teacher, student, kept), input_ids), logits(model, input_ids), atol=5e-4, rtol=1e-3
    )


@pytest.mark.parametrize(
    ("teacher", "cut"), variants_by([cut for cut in CUTS if cut in AXES], can_cut), indirect=["teacher"]
)
def test_a_student_trimmed_in_the_wrong_order_is_not(teacher: Checkpoint, cut: str, input_ids: Tensor) -> None:
    arch = cut_to(teacher.arch, cut)
    kept = select(random_importance(teacher.arch), teacher.arch, arch)
    expected = masked_logits_of(teacher.folder, cut)
    tensors = dict(Cut(teacher.arch, arch, kept, teacher.tensor))
    if cut == "layer":
        importance = random_importance(teacher.arch)
        others = select({**importance, "layer": -importance["layer"]}, teacher.arch, arch)["layer"]
        wrong = {**kept, "layer": others if teacher.arch.layer_counts else kept["layer"].flip(0)}
        tensors = dict(Cut(teacher.arch, arch, wrong, teacher.tensor))
        kept = wrong
    else:
        names, dim = along(arch.with_layers(teacher.arch, kept["layer"].tolist()), cut)
        tensors.update({name: tensors[name].flip(dim) for name in names})
    student = build_model(student_config(teacher, arch, kept["layer"].tolist()), tensors.items(), CPU)
    assert (logits(student, input_ids) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("teacher", variants_that(lambda arch: prunes(arch, "kv")), indirect=True)
def test_query_heads_are_ranked_inside_their_group_and_taken_equally(teacher: Checkpoint) -> None:
    importance = random_importance(teacher.arch)
    importance["query"][0] = torch.tensor([9.0, 8.0, 1.0, 2.0, 4.0, 3.0])  # groups (0 1) (2 3) (4 5)
    kept = select(importance, teacher.arch, teacher.arch.resized(num_attention_heads=3))
    assert kept["query"][0].tolist() == [0, 3, 4]


def test_streamed_trimming_writes_what_trimming_in_memory_gives(teacher: Checkpoint, tmp_path: Path) -> None:
    arch = cut_everywhere(teacher.arch)
    kept = select(random_importance(teacher.arch), teacher.arch, arch)
    (tmp_path / "out").mkdir()
    cut = Cut(teacher.arch, arch, kept, teacher.tensor)
    write_pruned(teacher, cut, cut, tmp_path / "out")
    whole = load_file(teacher.folder / "model.safetensors")
    in_memory = dict(Cut(teacher.arch, arch, kept, whole.__getitem__))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) == set(in_memory)
    assert all(torch.equal(written[name], in_memory[name]) for name in written)
    assert open_checkpoint(tmp_path / "out").arch.num_parameters == arch.num_parameters


def test_shards_hold_every_tensor_once(teacher: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitron.model.writing.MAX_SHARD_BYTES", 40_000)
    arch = cut_everywhere(teacher.arch)
    kept = select(random_importance(teacher.arch), teacher.arch, arch)
    (tmp_path / "out").mkdir()
    cut = Cut(teacher.arch, arch, kept, teacher.tensor)
    write_pruned(teacher, cut, cut, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    sharded = open_checkpoint(tmp_path / "out")
    expected = dict(Cut(teacher.arch, arch, kept, teacher.tensor))
    assert all(torch.equal(sharded.tensor(name), value) for name, value in expected.items())


def test_a_broken_weight_stops_trimming(teacher: Checkpoint, tmp_path: Path) -> None:
    (broken, *_), _ = along(teacher.arch, "ffn" if "ffn" in teacher.arch.axes else "mhead")

    class Broken(Checkpoint):
        def tensor(self, name: str) -> Tensor:
            return super().tensor(name) * (float("nan") if name == broken else 1.0)

    bad = Broken(**{k: getattr(teacher, k) for k in ("folder", "config", "arch", "tensors")})
    cut = pruned_to(teacher.arch, bad, random_importance(teacher.arch), CUT_ONLY)
    with pytest.raises(UserError, match="holds NaN"):
        write_pruned(bad, cut, cut, tmp_path)


RELOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
for folder in sys.argv[1:]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    inputs = tokenizer("the sun", return_tensors="pt")
    generated = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5).shape[1] - inputs["input_ids"].shape[1]
    print(generated, sum(p.numel() for p in model.parameters()), folder)
"""


def test_outputs_reload_in_a_fresh_process_and_generate(teachers: Callable[[str], Checkpoint], tmp_path: Path) -> None:
    expected = []
    for variant in VARIANTS:
        teacher, folder = teachers(variant), tmp_path / variant
        arch = cut_everywhere(teacher.arch)
        folder.mkdir()
        kept = select(random_importance(teacher.arch), teacher.arch, arch)
        cut = Cut(teacher.arch, arch, kept, teacher.tensor)
        write_pruned(teacher, cut, cut, folder)
        expected.append(f"5 {arch.num_parameters} {folder}")
    folders = [str(tmp_path / variant) for variant in VARIANTS]
    shown = subprocess.run([sys.executable, "-c", RELOAD, *folders], capture_output=True, text=True, check=True).stdout
    assert shown.splitlines() == expected


def test_a_shape_that_llama_refuses_is_the_same_network_as_mistral(tmp_path: Path, input_ids: Tensor) -> None:
    teacher = open_checkpoint(make_model(tmp_path / "teacher", "llama-tied"))
    arch = teacher.arch.resized(num_attention_heads=6, hidden_size=47)  # 47 channels are no multiple of 6 heads
    kept = select(random_importance(teacher.arch), teacher.arch, arch)
    student = build(teacher, arch, kept)
    assert type(student).__name__ == "MistralForCausalLM"
    # The same network as a Llama: one more channel that nothing writes and nothing reads, norms rescaled to it.
    whole = load_model(teacher, CPU, torch.float32)
    dropped = sorted(set(range(48)) - set(kept["hidden"].tolist()))
    with torch.no_grad():
        for name, parameter in whole.named_parameters():
            row = teacher.arch.family.match(name)
            assert row is not None
            for dim, dimension in enumerate(row[0].dimensions):
                if dimension == (("hidden",),):
                    parameter.index_fill_(dim, torch.tensor(dropped), 0.0)
            if name.endswith("norm.weight"):
                parameter.mul_((47 / 48) ** 0.5)
    assert type(whole).__name__ == "LlamaForCausalLM"
    for module in whole.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.variance_epsilon *= 47 / 48
    torch.testing.assert_close(logits(student, input_ids), logits(whole, input_ids), atol=2e-4, rtol=1e-4)


def test_a_shape_that_no_type_expresses_is_refused(tmp_path: Path) -> None:
    teacher = open_checkpoint(make_model(tmp_path / "teacher", "llama-biases"))
    with pytest.raises(UserError, match="hidden_size 47 must be a multiple of num_attention_heads 6"):
        teacher.arch.resized(hidden_size=47)
