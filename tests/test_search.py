"""Budgets, the grid and the short list, on sizes alone; the search itself runs in test_compress."""

import pytest
import torch

from minitron.errors import UserError
from minitron.model.arch import Arch
from minitron.prune.importance import kept_share
from minitron.search.budget import Budget, parse_budget
from minitron.search.candidates import SMALLEST_DIFFERENCE, _difference, feasible, grid, shortlist
from minitron.search.rank import _probes

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
