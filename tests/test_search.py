"""Tests budgets, the grid, probes and the short list on sizes alone; test_search_run runs the search itself."""

from math import log, prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from minitron.errors import UserError
from minitron.model.arch import Arch
from minitron.model.checkpoint import open_checkpoint
from minitron.model.language_model import build_model
from minitron.nas.budget import Budget, Limit, Serving, counted, parse_budget, speed_limits
from minitron.nas.probes import predicted, probes
from minitron.nas.shapes import Shapes, every_shape, feasible, grid
from minitron.nas.shortlist import SMALLEST_DIFFERENCE, differing, first_of_each_kind
from minitron.pruning.selection import kept_share
from minitron.quantities import parse_bytes
from minitron.recipe import BudgetRecipe, Recipe, SearchRecipe, load_recipe
from tests.conftest import make_model

SMOLLM2 = Arch.from_config(
    {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
     "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
)  # fmt: skip
NEMOTRON_15B = Arch.from_config(
    {"model_type": "nemotron", "vocab_size": 256000, "hidden_size": 6144, "intermediate_size": 24576,
     "head_dim": 128, "num_hidden_layers": 32, "num_attention_heads": 48, "num_key_value_heads": 8,
     "tie_word_embeddings": False}
)  # fmt: skip


def budget_of(teacher: Arch, target: Any = None, tolerance: float = 0.05, **limits: Any) -> Budget:
    return parse_budget(target, BudgetRecipe.model_validate(limits), tolerance, teacher, [])


def shapes_within(teacher: Arch, target: Any = None, search: Any = None, **limits: Any) -> Shapes:
    budget = budget_of(teacher, target, **limits)
    return feasible(every_shape(teacher, budget, SearchRecipe.model_validate(search or {}), []), budget)


def archs(shapes: Shapes) -> list[Arch]:
    return [shapes[i] for i in range(len(shapes))]


def shapes_of_recipe(teacher: Arch, name: str) -> Shapes:
    """Return the shapes of a built-in recipe."""
    recipe: Recipe = load_recipe(Path(name), {"teacher": "teacher"})
    assert not isinstance(recipe.target_params, tuple)
    budget = parse_budget(recipe.target_params, recipe.budget, recipe.search.tolerance, teacher, [])
    return feasible(every_shape(teacher, budget, recipe.search, []), budget)


TABLE_19 = {
    (32, 32, 12800, 5120), (32, 32, 13824, 4608), (32, 48, 11520, 4608), (32, 48, 16384, 4096), (31, 32, 12800, 5120),
    (31, 32, 16128, 4608), (31, 48, 13824, 4608), (31, 48, 16384, 4096), (30, 32, 12800, 5120), (30, 32, 16128, 4608),
    (30, 48, 13824, 4608), (30, 48, 16384, 4096), (29, 32, 12800, 5120), (29, 32, 16128, 4608), (29, 48, 13824, 4608),
}  # fmt: skip


def test_the_space_of_minitron_8b_holds_the_15_shapes_of_its_paper() -> None:
    names = ("num_hidden_layers", "num_attention_heads", "intermediate_size", "hidden_size")
    shapes = shapes_of_recipe(NEMOTRON_15B, "minitron-8b")
    assert {tuple(arch.sizes[name] for name in names) for arch in archs(shapes)} == TABLE_19
    assert len(shapes) == 15


def test_the_space_of_minitron_4b_holds_18_shapes() -> None:
    shapes = shapes_of_recipe(NEMOTRON_15B, "minitron-4b")
    assert len(shapes) == 18
    assert all(abs(count / 4e9 - 1) <= 0.05 for count in shapes.figures["num_parameters"])


def having(shapes: Shapes, **sizes: int) -> Shapes:
    """Return the shapes that have some sizes."""
    return shapes.at(np.logical_and.reduce([shapes.sizes[name] == size for name, size in sizes.items()]))


def test_the_space_of_nano_2_holds_the_shape_that_was_released() -> None:
    shapes = shapes_of_recipe(NANO_12B, "nemotron-nano-2-9b")
    layers = {"num_hidden_layers": 56, "num_attention_layers": 4, "num_mamba_layers": 27, "num_mlp_layers": 25}
    released = having(shapes, **layers, hidden_size=4480, intermediate_size=15680, mamba_num_heads=128)
    assert released.figures["num_parameters"].tolist() == [8_888_227_328]
    assert released[0].num_parameters == 8_888_227_328
    assert (shapes.figures["memory_bytes"] <= 19.66 * 2**30).all()
    assert set(shapes.sizes["num_attention_layers"].tolist()) == {4}
    kinds = [shapes.sizes[f"num_{kind}_layers"] for kind in ("attention", "mamba", "mlp")]
    assert np.array_equal(np.sum(kinds, axis=0), shapes.sizes["num_hidden_layers"])


# The paper's table 1 without its last row, 36 layers of full width: layers, hidden, ffn, Mamba heads, their channels.
TABLE_1_OF_SSM = [
    (52, 3072, 12288, 112, 64), (52, 3072, 10752, 128, 64), (52, 3328, 9984, 112, 64), (52, 3072, 12288, 112, 60),
    (52, 3072, 12288, 120, 56), (52, 3072, 13056, 112, 56), (44, 3072, 14592, 128, 64), (44, 3584, 10752, 120, 64),
    (52, 3072, 11520, 112, 64), (52, 3072, 13056, 96, 64), (52, 3072, 13824, 128, 48), (52, 3072, 12288, 104, 62),
    (52, 3072, 13056, 104, 60), (52, 3072, 13056, 96, 62), (52, 3072, 14592, 96, 56), (48, 3072, 12288, 128, 64),
    (48, 3328, 9984, 128, 64), (52, 3072, 13824, 96, 58), (52, 3072, 11520, 128, 56), (44, 3328, 11648, 128, 64),
    (48, 3072, 13824, 112, 64), (48, 3328, 11648, 112, 64), (52, 3072, 16128, 64, 64), (26, 4096, 21504, 128, 64),
]  # fmt: skip


def test_the_space_of_nemotron_h_4b_holds_the_24_shapes_of_its_paper() -> None:
    shapes = shapes_of_recipe(NEMOTRON_H_8B, "nemotron-h-4b")
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "mamba_num_heads", "mamba_head_dim")
    for sizes in TABLE_1_OF_SSM:
        [count] = having(shapes, **dict(zip(names, sizes, strict=True))).figures["num_parameters"].tolist()
        assert 4.32e9 <= count <= 4.6e9
        assert (count == 4_489_223_040) == (sizes == TABLE_1_OF_SSM[0])  # the first is the released model
    assert not len(having(shapes, **dict(zip(names, (36, 4096, 21504, 128, 64), strict=True))))


def test_numbers_of_layers_by_kind_are_sizes_of_a_space() -> None:
    def depths(**space: Any) -> set[tuple[int, ...]]:
        shapes = shapes_within(NANO_12B, "1B..12.2B", search={"space": space | fixed})
        return set(zip(*(shapes.sizes[name].tolist() for name in NANO_12B.depth_names), strict=True))

    names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "mamba_num_heads")
    fixed = {name: [NANO_12B.sizes[name]] for name in (*names, "mamba_head_dim")}
    assert NANO_12B.depth_names == ("num_hidden_layers", "num_attention_layers", "num_mamba_layers", "num_mlp_layers")
    assert depths(num_hidden_layers=[56, 61]) == {(56, 6, 25, 25), (61, 6, 28, 27)}
    # Kinds that are not named share the rest; 61 layers cannot have only four of attention.
    assert depths(num_hidden_layers=[56, 61], num_attention_layers=[4, 6]) == {
        (56, 4, 26, 26),
        (56, 6, 25, 25),
        (61, 6, 28, 27),
    }
    every = {"num_attention_layers": [4], "num_mamba_layers": [26, 27], "num_mlp_layers": [25, 26]}
    assert depths(**every) == {(55, 4, 26, 25), (56, 4, 26, 26), (56, 4, 27, 25), (57, 4, 27, 26)}
    assert depths(num_hidden_layers=[56], **every) == {(56, 4, 26, 26), (56, 4, 27, 25)}
    with pytest.raises(UserError, match="num_attention_layers has no size up to the teacher's 6"):
        depths(num_attention_layers=[7])
    with pytest.raises(UserError, match="no axis 'num_moe_layers' to prune"):
        depths(num_moe_layers=[1])
    with pytest.raises(UserError, match="no axis 'num_mlp_layers' to prune"):
        shapes_within(NANO_12B, 0.7, search={"multiple_of": {"num_mlp_layers": 2}})


def test_shapes_of_one_depth_and_other_kinds_are_predicted_apart() -> None:
    space = {"num_attention_layers": [4], "num_mamba_layers": [24, 28], "num_mlp_layers": [24, 28]}
    shapes = having(shapes_within(NANO_12B, "1B..12.2B", search={"space": space}), num_hidden_layers=56)
    scores = torch.tensor([{"mamba": 1.0, "mlp": 3.0, "attention": 2.0}[kind] for kind in NANO_12B.layers])
    probe = probes(shapes)["layer"]
    assert probe.sizes["num_attention_layers"] == 4
    expected = predicted(shapes, {"layer": scores}, {"layer": (probe, 1.0)})
    whole = shapes.sizes["num_mlp_layers"] == 28
    assert len(set(expected[whole].tolist())) == len(set(expected[~whole].tolist())) == 1
    assert expected[~whole][0] / expected[whole][0] == pytest.approx((4 * 9 + 2 * 4) / (4 * 1 + 2 * 4))


def test_a_recipe_that_is_not_built_in_is_refused() -> None:
    with pytest.raises(UserError, match=r"neither a file nor built in; did you mean 'minitron-[48]b'"):
        load_recipe(Path("minitron-9b"), {"teacher": "teacher"})


def test_a_dotted_key_names_an_entry_of_a_part_of_a_part() -> None:
    recipe = load_recipe(None, {"teacher": "teacher", "distill.correction.trains": "full", "distill.tokens": "1k"})
    assert recipe.distill.correction.trains == "full"
    assert recipe.distill.tokens == 1_000
    with pytest.raises(UserError, match="options: data must be a mapping"):
        load_recipe(None, {"data": "wiki", "data.wiki": 1})


@pytest.mark.parametrize(
    ("target", "high"),
    [("0.7", 94_160_506), (0.7, 94_160_506), ("94M", 94_000_000), ("0.094b", 94_000_000), ("94000000", 94_000_000)],
)
def test_targets(target: str | float, high: int) -> None:
    assert budget_of(SMOLLM2, target).limits == {"num_parameters": Limit(round(0.95 * high), high)}


def test_ranges_are_kept_to_on_both_sides() -> None:
    assert budget_of(SMOLLM2, "80M..90M").limits == {"num_parameters": Limit(80_000_000, 90_000_000, is_range=True)}
    counts = shapes_within(SMOLLM2, "80M..90M").figures["num_parameters"]
    assert counts.min() >= 80_000_000
    assert counts.max() <= 90_000_000
    assert counts.min() < 84_000_000


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"target": "much"}, "target_params 'much' is not a number; accepted: a share"),
        ({"target": "2B"}, "target_params 2B is not below the teacher's 134,515,008"),
        ({"target": "90M..80M"}, "a range that ends before it begins"),
        ({"target": None}, "no budget: target_params is not given"),
        ({"target": None, "memory": "much"}, "budget.memory 'much' is not a number; accepted: .*20GiB"),
        ({"target": None, "memory": "20GiB"}, "budget.memory 20GiB is not below the teacher's"),
        ({"target": 0.5, "active_params": "1B"}, "budget.active_params 1B is not below"),
    ],
)
def test_budgets_that_are_none(given: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        budget_of(SMOLLM2, **given)


@pytest.mark.parametrize(
    ("text", "size"), [("300MB", 300_000_000), ("1.5 GiB", 3 * 2**29), ("4096", 4096), ("2kib", 2048)]
)
def test_sizes_in_bytes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


def test_speeds_are_relative_to_the_teacher_or_not() -> None:
    own = {"prefill_seconds": 2.0, "decode_seconds": 0.05}
    budget = BudgetRecipe.model_validate({"batch": 2, "context": "1k", "throughput": "2x", "latency": "40ms"})
    assert speed_limits(budget, 0.05, own) == {
        "prefill_seconds": Limit(0.95, 1.0), "decode_seconds": Limit(pytest.approx(0.038), 0.04)  # type: ignore[arg-type]
    }  # fmt: skip
    budget = budget.model_copy(update={"throughput": "2048 tok/s", "latency": "0.5x"})
    assert speed_limits(budget, 0.05, own)["prefill_seconds"].high == pytest.approx(1.0)
    assert speed_limits(budget, 0.05, own)["decode_seconds"].high == pytest.approx(0.025)
    for wrong in ({"throughput": "0.9x"}, {"latency": "60ms"}):
        with pytest.raises(UserError, match="is met by the teacher already"):
            speed_limits(budget.model_copy(update=wrong), 0.05, own)
    with pytest.raises(UserError, match=r"budget.latency 'soon' is not understood; accepted: such as 40ms or 0.7x"):
        speed_limits(budget.model_copy(update={"latency": "soon"}), 0.05, own)


def test_several_limits_are_all_met_and_one_of_them_binds() -> None:
    shapes = shapes_within(SMOLLM2, 0.7, memory="0.75", context=8192)
    limits = budget_of(SMOLLM2, 0.7, memory="0.75", context=8192).limits
    for name, limit in limits.items():
        assert (shapes.figures[name] <= limit.high).all()
    near = [shapes.figures[name] >= limit.low for name, limit in limits.items()]
    assert (near[0] | near[1]).all()
    assert not near[0].all()
    assert not near[1].all()


def test_what_is_counted_of_many_shapes_is_what_each_has() -> None:
    for teacher in (NANO_12B, QWEN3_30B):
        shapes = shapes_within(teacher, 0.8)
        serving = Serving()
        for i in range(0, len(shapes), max(1, len(shapes) // 20)):
            arch = shapes[i]
            assert shapes.figures_of(i) == {name: int(value) for name, value in counted(arch, {}, serving, []).items()}
            assert arch.num_parameters == shapes.figures["num_parameters"][i]


def test_active_parameters_are_those_of_the_experts_that_are_chosen() -> None:
    size = QWEN3_30B.axis_size
    of_one_expert = 3 * size("hidden") * size("expert_ffn")
    left_out = size("layer") * (size("expert") - size("chosen")) * of_one_expert
    assert QWEN3_30B.num_active_parameters == QWEN3_30B.num_parameters - left_out
    assert QWEN3_30B.num_active_parameters == pytest.approx(3.3e9, rel=0.02)  # as published: A3B
    assert SMOLLM2.num_active_parameters == SMOLLM2.num_parameters
    fewer = QWEN3_30B.resized(num_local_experts=64)
    assert QWEN3_30B.num_active_parameters - fewer.num_active_parameters == size("layer") * 64 * size(
        "hidden"
    )  # router


def test_every_feasible_shape_is_within_the_budget_and_all_of_the_grid_are_found() -> None:
    limit = budget_of(SMOLLM2, 0.7).limits["num_parameters"]
    shapes = archs(shapes_within(SMOLLM2, 0.7))
    assert all(limit.low <= arch.num_parameters <= limit.high for arch in shapes)
    sizes: dict[str, Any] = grid(SMOLLM2, SearchRecipe())
    by_hand = {
        (hidden, ffn, groups, per_group, layers)
        for hidden in sizes["hidden_size"]
        for ffn in sizes["intermediate_size"]
        for groups in sizes["num_key_value_heads"]
        for per_group in sizes["num_attention_heads"]
        for layers in sizes["num_hidden_layers"][::5]
        if limit.low
        <= SMOLLM2.resized(
            hidden_size=hidden, intermediate_size=ffn, num_key_value_heads=groups,
            num_attention_heads=groups * per_group, num_hidden_layers=layers,
        ).num_parameters
        <= limit.high
    }  # fmt: skip
    names = ("hidden_size", "intermediate_size", "num_key_value_heads", "num_attention_heads", "num_hidden_layers")
    every = {tuple(arch.sizes[name] for name in names) for arch in shapes}
    assert by_hand
    assert {(h, f, g, g * per_group, n) for h, f, g, per_group, n in by_hand} <= every
    assert len(every) == len(shapes)


def test_widths_are_multiples_of_64_or_of_what_is_asked_for() -> None:
    for arch in archs(shapes_within(SMOLLM2, 0.6)):
        assert arch.sizes["hidden_size"] % 64 == 0
        assert arch.sizes["intermediate_size"] % 64 == 0
    multiple_of = {"intermediate_size": 96, "num_attention_heads": 3}
    shapes = archs(shapes_within(SMOLLM2, 0.6, search={"multiple_of": multiple_of}))
    assert {arch.sizes["intermediate_size"] % 96 for arch in shapes} == {0}
    assert any(arch.sizes["intermediate_size"] % 64 for arch in shapes)


def test_a_space_that_is_given_takes_the_place_of_the_derived_one() -> None:
    space = {"num_attention_heads": [9, 6], "num_key_value_heads": [3], "num_hidden_layers": {"first": 20, "last": 30}}
    shapes = archs(shapes_within(SMOLLM2, 0.7, search={"space": space}))
    assert {arch.sizes["num_attention_heads"] for arch in shapes} == {6, 9}
    assert {arch.sizes["num_key_value_heads"] for arch in shapes} == {3}
    assert min(arch.sizes["num_hidden_layers"] for arch in shapes) >= 20
    assert len({arch.sizes["hidden_size"] for arch in shapes}) > 2
    with pytest.raises(UserError, match="no axis 'num_heads' to prune: did you mean"):
        shapes_within(SMOLLM2, 0.7, search={"space": {"num_heads": [3]}})
    with pytest.raises(UserError, match="has no size up to the teacher's 576"):
        shapes_within(SMOLLM2, 0.7, search={"space": {"hidden_size": [1024]}})


def test_group_sizes_always_divide_the_heads() -> None:
    shapes = archs(shapes_within(SMOLLM2, 0.6))
    assert {arch.sizes["num_key_value_heads"] for arch in shapes} == {1, 2, 3}
    assert all(arch.sizes["num_attention_heads"] % arch.sizes["num_key_value_heads"] == 0 for arch in shapes)


def test_what_cannot_be_reached_says_what_comes_nearest() -> None:
    with pytest.raises(UserError, match=r"between 950 and 1,000 parameters; .* nearest to that: [\d,]+ parameters \("):
        shapes_within(SMOLLM2, "1000")
    with pytest.raises(UserError, match=r"nearest to that: 94,0[\d,]+ parameters .*hidden_size.*; 9[34],"):
        shapes_within(SMOLLM2, "94000001..94000002")


def test_the_short_list_takes_the_best_that_differ_and_then_the_best() -> None:
    candidates = shapes_within(SMOLLM2, 0.7)
    order = list(range(len(candidates)))
    chosen = differing(candidates, order, 6)
    assert chosen[0] == 0
    assert len(chosen) == 6

    def difference(i: int, j: int) -> float:
        one, other = candidates[i], candidates[j]
        return max(0.0, *(abs(log(one.sizes[name] / other.sizes[name])) for name in one.sizes))

    assert all(difference(i, j) >= SMALLEST_DIFFERENCE for i in chosen for j in chosen if i < j)
    passed_over = set(range(max(chosen))) - set(chosen)
    assert all(any(difference(i, j) < SMALLEST_DIFFERENCE for j in chosen) for i in passed_over)
    alike = candidates.at(np.array([0, *sorted(passed_over)[:3]]))
    assert differing(alike, [0, 1, 2, 3], 3)[0] == 0
    assert len(differing(alike, [0, 1, 2, 3], 3)) == 3


def test_every_kind_of_cut_is_there_with_its_best() -> None:
    candidates = shapes_within(SMOLLM2, 0.7)
    every = [candidates[i] for i in range(len(candidates))]
    order = list(reversed(range(len(every))))

    def kind(i: int) -> set[str]:
        return {name for name, size in every[i].sizes.items() if size != SMOLLM2.sizes[name]}

    firsts = first_of_each_kind(candidates, order)
    kinds = [kind(i) for i in firsts]
    assert {"num_hidden_layers"} in kinds
    assert all(kinds.count(one) == 1 for one in kinds)
    assert all(kind(i) in kinds for i in order)
    assert firsts == sorted(firsts, key=order.index)
    for i, one in zip(firsts, kinds, strict=True):
        assert not any(kind(j) == one for j in order[: order.index(i)])


def test_kept_share_of_grouped_heads_is_taken_within_the_groups() -> None:
    importance = {"query": torch.tensor([[3.0, 1.0, 0.0] * 3])}
    assert kept_share(importance, SMOLLM2, SMOLLM2.resized(num_attention_heads=3), "query") == pytest.approx(0.9)
    assert kept_share(importance, SMOLLM2, SMOLLM2.resized(num_attention_heads=6), "query") == pytest.approx(1.0)


def test_a_prediction_is_the_sum_of_what_its_cuts_cost_by_the_importance_they_lose() -> None:
    shapes = shapes_within(SMOLLM2, 0.7)
    importance = {
        "hidden": torch.ones(576), "layer": torch.ones(30), "ffn": torch.ones(30, 1536), "kv": torch.ones(30, 3),
        "query": torch.ones(30, 9),
    }  # fmt: skip
    one_axis = probes(shapes)
    assert set(one_axis) == set(importance)
    for axis, probe in one_axis.items():
        changed = [name for name, size in probe.sizes.items() if size != SMOLLM2.sizes[name]]
        assert changed == (["num_attention_heads", "num_key_value_heads"] if axis == "kv" else changed[:1])
    losses = {"hidden": 1.0, "layer": 2.0, "ffn": 3.0, "kv": 4.0, "query": 5.0}
    expected = predicted(shapes, importance, {axis: (probe, losses[axis]) for axis, probe in one_axis.items()})
    for i in range(0, len(shapes), 50):
        arch = shapes[i]
        lost = {axis: 1 - arch.entries(axis) / SMOLLM2.entries(axis) for axis in importance}
        of_probe = {axis: 1 - probe.entries(axis) / SMOLLM2.entries(axis) for axis, probe in one_axis.items()}
        assert expected[i] == pytest.approx(sum(losses[axis] * lost[axis] / of_probe[axis] for axis in importance))
    probed = {axis: (probe, losses[axis] + 0.5) for axis, probe in one_axis.items()}
    np.testing.assert_allclose(predicted(shapes, importance, probed, of_training=0.5), expected + 0.5)
    assert np.abs(predicted(shapes, importance, probed) - expected - 0.5).max() > 0.1


def test_a_llama_with_biases_keeps_to_shapes_that_its_config_class_takes() -> None:
    biased = Arch.from_config({"attention_bias": True, **SMOLLM2.to_dict()} | {"attention_bias": True})
    shapes = shapes_within(biased, 0.6, search={"multiple_of": {"hidden_size": 32}})
    assert len(shapes)
    assert all(arch.sizes["hidden_size"] % arch.sizes["num_attention_heads"] == 0 for arch in archs(shapes))
    assert {"ffn", "query", "layer"} <= set(probes(shapes))
    free = archs(shapes_within(SMOLLM2, 0.6))
    assert any(arch.sizes["hidden_size"] % arch.sizes["num_attention_heads"] for arch in free)


NANO_12B = Arch.from_config({
    "model_type": "nemotron_h", "vocab_size": 131072, "hidden_size": 5120, "intermediate_size": 20480,
    "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "mamba_num_heads": 128, "mamba_head_dim": 80,
    "n_groups": 8, "ssm_state_size": 128, "conv_kernel": 4, "use_conv_bias": True,
    "layers_block_type": (["mamba", "mlp"] * 3 + ["mamba", "attention", "mlp"]) * 6 + ["mamba", "mlp"] * 4,
})  # fmt: skip
NEMOTRON_H_8B = Arch.from_config({
    "model_type": "nemotron_h", "vocab_size": 131072, "hidden_size": 4096, "intermediate_size": 21504,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "mamba_num_heads": 128, "mamba_head_dim": 64,
    "n_groups": 8, "ssm_state_size": 128, "conv_kernel": 4, "use_conv_bias": True,
    "layers_block_type": (["mamba", "mlp"] * 5 + ["mamba", "attention", "mlp"]) * 4,
})  # fmt: skip
QWEN3_30B = Arch.from_config({
    "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "moe_intermediate_size": 768, "head_dim": 128,
    "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "num_local_experts": 128,
    "num_experts_per_tok": 8, "mlp_only_layers": [], "decoder_sparse_step": 1,
})  # fmt: skip


@pytest.mark.parametrize("teacher", [NANO_12B, QWEN3_30B], ids=["nano", "qwen3-moe"])
def test_the_grid_of_a_large_hybrid_stays_small_and_cuts_every_axis(teacher: Arch) -> None:
    axes: dict[str, Any] = grid(teacher, SearchRecipe())
    assert prod(map(len, axes.values())) <= 2**20
    assert all(len(options) >= 3 for options in axes.values()), axes
    shapes = shapes_within(teacher, 0.8)
    for name in axes:
        assert len(np.unique(shapes.sizes[name])) > 1, name
    for i in range(0, len(shapes), max(1, len(shapes) // 100)):
        arch = shapes[i]
        teacher.require_prunable_to(arch)
        assert arch == teacher.resized(**{name: arch.sizes[name] for name in teacher.sizes})


def test_depth_of_a_hybrid_keeps_every_kind() -> None:
    shapes = shapes_within(NANO_12B, 0.5)
    for i in range(0, len(shapes), max(1, len(shapes) // 1000)):
        arch = shapes[i]
        assert arch.sizes["num_hidden_layers"] == sum(arch.layer_counts.values())
        assert min(arch.layer_counts.values()) >= 1


def sizes_of(teacher: Arch, name: str) -> list[int]:
    sizes: Any = grid(teacher, SearchRecipe())[name]
    return list(sizes)


def test_mamba_heads_are_offered_in_eights_and_experts_above_those_chosen() -> None:
    for groups in (1, 2, 4):
        teacher = NANO_12B.resized(n_groups=groups)
        assert all(groups * heads % 8 == 0 for heads in sizes_of(teacher, "mamba_num_heads"))
    odd = NANO_12B.resized(n_groups=1, mamba_num_heads=12)
    assert any(heads % 8 for heads in sizes_of(odd, "mamba_num_heads"))
    assert min(sizes_of(QWEN3_30B, "num_local_experts")) >= 8
    assert all(size % 8 == 0 for size in sizes_of(QWEN3_30B, "moe_intermediate_size"))


def test_the_search_does_not_round_what_a_model_keeps_in_float32(tmp_path: Path) -> None:
    teacher = open_checkpoint(make_model(tmp_path / "model", "nemotron_h"))
    correction = "backbone.layers.3.mixer.gate.e_score_correction_bias"
    fine = torch.tensor([30.0, 30.01, 30.02, 30.03])
    tensors = {name: fine if name == correction else teacher.tensor(name) for name in teacher.tensors}
    model = build_model(teacher.config, tensors.items(), torch.device("cpu"), torch.bfloat16)
    assert torch.equal(model.model.layers[3].mixer.gate.e_score_correction_bias, fine)
    assert model.lm_head.weight.dtype == torch.bfloat16
