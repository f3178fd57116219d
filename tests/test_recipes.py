"""The built-in recipes: each loads, cuts its teacher to the published counts, and offers shapes to its search."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitron.errors import UserError
from minitron.model.arch import Arch
from minitron.model.config import config_values
from minitron.nas.budget import parse_budget
from minitron.nas.shapes import Shapes, every_shape, feasible
from minitron.pruning import require_scores
from minitron.recipe import Recipe, Target, built_in_recipes, recipe_from
from minitron.stages import stages_of
from tests.conftest import Verb
from tests.teachers import LLAMA_8B, NANO_12B, NEMO_12B, NEMOTRON_15B, NEMOTRON_H_8B

NANO_STAGES = {"depth": 11_386_496_128, "width": 8_888_227_328}
RELEASED: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "minitron-8b": (NEMOTRON_15B, {"": 8_271_699_968}),
    "minitron-4b": (NEMOTRON_15B, {"8b": 8_271_699_968, "4b": 4_190_509_056}),
    "llama-3.1-minitron-4b-width": (LLAMA_8B, {"corrected": 8_030_261_248, "4b": 4_512_746_496}),
    "llama-3.1-minitron-4b-depth": (LLAMA_8B, {"corrected": 8_030_261_248, "4b": 4_540_469_248}),
    "mn-minitron-8b": (NEMO_12B, {"corrected": 12_247_782_400, "8b": 8_414_105_600}),
    "nemotron-h-4b": (NEMOTRON_H_8B, {"": 4_489_223_040}),
    "nemotron-nano-9b-v2-base": (NANO_12B, {**NANO_STAGES, "context": 8_888_227_328}),
    "nemotron-nano-9b-v2": (
        NANO_12B,
        {**NANO_STAGES, "context-48k": 8_888_227_328, "context-256k": 8_888_227_328},
    ),
}
"""The teachers' sizes, and the parameters after each stage, by the names of the recipes in `released`."""

QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8}
LLAMA_3 = {"model_type": "llama", "vocab_size": 128256, "num_attention_heads": 32, "num_key_value_heads": 8}
GEMMA_3 = {"model_type": "gemma3_text", "vocab_size": 262144, "head_dim": 256, "tie_word_embeddings": True}
SMOLLM2 = {"model_type": "llama", "vocab_size": 49152, "tie_word_embeddings": True}


def sizes(hidden: int, ffn: int, layers: int, **others: Any) -> dict[str, Any]:
    return {"hidden_size": hidden, "intermediate_size": ffn, "num_hidden_layers": layers, **others}


def heads(query: int, kv: int) -> dict[str, int]:
    return {"num_attention_heads": query, "num_key_value_heads": kv}


FAMILIES: dict[str, dict[str, dict[str, Any]]] = {
    "qwen3": {
        "0.6B": QWEN3 | sizes(1024, 3072, 28, num_attention_heads=16, tie_word_embeddings=True),
        "8B": QWEN3 | sizes(4096, 12288, 36, num_attention_heads=32, tie_word_embeddings=False),
    },
    "llama": {
        "1B": LLAMA_3 | sizes(2048, 8192, 16, head_dim=64, tie_word_embeddings=True),
        "8B": LLAMA_8B,
    },
    "gemma3": {
        "270M": GEMMA_3 | sizes(640, 2048, 18, **heads(4, 1)),
        "4B": GEMMA_3 | sizes(2560, 10240, 34, **heads(8, 4)),
    },
    "smollm2": {
        "135M": SMOLLM2 | sizes(576, 1536, 30, **heads(9, 3)),
        "1.7B": SMOLLM2 | sizes(2048, 8192, 24, **heads(32, 32)),
    },
}
"""Sizes of a small and of a large teacher of each family that has a recipe."""
MACHINES = ("laptop", "one-gpu", "eight-gpus")
SPACES = {
    "minitron-4b": NEMOTRON_15B,
    "minitron-8b": NEMOTRON_15B,
    "nemotron-h-4b": NEMOTRON_H_8B,
    "nemotron-nano-2-9b": NANO_12B,
}
TARGETS: dict[str, dict[str, Any]] = {"0.75": {"target_params": 0.75}, "0.5": {"target_params": 0.5}, "0.33": {}}


def arch_of(config: dict[str, Any], folder: Path) -> Arch:
    (folder / "config.json").write_text(json.dumps(config))
    return Arch.from_config(config_values(folder / "config.json"))


def searched(recipe: Recipe, target: Target | None, teacher: Arch, source: Arch) -> Shapes:
    """Return the shapes within a target of the teacher that the search offers to cut `source` to."""
    budget = parse_budget(target, recipe.budget, recipe.search.tolerance, teacher, [])
    return feasible(every_shape(source, budget, recipe.search, []), budget)


def test_every_recipe_has_a_test() -> None:
    released = {f"released/{name}" for name in RELEASED}
    assert built_in_recipes().keys() == {*released, *FAMILIES, *MACHINES, *SPACES, "one-third"}


@pytest.mark.parametrize("name", built_in_recipes())
def test_every_recipe_loads_and_names_scores_that_exist(name: str, tmp_path: Path) -> None:
    items = tmp_path / "items.jsonl"
    items.write_text('{"context": "a", "choices": ["b", "c"], "gold": 0}\n')
    recipe = recipe_from(name, teacher="t", depth={"task": str(items)})
    stages = stages_of(recipe)
    assert (len(stages) > 1) == bool(recipe.stages or isinstance(recipe.target_params, tuple))
    for stage in stages:
        require_scores(stage.recipe)
    require_scores(recipe)


@pytest.mark.parametrize("name", RELEASED)
def test_a_released_model_has_its_published_count(name: str, tmp_path: Path) -> None:
    config, counts = RELEASED[name]
    recipe, arch = recipe_from(f"released/{name}", teacher="t"), arch_of(config, tmp_path)
    found = {}
    for stage_name, shape in [(stage.name, stage.recipe.shape) for stage in stages_of(recipe)] or [("", recipe.shape)]:
        smaller = arch.resized(**shape)
        arch.require_prunable_to(smaller)
        assert stage_name == "corrected" or shape == {} or smaller.num_parameters < arch.num_parameters
        arch, found[stage_name] = smaller, smaller.num_parameters
    assert found == counts
    text = built_in_recipes()[f"released/{name}"].read_text()
    assert all(f"{count:,}" in text for count in counts.values())
    assert not any(search.recipe.has_budget for search in stages_of(recipe))


def test_another_teacher_has_another_count(tmp_path: Path) -> None:
    recipe = recipe_from("released/minitron-8b", teacher="t")
    teacher = arch_of({**NEMOTRON_15B, "vocab_size": 128000}, tmp_path)
    assert teacher.resized(**recipe.shape).num_parameters != RELEASED["minitron-8b"][1][""]
    other = arch_of(LLAMA_8B, tmp_path)
    with pytest.raises(UserError, match="intermediate_size 16384 is above the teacher's"):
        other.require_prunable_to(other.resized(**recipe.shape))


def test_training_of_released_models_is_that_of_the_papers() -> None:
    """Steps and least learning rates, which follow from what the recipes state."""
    steps, rates = {}, {}
    for name in RELEASED:
        recipe = recipe_from(f"released/{name}", teacher="t")
        for stage in stages_of(recipe):
            distill = stage.recipe.distill
            steps[name, stage.name] = distill.tokens / (distill.batch_size * (stage.recipe.context or 0))
            rates[name, stage.name] = distill.learning_rate * distill.min_learning_rate_ratio
        assert recipe.calibration.tokens == 1024 * (recipe.context or 0)
        assert recipe.distill.loss == "forward_kl"
        assert recipe.distill.label_weight == 0
    assert steps["minitron-4b", "8b"] == pytest.approx(20_000, rel=0.01)
    assert steps["llama-3.1-minitron-4b-width", "4b"] == pytest.approx(10_000, rel=0.01)
    assert steps["mn-minitron-8b", "8b"] == pytest.approx(60_400, rel=0.01)
    assert rates["minitron-4b", "4b"] == pytest.approx(4.5e-7)
    assert rates["llama-3.1-minitron-4b-depth", "4b"] == pytest.approx(1e-5)
    assert rates["mn-minitron-8b", "8b"] == pytest.approx(4.5e-7)


@pytest.mark.parametrize("name", SPACES)
def test_a_search_space_holds_shapes(name: str, tmp_path: Path) -> None:
    recipe, teacher = recipe_from(name, teacher="t"), arch_of(SPACES[name], tmp_path)
    assert not isinstance(recipe.target_params, tuple)
    assert len(searched(recipe, recipe.target_params, teacher, teacher))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_machines_and_targets_go_together(family: str, machine: str, target: str, tmp_path: Path) -> None:
    names = [machine, family, *(["one-third"] if target == "0.33" else [])]
    recipe = recipe_from(names, teacher="t", **TARGETS[target])
    targets = recipe.target_params if isinstance(recipe.target_params, tuple) else (recipe.target_params,)
    for config in FAMILIES[family].values():
        teacher = source = arch_of(config, tmp_path)
        for one in targets:
            shapes = searched(recipe, one, teacher, source)
            assert len(shapes) >= 3
            assert (shapes.figures["num_parameters"] <= float(one or 0) * teacher.num_parameters).all()
            for name in recipe.search.fixed:
                assert set(shapes.sizes[name].tolist()) == {teacher.sizes[name]}
            for name, step in recipe.search.multiple_of.items():
                assert all(size % step == 0 or size == teacher.sizes[name] for size in set(shapes.sizes[name].tolist()))
            source = shapes[len(shapes) // 2]
        assert source.num_parameters / teacher.num_parameters == pytest.approx(float(target), rel=0.06)


def test_families_and_machines_set_different_keys() -> None:
    """So that the order in which they are given decides nothing."""
    for family in FAMILIES:
        for machine in MACHINES:
            one, other = (recipe_from(names, teacher="t") for names in ([family, machine], [machine, family]))
            assert one == other
            assert one != recipe_from(family, teacher="t") != recipe_from(machine, teacher="t")


def test_fixed_sizes_stay_and_others_do_not(tmp_path: Path) -> None:
    teacher = arch_of(FAMILIES["qwen3"]["0.6B"], tmp_path)

    def offered(**search: Any) -> dict[str, int]:
        recipe = Recipe.model_validate({"teacher": "t", "search": search})
        found = searched(recipe, 0.6, teacher, teacher).sizes
        return {name: len(np.unique(found[name])) for name in ("num_attention_heads", "num_key_value_heads")}

    assert min(offered().values()) > 1
    assert offered(fixed=["num_key_value_heads"])["num_key_value_heads"] == 1
    assert offered(fixed=["num_key_value_heads"])["num_attention_heads"] > 1
    both = ["num_attention_heads", "num_key_value_heads"]
    assert set(offered(fixed=both).values()) == {1}
    assert offered(fixed=both, space={"num_attention_heads": [8, 16]})["num_attention_heads"] == 2
    with pytest.raises(UserError, match="no shape has between"):
        offered(fixed=[*both, "num_hidden_layers"], multiple_of={"hidden_size": 1024, "intermediate_size": 1536})
    with pytest.raises(UserError, match="no axis 'num_kv_heads' to prune"):
        offered(fixed=["num_kv_heads"])


def test_a_dry_run_takes_the_shape_of_a_recipe(verb: Verb, tmp_path: Path) -> None:
    arch_of(NEMOTRON_H_8B, tmp_path)
    dry = ("prune", tmp_path / "config.json", "--dry-run")
    assert verb(*dry, "--recipe", "released/nemotron-h-4b")["num_parameters"] == 4_489_223_040
    given = verb(*dry, "--recipe", "released/nemotron-h-4b", "--intermediate-size", "21504")  # sizes replace the shape
    assert given["arch"]["hidden_size"] == 4096
    with pytest.raises(AssertionError, match=r"has stages: `minitron plan`"):
        verb(*dry, "--recipe", "released/nemotron-nano-9b-v2")
    with pytest.raises(AssertionError, match="needs a shape"):
        verb(*dry, "--recipe", "nemotron-h-4b")
    with pytest.raises(AssertionError, match="neither a file nor built in; did you mean 'released/nemotron-h-4b'"):
        verb(*dry, "--recipe", "released/nemotron-h-4")


def test_a_folder_named_like_a_recipe_is_not_taken_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "qwen3").mkdir()
    assert recipe_from("qwen3", teacher="t").search.fixed
    (tmp_path / "laptop").write_text("seed: 7\n")
    assert recipe_from("laptop", teacher="t").seed == 7


@pytest.mark.parametrize(
    ("tokens", "context", "processes", "batch_size"),
    [("20k", None, 1, 1), ("200k", 512, 1, 4), ("200k", 512, 4, 4), ("20k", None, 2, 2), ("1M", None, 1, 8),
     (2_000_000, 4096, 8, 8), (100, 512, 16, 16)],
)  # fmt: skip
def test_short_trainings_take_small_batches(
    tokens: Any, context: int | None, processes: int, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    distill = recipe_from(None, teacher="smollm2", context=context, distill={"tokens": tokens}).distill
    assert distill.batch_size == batch_size
    given = recipe_from(None, teacher="smollm2", context=context, distill={"tokens": tokens, "batch_size": 8})
    assert given.distill.batch_size == 8
