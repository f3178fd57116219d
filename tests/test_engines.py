"""Which shapes config classes accept and engines run: the facts, the log, the card, and what a search offers."""

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minitron import prune
from minitron.errors import UserError
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.model.config import student_config
from minitron.model.engines import BY_NAME, ENGINES, added_obstacles, order_obstacles
from minitron.nas.acceptance import Acceptance
from minitron.nas.budget import parse_budget
from minitron.nas.probes import probes
from minitron.nas.shapes import Shapes, every_shape
from minitron.recipe import BudgetRecipe, SearchRecipe
from minitron.reports.card import write_card
from minitron.reports.run_files import RunFiles
from tests.conftest import make_model

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0] * 4,
    "long_factor": [1.5] * 4,
    "original_max_position_embeddings": 32,
}
SPACE = {
    "space": {"hidden_size": [8, 16, 24, 32], "num_attention_heads": [1, 2, 3, 4], "num_key_value_heads": [1, 2, 4]}
}


def phi3(folder: Path, **changes: Any) -> Checkpoint:
    """A Phi-3 of four heads of eight channels, each with a KV head of its own; with longrope unless changed."""
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
    long = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 32}
    return open_checkpoint(make_model(folder, "phi3", **{**sizes, **long, **changes}))


def grid_of(teacher: Checkpoint) -> Shapes:
    search = SearchRecipe.model_validate(SPACE)
    return every_shape(teacher.arch, parse_budget(0.9, BudgetRecipe(), 0.05, teacher.arch, []), search, [])


def is_accepted(teacher: Checkpoint, arch: Arch) -> bool:
    try:
        student_config(teacher, arch, teacher.arch.first_layers(arch))
    except UserError:
        return False
    return True


@pytest.mark.parametrize("changes", [{}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}])
def test_the_shapes_that_are_offered_are_those_that_the_config_class_accepts(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    teacher = phi3(tmp_path / "model", **changes)
    shapes = grid_of(teacher)
    one_by_one = {i for i in range(len(shapes)) if is_accepted(teacher, shapes[i])}
    assert (len(one_by_one) < len(shapes)) == (not changes)  # the control accepts every shape
    offered = Acceptance(teacher).of(shapes)
    assert [offered[i] for i in range(len(offered))] == [shapes[i] for i in sorted(one_by_one)]
    assert offered.sizes["hidden_size"].min() < 32


def test_axes_that_are_cut_together_alone_have_one_probe(tmp_path: Path) -> None:
    teacher = phi3(tmp_path / "model")
    acceptance = Acceptance(teacher)
    found = probes(acceptance.of(grid_of(teacher)), acceptance)
    assert all(map(acceptance.accepts, found.values()))
    cut = [axis for axis, arch in found.items() if arch.axis_size("hidden") < 32]
    assert cut == ["hidden"]
    assert found["hidden"].axis_size("query") < 4
    assert "kv" not in found
    assert {"ffn", "layer"} <= found.keys()


@pytest.mark.parametrize(
    ("variant", "changes", "sizes", "message"),
    [
        ("phi3", {}, {"hidden_size": 24}, "hidden_size 24: `rope_parameters`'s short_factor field must have length 3"),
        ("phi3", {}, {"num_key_value_heads": 2, "num_attention_heads": 2}, "short_factor field must have length 8"),
    ],
)
def test_a_shape_that_is_refused_is_named_before_any_work(
    tmp_path: Path, text_file: Path, variant: str, changes: dict[str, Any], sizes: dict[str, Any], message: str
) -> None:
    teacher = phi3(tmp_path / "model", **changes)
    with pytest.raises(UserError) as refused:
        prune(teacher.folder, tmp_path / "out", data="absent.txt", context=32, **sizes)
    assert message in str(refused.value)
    assert f"a {variant} model like the teacher cannot have" in str(refused.value)
    assert "\n" not in str(refused.value)
    done: dict[str, Any] = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    quick: dict[str, Any] = {"calibration": {"tokens": 64}, "prune": {"rotate": False, "refit": False}}
    prune(teacher.folder, tmp_path / "out", data=str(text_file), context=32, **done, **quick)
    assert open_checkpoint(tmp_path / "out").arch.axis_size("hidden") == 16


LAYERS = ["sliding_attention"] * 5 + ["full_attention"]
HEADS = {"num_attention_heads": 4, "head_dim": 16}
RULES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    # Engine, family, entries that it cannot express, and entries nearby that it can.
    *(("llama.cpp", family, {**HEADS, "hidden_size": 48}, {**HEADS, "hidden_size": 64})
      for family in ("qwen2", "phi3", "nemotron", "olmo2", "granite", "bamba")),
    ("vLLM", "qwen2", {**HEADS, "hidden_size": 48}, {**HEADS, "hidden_size": 64}),
    ("llama.cpp", "gemma3_text", {"layer_types": LAYERS[2:] * 2}, {"layer_types": LAYERS * 2}),
    ("llama.cpp", "gemma2", {"layer_types": LAYERS}, {"layer_types": LAYERS[4:] * 3}),
    ("llama.cpp", "gpt_oss", {"layer_types": LAYERS}, {"layer_types": LAYERS[4:] * 3}),
    ("vLLM", "gpt_oss", {"layer_types": LAYERS}, {"layer_types": LAYERS[4:] * 3}),
    ("llama.cpp", "smollm3", {"no_rope_layers": [1, 1, 0, 1]}, {"no_rope_layers": [1, 1, 1, 0, 1]}),
    ("llama.cpp", "gemma2", {**HEADS, "hidden_size": 48, "num_hidden_layers": 45, "query_pre_attn_scalar": 12},
     {**HEADS, "hidden_size": 48, "num_hidden_layers": 46, "query_pre_attn_scalar": 12}),
    ("llama.cpp", "gemma3_text", {**HEADS, "hidden_size": 48, "num_hidden_layers": 62, "query_pre_attn_scalar": 16},
     {**HEADS, "hidden_size": 48, "num_hidden_layers": 61, "query_pre_attn_scalar": 16}),
    ("llama.cpp", "mistral", {"sliding_window": 16, "max_position_embeddings": 32},
     {"sliding_window": 32, "max_position_embeddings": 32}),
    ("vLLM", "qwen2", {"layer_types": LAYERS}, {"layer_types": LAYERS[:5]}),
    ("llama.cpp", "qwen3_moe", {"mlp_only_layers": [1]}, {"mlp_only_layers": []}),
    ("llama.cpp", "bamba", {"mamba_expand": 3}, {"mamba_expand": 2}),
    ("llama.cpp", "nemotron_h", {"layers_block_type": ["linear_attention", "mlp"]},
     {"layers_block_type": ["linear_attention", "moe"]}),
    ("TensorRT-LLM", "phi3", {**HEADS, "hidden_size": 48}, {**HEADS, "hidden_size": 64}),
    ("TensorRT-LLM", "gpt_oss", {"layer_types": LAYERS}, {"layer_types": LAYERS[4:] * 3}),
    ("TensorRT-LLM", "qwen3", {"sliding_window": 16, "max_position_embeddings": 32}, {"sliding_window": None}),
    ("TensorRT-LLM", "qwen3_moe", {"mlp_only_layers": [1]}, {"mlp_only_layers": []}),
    ("TensorRT-LLM", "nemotron", {"tie_word_embeddings": True}, {"tie_word_embeddings": False}),
    ("Megatron-Bridge", "llama", {"attention_bias": True}, {"attention_bias": False}),
    ("Megatron-Bridge", "nemotron", {"mlp_bias": True}, {"mlp_bias": False}),
    ("Megatron-Bridge", "qwen2", {"sliding_window": 16, "max_position_embeddings": 32}, {"sliding_window": None}),
    ("Megatron-Bridge", "gemma3_text", {"layer_types": LAYERS[2:] * 2}, {"layer_types": LAYERS * 2}),
    ("Megatron-Bridge", "gpt_oss", {"layer_types": LAYERS}, {"layer_types": LAYERS[4:] * 3}),
    ("Megatron-Bridge", "qwen3_moe", {"decoder_sparse_step": 2}, {"decoder_sparse_step": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("engine", "family", "wrong", "right"), RULES)
def test_each_fact_of_the_table_has_an_effect(
    engine: str, family: str, wrong: dict[str, Any], right: dict[str, Any]
) -> None:
    of = next(each for each in BY_NAME.values() if each.name == engine)
    before, after = ({one.source for one in of.network_obstacles({**plain(family), **entries}, gpus=2)}
                     for entries in (right, wrong))  # fmt: skip
    assert after
    assert not before & after
    if of in ENGINES and engine != "TensorRT-LLM":
        new = added_obstacles({**plain(family), **right}, {**plain(family), **wrong})
        assert of.version in new[engine]


def plain(family: str) -> dict[str, Any]:
    values = {"model_type": family, "num_hidden_layers": 4, "hidden_size": 64, "num_attention_heads": 4}
    return values | {"head_dim": 16} | ({"query_pre_attn_scalar": 16} if "gemma" in family else {})


def test_every_limit_of_every_engine_is_shown_by_a_rule() -> None:
    shown = {
        (of.name, obstacle.source)
        for of in BY_NAME.values()
        for engine, family, wrong, _ in RULES
        if engine == of.name
        for obstacle in of.network_obstacles({**plain(family), **wrong}, gpus=2)
    }
    assert shown == {(of.name, limit.source) for of in BY_NAME.values() for limit in of.limits}


def test_an_unknown_family_is_not_spoken_of() -> None:
    for engine in ENGINES:
        assert not engine.runs({"model_type": "something"})
        assert not engine.obstacles({"model_type": "something"})


@pytest.mark.parametrize(
    ("variant", "sizes", "engines"),
    [
        ("qwen2", {"hidden_size": 36}, ["vLLM", "llama.cpp"]),
        ("qwen3-tied", {"hidden_size": 36}, []),
        ("gemma3", {"num_hidden_layers": 2}, ["llama.cpp"]),
    ],
)
def test_pruning_warns_of_engines_once(
    tmp_path: Path, text_file: Path, caplog: pytest.LogCaptureFixture, variant: str, sizes: dict[str, Any],
    engines: list[str],
) -> None:  # fmt: skip
    changes: dict[str, Any] = {"use_sliding_window": False} if variant == "qwen2" else {}
    changes |= {"num_hidden_layers": 6, "layer_types": LAYERS} if variant == "gemma3" else {}
    teacher = make_model(tmp_path / "model", variant, **changes)
    quick: dict[str, Any] = {"calibration": {"tokens": 256}, "prune": {"refit": False}}
    with caplog.at_level(logging.WARNING):
        prune(teacher, tmp_path / "out", data=str(text_file), context=32, **sizes, **quick)
    before = [record.message.partition(" (")[0] for record in caplog.records if record.name.startswith("minitron.nas")]
    assert sorted(set(before)) == sorted(engines)


def test_the_order_of_layers_is_a_constant_for_some() -> None:
    teacher = {"model_type": "gemma3_text", "num_hidden_layers": 12, "layer_types": LAYERS * 2, "head_dim": 16,
               "num_attention_heads": 4, "hidden_size": 64, "query_pre_attn_scalar": 16}  # fmt: skip
    assert list(order_obstacles(teacher)) == ["llama.cpp"]
    assert not order_obstacles({**teacher, "model_type": "mistral"})


@pytest.mark.parametrize(
    ("config", "present", "absent"),
    [
        ({"model_type": "qwen2", "hidden_size": 48}, ["vLLM (", "llama.cpp ("], ["vllm serve", "convert_hf_to_gguf"]),
        ({"model_type": "qwen2", "hidden_size": 64}, ["vllm serve", "convert_hf_to_gguf"], ["does not run it"]),
        ({"model_type": "bamba", "hidden_size": 64}, ["convert_hf_to_gguf", "0.23.0"], ["vllm serve"]),
        ({"model_type": "something", "hidden_size": 64}, ["AutoModelForCausalLM"], ["vLLM", "llama.cpp"]),
    ],
)
def test_the_card_names_the_engines_that_run_the_student(
    tmp_path: Path, config: dict[str, Any], present: list[str], absent: list[str]
) -> None:
    (tmp_path / "student").mkdir()
    values = {**HEADS, "num_hidden_layers": 4, "architectures": ["XForCausalLM"], **config}
    (tmp_path / "student" / "config.json").write_text(json.dumps(values))
    shape: Any = SimpleNamespace(num_parameters=1, model_type="x", sizes={})
    figures = {"num_parameters": 1, "num_non_embedding_parameters": 1, "perplexity": 2.0, "bits_per_byte": 1.0}
    figures |= {"num_tokens": 9, "context": 9, "tokens_per_second": 1.0}
    recipe = {"teacher": "t", "data": "wiki", "distill": {"tokens": 1}, "seed": 0}
    record = {"recipe": recipe, "versions": {"torch": "1", "transformers": "1"}, "sources": {}, "stages": {}}
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "eval.json").write_text(json.dumps({"teacher": figures, "student": figures}))
    write_card(tmp_path / "student", shape, RunFiles(tmp_path))
    card = (tmp_path / "student" / "README.md").read_text()
    assert all(text in card for text in present)
    assert not any(text in card for text in absent)
    assert "every engine" not in card
