"""Budgets, the grid and the short list, on sizes alone; the search itself runs in test_compress."""

from math import prod
from pathlib import Path

import pytest
import torch

from minitron.errors import UserError
from minitron.model.arch import Arch
from minitron.model.causal import build_model
from minitron.model.checkpoint import open_checkpoint
from minitron.prune.importance import kept_share
from minitron.search.budget import Budget, parse_budget
from minitron.search.candidates import SMALLEST_DIFFERENCE, _difference, feasible, grid, shortlist
from minitron.search.rank import _probes
from tests.conftest import make_model

SMOLLM2 = Arch.from_config(
    {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
     "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
)  # fmt: skip


@pytest.mark.parametrize(
    ("target", "high"),
    [("0.7", 94_160_506), (0.7, 94_160_506), ("94M", 94_000_000), ("0.094b", 94_000_000), ("94000000", 94_000_000)],
)
def test_targets(target: str | float, high: int) -> None:
    assert parse_budget(target, SMOLLM2, 0.05) == Budget(round(0.95 * high), high)


def test_every_feasible_shape_is_within_the_budget_and_all_of_the_grid_are_found() -> None:
    budget = parse_budget("0.7", SMOLLM2, 0.05)
    found = feasible(SMOLLM2, budget)
    assert all(budget.low <= arch.num_parameters <= budget.high for arch in found)
    sizes = grid(SMOLLM2)
    by_hand = {
        (hidden, ffn, groups, per_group, layers)
        for hidden in sizes["hidden_size"]
        for ffn in sizes["intermediate_size"][::4]
        for groups in sizes["num_key_value_heads"]
        for per_group in sizes["num_attention_heads"]
        for layers in sizes["num_hidden_layers"][::5]
        if budget.low
        <= SMOLLM2.resized(
            hidden_size=hidden, intermediate_size=ffn, num_key_value_heads=groups,
            num_attention_heads=groups * per_group, num_hidden_layers=layers,
        ).num_parameters
        <= budget.high
    }  # fmt: skip
    names = ("hidden_size", "intermediate_size", "num_key_value_heads", "num_attention_heads", "num_hidden_layers")
    every = {tuple(arch.sizes[name] for name in names) for arch in found}
    assert by_hand
    assert {(h, f, g, g * per_group, n) for h, f, g, per_group, n in by_hand} <= every
    assert len(every) == len(found)


def test_group_sizes_always_divide_the_heads() -> None:
    found = feasible(SMOLLM2, parse_budget("0.6", SMOLLM2, 0.05))
    assert {arch.sizes["num_key_value_heads"] for arch in found} == {1, 2, 3}
    assert all(arch.sizes["num_attention_heads"] % arch.sizes["num_key_value_heads"] == 0 for arch in found)


def test_what_cannot_be_reached_says_what_can() -> None:
    with pytest.raises(UserError, match=r"the smallest shape has [\d,]+"):
        feasible(SMOLLM2, Budget(900, 1000))
    with pytest.raises(UserError, match=r"feasible sizes near it: [\d,]+, "):
        feasible(SMOLLM2, Budget(94_000_001, 94_000_002))


def test_the_short_list_takes_the_best_that_differ() -> None:
    candidates = feasible(SMOLLM2, parse_budget("0.7", SMOLLM2, 0.05))
    order = list(range(len(candidates)))
    chosen = shortlist(candidates, order, 6)
    assert chosen[0] == 0
    assert len(chosen) == 6
    pairs = [(i, j) for i in chosen for j in chosen if i < j]
    assert all(_difference(candidates[i], candidates[j]) >= SMALLEST_DIFFERENCE for i, j in pairs)
    passed_over = set(range(max(chosen))) - set(chosen)
    assert all(
        any(_difference(candidates[i], candidates[j]) < SMALLEST_DIFFERENCE for j in chosen) for i in passed_over
    )


def test_kept_share_of_grouped_heads_is_taken_within_the_groups() -> None:
    importance = {"query": torch.tensor([[3.0, 1.0, 0.0] * 3])}
    assert kept_share(importance, SMOLLM2, SMOLLM2.resized(num_attention_heads=3), "query") == pytest.approx(0.9)
    assert kept_share(importance, SMOLLM2, SMOLLM2.resized(num_attention_heads=6), "query") == pytest.approx(1.0)


def test_a_llama_with_biases_keeps_to_shapes_that_its_config_class_takes() -> None:
    biased = Arch.from_config({"attention_bias": True, **SMOLLM2.to_dict()} | {"attention_bias": True})
    found = feasible(biased, parse_budget("0.6", biased, 0.05))
    assert found
    assert all(arch.sizes["hidden_size"] % arch.sizes["num_attention_heads"] == 0 for arch in found)
    assert {"ffn", "query", "layer"} <= set(_probes(biased))
    free = feasible(SMOLLM2, parse_budget("0.6", SMOLLM2, 0.05))
    assert any(arch.sizes["hidden_size"] % arch.sizes["num_attention_heads"] for arch in free)


NANO_12B = Arch.from_config({
    "model_type": "nemotron_h", "vocab_size": 131072, "hidden_size": 5120, "intermediate_size": 20480,
    "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "mamba_num_heads": 128, "mamba_head_dim": 80,
    "n_groups": 8, "ssm_state_size": 128, "conv_kernel": 4, "use_conv_bias": True,
    "layers_block_type": (["mamba", "mlp"] * 3 + ["mamba", "attention", "mlp"]) * 6 + ["mamba", "mlp"] * 4,
})  # fmt: skip
QWEN3_30B = Arch.from_config({
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "moe_intermediate_size": 768, "head_dim": 128,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "num_local_experts": 128,
    "num_experts_per_tok": 8, "mlp_only_layers": [], "decoder_sparse_step": 1,
})  # fmt: skip


@pytest.mark.parametrize("teacher", [NANO_12B, QWEN3_30B], ids=["nano", "qwen3-moe"])
def test_the_grid_of_a_large_hybrid_stays_small_and_cuts_every_axis(teacher: Arch) -> None:
    axes = grid(teacher)
    assert prod(map(len, axes.values())) <= 2**20
    assert all(len(options) >= 3 for options in axes.values()), axes
    found = feasible(teacher, parse_budget("0.8", teacher, 0.05))
    for name in axes:
        assert len({arch.sizes[name] for arch in found}) > 1, name
    for arch in found[:: max(1, len(found) // 100)]:
        teacher.require_prunable_to(arch)
        assert arch == teacher.resized(**{name: arch.sizes[name] for name in teacher.sizes})


def test_depth_of_a_hybrid_keeps_every_kind() -> None:
    for arch in feasible(NANO_12B, parse_budget("0.5", NANO_12B, 0.05)):
        assert arch.sizes["num_hidden_layers"] == sum(arch.layer_counts.values())
        assert min(arch.layer_counts.values()) >= 1


def test_mamba_heads_are_offered_in_eights_and_experts_above_those_chosen() -> None:
    for groups in (1, 2, 4):
        teacher = NANO_12B.resized(n_groups=groups)
        assert all(groups * heads % 8 == 0 for heads in grid(teacher)["mamba_num_heads"])
    odd = NANO_12B.resized(n_groups=1, mamba_num_heads=12)
    assert any(heads % 8 for heads in grid(odd)["mamba_num_heads"])
    assert min(grid(QWEN3_30B)["num_local_experts"]) >= 8
    assert all(size % 8 == 0 for size in grid(QWEN3_30B)["moe_intermediate_size"])


def test_the_search_does_not_round_what_a_model_keeps_in_float32(tmp_path: Path) -> None:
    teacher = open_checkpoint(make_model(tmp_path / "model", "nemotron_h"))
    correction = "backbone.layers.3.mixer.gate.e_score_correction_bias"
    fine = torch.tensor([30.0, 30.01, 30.02, 30.03])
    tensors = {name: fine if name == correction else teacher.tensor(name) for name in teacher.tensors}
    model = build_model(teacher.config, tensors.items(), torch.device("cpu"), torch.bfloat16)
    assert torch.equal(model.model.layers[3].mixer.gate.e_score_correction_bias, fine)
    assert model.lm_head.weight.dtype == torch.bfloat16
