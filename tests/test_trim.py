"""Properties 3, 4, 6 and 7: permutations change nothing, a trimmed student is its masked teacher, and it reloads."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from minitron.errors import UserError
from minitron.model.anatomy import AXES
from minitron.model.arch import Arch
from minitron.model.causal import build_model, load_model
from minitron.model.checkpoint import Checkpoint, open_checkpoint, student_config
from minitron.prune.importance import Kept, select
from minitron.prune.trim import trimmed, write_trimmed
from tests.conftest import make_model

CPU = torch.device("cpu")


def random_importance(arch: Arch, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    importance = {}
    for axis in arch.family.prunable_axes:
        shape = [arch.axis_size("layer"), arch.axis_size(axis)] if axis in arch.family.per_layer_axes else [
            arch.axis_size(axis)]  # fmt: skip
        importance[axis] = torch.rand(shape, generator=generator)
    return importance


def build(teacher: Checkpoint, arch: Arch, kept: Kept) -> Any:
    config = student_config(teacher, arch, kept["layer"].tolist())
    return build_model(config, trimmed(teacher.arch, arch, kept, teacher.tensor), CPU)


@torch.no_grad()
def logits(model: Any, input_ids: Tensor) -> Tensor:
    return model(input_ids=input_ids).logits  # type: ignore[no-any-return]


def permuted(teacher: Checkpoint, axis: str) -> Kept:
    """All entries of every axis, those of one axis shuffled: query heads inside their groups, groups with them."""
    arch, generator = teacher.arch, torch.Generator().manual_seed(3)
    kept = select(random_importance(arch), arch, arch)
    if axis not in arch.family.per_layer_axes:
        kept[axis] = torch.randperm(arch.axis_size(axis), generator=generator)
        return kept
    num_layers = arch.axis_size("layer")
    groups = arch.axis_size("kv") if "kv" in kept else 1
    per_group = arch.axis_size("query") // groups
    for layer in range(num_layers):
        if axis == "query":
            orders = [torch.randperm(per_group, generator=generator) + g * per_group for g in range(groups)]
            kept["query"][layer] = torch.cat(orders)
        else:
            kept[axis][layer] = torch.randperm(arch.axis_size(axis), generator=generator)
        if axis == "kv":
            kept["query"][layer] = (kept["kv"][layer][:, None] * per_group + torch.arange(per_group)).flatten()
    return kept


@pytest.mark.parametrize("axis", ["hidden", "ffn", "query", "kv"])
def test_permuting_an_axis_leaves_the_logits_unchanged(teacher: Checkpoint, axis: str, input_ids: Tensor) -> None:
    if axis not in teacher.arch.family.prunable_axes:
        pytest.skip(f"{teacher.arch.model_type} does not prune {axis}")
    kept = permuted(teacher, axis)
    assert not torch.equal(kept[axis], select(random_importance(teacher.arch), teacher.arch, teacher.arch)[axis])
    expected = logits(load_model(teacher, CPU, torch.float32), input_ids)
    torch.testing.assert_close(logits(build(teacher, teacher.arch, kept), input_ids), expected, atol=5e-4, rtol=1e-4)


@pytest.mark.parametrize("axis", ["hidden", "ffn", "query", "kv"])
def test_a_permutation_that_one_tensor_misses_changes_them(teacher: Checkpoint, axis: str, input_ids: Tensor) -> None:
    if axis not in teacher.arch.family.prunable_axes:
        pytest.skip(f"{teacher.arch.model_type} does not prune {axis}")
    kept = permuted(teacher, axis)
    per_channel = (row for row in teacher.arch.family.rows if row.dimensions == ((("hidden",),),))
    final_norm = next(row.name for row in per_channel if not row.is_per_layer)
    missed = final_norm if axis == "hidden" else reader(teacher.arch, "query" if axis == "kv" else axis, 1)[0]
    tensors = dict(trimmed(teacher.arch, teacher.arch, kept, teacher.tensor))
    tensors[missed] = teacher.tensor(missed)
    model = build_model(student_config(teacher, teacher.arch, list(range(4))), tensors.items(), CPU)
    expected = logits(load_model(teacher, CPU, torch.float32), input_ids)
    assert (logits(model, input_ids) - expected).abs().max() > 1e-3


CUTS = {
    "ffn": {"intermediate_size": 40},
    "query": {"num_attention_heads": 3},
    "kv": {"num_attention_heads": 4, "num_key_value_heads": 2},
    "kv and query": {"num_attention_heads": 2, "num_key_value_heads": 2},
    "layer": {"num_hidden_layers": 2},
    "all but hidden": {"intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2,
                       "num_hidden_layers": 3},
}  # fmt: skip


@contextmanager
def masked(model: nn.Module, arch: Arch, kept: Kept) -> Iterator[None]:
    """Zero what is cut at the input of the tensors that read it, and pass over the layers that are cut."""
    with ExitStack() as stack:
        for layer in range(arch.axis_size("layer")):
            for tap in arch.family.taps:
                if tap.axis == "hidden":
                    continue
                mask = torch.zeros(arch.axis_size(tap.axis)).index_fill(0, kept[tap.axis][layer], 1.0)

                def mask_input(_: nn.Module, args: Any, mask: Tensor = mask) -> Any:
                    return (args[0] * mask.repeat_interleave(args[0].shape[-1] // len(mask)),)

                module = model.get_submodule(tap.module.replace("{i}", str(layer)))
                stack.callback(module.register_forward_pre_hook(mask_input).remove)
            if layer not in kept["layer"].tolist():

                def skip(_: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
                    before = args[0] if args else kwargs["hidden_states"]
                    return (before, *output[1:]) if isinstance(output, tuple) else before

                block = model.get_submodule(arch.family.layer.replace("{i}", str(layer)))
                stack.callback(block.register_forward_hook(skip, with_kwargs=True).remove)
        yield


def cut_to(arch: Arch, cut: str) -> Arch:
    """The shape of a cut; a family without the axis skips the test."""
    sizes = {name: size for name, size in CUTS[cut].items() if name in prunable(arch)}
    if arch.family.is_square:  # heads cannot leave without channels, and without channels nothing is a mask
        sizes.pop("num_attention_heads", None)
    if not sizes:
        pytest.skip(f"{arch.model_type} does not prune {cut}")
    return arch.resized(**sizes)


def cut_everywhere(arch: Arch) -> Arch:
    """A shape with every axis cut, hidden too."""
    smaller = cut_to(arch, "all but hidden")
    if arch.family.is_square:
        return smaller.resized(hidden_size=32, num_attention_heads=4)
    return smaller.resized(hidden_size=36)


def prunable(arch: Arch) -> set[str]:
    return {AXES[axis] for axis in arch.family.prunable_axes}


def reader(arch: Arch, axis: str, layer: int) -> tuple[str, int]:
    """The tensor that reads an axis in a layer, and the dimension that does."""
    (tap,) = (tap for tap in arch.family.taps if tap.axis == axis)
    name = f"{tap.module}.weight"
    row = arch.family.match(name.replace("{i}", str(layer)))
    assert row is not None
    (dim,) = (i for i, dimension in enumerate(row[0].dimensions) if any(axis in segment for segment in dimension))
    return name.replace("{i}", str(layer)), dim


@pytest.mark.parametrize("cut", CUTS)
def test_a_trimmed_student_is_its_masked_teacher(teacher: Checkpoint, cut: str, input_ids: Tensor) -> None:
    arch = cut_to(teacher.arch, cut)
    kept = select(random_importance(teacher.arch), teacher.arch, arch)
    model = load_model(teacher, CPU, torch.float32)
    with masked(model, teacher.arch, kept):
        expected = logits(model, input_ids)
    student = build(teacher, arch, kept)
    assert sum(parameter.numel() for parameter in student.parameters()) == arch.num_parameters
    torch.testing.assert_close(logits(student, input_ids), expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("cut", ["ffn", "kv", "layer"])
def test_a_student_trimmed_in_the_wrong_order_is_not(teacher: Checkpoint, cut: str, input_ids: Tensor) -> None:
    arch = cut_to(teacher.arch, cut)
    kept = select(random_importance(teacher.arch), teacher.arch, arch)
    model = load_model(teacher, CPU, torch.float32)
    with masked(model, teacher.arch, kept):
        expected = logits(model, input_ids)
    tensors = dict(trimmed(teacher.arch, arch, kept, teacher.tensor))
    if cut == "layer":
        wrong = {**kept, "layer": kept["layer"].flip(0)}
        tensors = dict(trimmed(teacher.arch, arch, wrong, teacher.tensor))
    else:
        name, dim = reader(arch, "ffn" if cut == "ffn" else "query", layer=0)
        tensors[name] = tensors[name].flip(dim)
    student = build_model(student_config(teacher, arch, kept["layer"].tolist()), tensors.items(), CPU)
    assert (logits(student, input_ids) - expected).abs().max() > 1e-2


def test_query_heads_are_ranked_inside_their_group_and_taken_equally(teacher: Checkpoint) -> None:
    importance = random_importance(teacher.arch)
    if "kv" not in importance:
        pytest.skip(f"{teacher.arch.model_type} does not prune heads within groups")
    importance["query"][0] = torch.tensor([9.0, 8.0, 1.0, 2.0, 4.0, 3.0])  # groups (0 1) (2 3) (4 5)
    kept = select(importance, teacher.arch, teacher.arch.resized(num_attention_heads=3))
    assert kept["query"][0].tolist() == [0, 3, 4]


def test_streamed_trimming_writes_what_trimming_in_memory_gives(teacher: Checkpoint, tmp_path: Path) -> None:
    arch = cut_everywhere(teacher.arch)
    kept = select(random_importance(teacher.arch), teacher.arch, arch)
    (tmp_path / "out").mkdir()
    write_trimmed(teacher, arch, kept, tmp_path / "out")
    whole = load_file(teacher.folder / "model.safetensors")
    in_memory = dict(trimmed(teacher.arch, arch, kept, whole.__getitem__))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) == set(in_memory)
    assert all(torch.equal(written[name], in_memory[name]) for name in written)
    assert open_checkpoint(tmp_path / "out").arch.num_parameters == arch.num_parameters


def test_shards_hold_every_tensor_once(teacher: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitron.model.checkpoint.MAX_SHARD_BYTES", 40_000)
    arch = teacher.arch.resized(intermediate_size=40)
    kept = select(random_importance(teacher.arch), teacher.arch, arch)
    (tmp_path / "out").mkdir()
    write_trimmed(teacher, arch, kept, tmp_path / "out")
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 1
    sharded = open_checkpoint(tmp_path / "out")
    expected = dict(trimmed(teacher.arch, arch, kept, teacher.tensor))
    assert all(torch.equal(sharded.tensor(name), value) for name, value in expected.items())


def test_a_broken_weight_stops_trimming(teacher: Checkpoint, tmp_path: Path) -> None:
    kept = select(random_importance(teacher.arch), teacher.arch, teacher.arch)
    broken = reader(teacher.arch, "ffn", 2)[0]

    class Broken(Checkpoint):
        def tensor(self, name: str) -> Tensor:
            return super().tensor(name) * (float("nan") if name == broken else 1.0)

    with pytest.raises(UserError, match="weight holds NaN"):
        write_trimmed(Broken(**{k: getattr(teacher, k) for k in ("folder", "config", "arch", "tensors")}),
                      teacher.arch, kept, tmp_path)  # fmt: skip


RELOAD = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
inputs = tokenizer("the sun", return_tensors="pt")
print("generated", model.generate(**inputs, max_new_tokens=5, min_new_tokens=5).shape[1] - inputs["input_ids"].shape[1])
print(type(model).__name__, sum(p.numel() for p in model.parameters()))
"""


def test_the_output_reloads_in_a_fresh_process_and_generates(teacher: Checkpoint, tmp_path: Path) -> None:
    arch = cut_everywhere(teacher.arch)
    kept = select(random_importance(teacher.arch), teacher.arch, arch)
    (tmp_path / "out").mkdir()
    write_trimmed(teacher, arch, kept, tmp_path / "out")
    shown = subprocess.run(
        [sys.executable, "-c", RELOAD, str(tmp_path / "out")], capture_output=True, text=True, check=True
    ).stdout
    assert "generated 5" in shown
    assert str(arch.num_parameters) in shown


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
