"""The grammar, and property 1: each tensor of a checkpoint matches exactly one row and has its shape."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minitron.errors import UserError
from minitron.model.anatomy import Tap
from minitron.model.checkpoint import Checkpoint, expected_shapes, open_checkpoint
from minitron.model.config import student_config
from minitron.model.families import FAMILIES
from minitron.model.grammar import parse_rows, parse_taps
from minitron.model.language_model import module_of
from tests.conftest import make_model

AXIS_SIZES = {"hidden": 16, "query": 6, "kv": 2, "head_dim": 4, "ffn": 10}


def test_products_and_joined_segments_give_shapes() -> None:
    fused, gate_up = parse_rows("""
        a.{i}.qkv.weight    (query head_dim | kv head_dim | kv head_dim) hidden
        a.{i}.gate_up       (2 ffn) hidden    if mlp_bias
    """)
    assert fused.shape(AXIS_SIZES.__getitem__) == (24 + 8 + 8, 16)
    assert gate_up.shape(AXIS_SIZES.__getitem__) == (20, 16)
    assert fused.axes == {"query", "kv", "head_dim", "hidden"}
    assert gate_up.present({"mlp_bias": True})
    assert not gate_up.present({"mlp_bias": False})


def test_kinds_experts_and_conditions() -> None:
    bias, weight, buffer = parse_rows("""
        a.{i}.fc.bias                hidden         in moe if mlp_bias and not moe_latent_size
        a.{i}.experts.{e}.weight     ffn hidden     in moe
        a.{i}.gate.correction        expert         in moe as buffer
    """)
    assert (bias.kind, weight.kind, bias.is_per_expert, weight.is_per_expert) == ("moe", "moe", False, True)
    assert bias.present({"mlp_bias": True, "moe_latent_size": False})
    assert not bias.present({"mlp_bias": True, "moe_latent_size": True})
    assert not bias.present({"mlp_bias": False, "moe_latent_size": False})
    assert weight.tensor_name(3, 7) == "a.3.experts.7.weight"
    assert weight.axes == {"expert", "ffn", "hidden"}
    assert buffer.is_buffer


@pytest.mark.parametrize("line", ["a.weight", "a.weight hidden in attic", "a.weight hidden as parameter"])
def test_what_is_no_row_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"not a row|unknown axis"):
        parse_rows(line)


def test_layers_for_predicting_further_tokens_are_left_behind(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "nemotron_h-latent", num_nextn_predict_layers=1)
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "mtp.layers.0.eh_proj.weight": torch.zeros(2)}, folder / "model.safetensors")
    teacher = open_checkpoint(folder)
    assert set(teacher.tensors) == set(tensors)
    student = student_config(teacher, teacher.arch, list(range(8)))
    assert (teacher.config.num_nextn_predict_layers, student.num_nextn_predict_layers) == (1, 0)


def test_the_order_of_layers_is_asked_for(tmp_path: Path) -> None:
    arch = open_checkpoint(make_model(tmp_path / "model", "bamba")).arch
    shallow = arch.resized(num_hidden_layers=2)
    with pytest.raises(ValueError, match="order of the layers is not known"):
        dict(expected_shapes(shallow))
    with pytest.raises(ValueError, match="order of the layers is not known"):
        shallow.config_values()
    assert shallow.with_layers(arch, [0, 1]).config_values()["attn_layer_indices"] == [1]


def test_the_final_norm_is_the_last_one() -> None:
    assert FAMILIES["bamba"].final_norm.name == "model.final_layernorm"
    norms = FAMILIES["llama"].norms
    with pytest.raises(ValueError, match="llama: the last of the norms must be the final one"):
        replace(FAMILIES["llama"], norms=(norms[2], norms[0], norms[1]))
    with pytest.raises(ValueError, match="the last of the norms must be the final one"):
        replace(FAMILIES["llama"], norms=norms[:2])


def test_taps_stand_in_the_order_of_their_blocks() -> None:
    taps = FAMILIES["bamba"].taps
    with pytest.raises(ValueError, match=r"tap at model\.layers\.\{i\}\.self_attn\.o_proj must come before"):
        replace(FAMILIES["bamba"], taps=(taps[-1], *taps[:-1]))


def test_blocks_are_paired_with_the_norms_before_them() -> None:
    expected: dict[str, dict[str, str | None]] = {
        "llama": {"self_attn.o_proj": "input_layernorm", "mlp.down_proj": "post_attention_layernorm"},
        "bamba": {"mamba.out_proj": "input_layernorm", "feed_forward.down_proj": "pre_ff_layernorm"},
        "opt": {"self_attn.out_proj": "self_attn_layer_norm", "fc2": "final_layer_norm"},
        "olmo2": {"mlp.down_proj": None},
    }
    for name, pairs in expected.items():
        family = FAMILIES[name]
        for module, norm in pairs.items():
            row = next(row for row in family.rows if row.name.endswith(f".{{i}}.{module}.weight"))
            before = family.norm_before(row)
            assert (before.name.rpartition(".")[2] if before else None) == norm


def test_names_in_memory_are_those_in_files_after_the_first_dot(teacher: Checkpoint) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(teacher.config)
    last = teacher.arch.axis_size("layer") - 1
    for norm in teacher.arch.family.layer_norms:
        assert "norm" in type(module_of(model, norm, last)).__name__.lower()
    for row in teacher.arch.layer_rows(last):
        if "experts" not in row.owner and "block_sparse_moe" not in row.owner:  # transformers stacks experts
            module_of(model, row, last)


@pytest.mark.parametrize("line", ["a.weight hidden width", "a.weight (query headdim)"])
def test_a_misspelt_axis_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="unknown axis"):
        parse_rows(line)


def test_a_tap_needs_a_side() -> None:
    with pytest.raises(ValueError, match="not a tap"):
        parse_taps("hidden model.norm sideways")


def test_a_tap_of_a_kind_a_choice_and_a_condition() -> None:
    [tap] = parse_taps("(mhead mchan)  a.{i}.in_proj  output[1]  in mamba  as x  if use_bias and not tied")
    assert tap == Tap(("mhead", "mchan"), "a.{i}.in_proj", "output", 1, "mamba", "x", "use_bias and not tied")


def test_every_tensor_matches_exactly_one_row(teacher: Checkpoint) -> None:
    stored = load_file(teacher.folder / "model.safetensors")
    expected = dict(expected_shapes(teacher.arch))
    assert set(stored) == set(expected)
    for name, tensor in stored.items():
        rows = [row for row in teacher.arch.rows if row.pattern.fullmatch(name)]
        assert len(rows) == 1, name
        assert tuple(tensor.shape) == expected[name]


def test_an_unknown_tensor_is_named(model_folder: Callable[..., Path]) -> None:
    folder = model_folder()
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.layers.0.mlp.extra.weight": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"no row .* matches tensor model\.layers\.0\.mlp\.extra\.weight"):
        open_checkpoint(folder)


def test_a_bias_that_the_config_denies_is_named(model_folder: Callable[..., Path]) -> None:
    folder = model_folder()
    tensors = load_file(folder / "model.safetensors")
    save_file({**tensors, "model.layers.0.mlp.up_proj.bias": torch.zeros(64)}, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.layers\.0\.mlp\.up_proj\.bias"):
        open_checkpoint(folder)


def test_a_wrong_shape_is_named(model_folder: Callable[..., Path]) -> None:
    folder = model_folder()
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = torch.zeros(47)
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight has shape \[47\], the config makes it \[48\]"):
        open_checkpoint(folder)


def test_a_missing_tensor_is_named(model_folder: Callable[..., Path]) -> None:
    folder = model_folder()
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.norm\.weight is missing"):
        open_checkpoint(folder)


def test_a_second_copy_of_tied_embeddings_and_old_buffers_are_passed_over(model_folder: Callable[..., Path]) -> None:
    folder = model_folder("llama-tied")
    tensors = load_file(folder / "model.safetensors")
    extra = {
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.layers.1.self_attn.rotary_emb.inv_freq": torch.zeros(4),
    }
    save_file({**tensors, **extra}, folder / "model.safetensors")
    assert set(open_checkpoint(folder).tensors) == set(tensors)
