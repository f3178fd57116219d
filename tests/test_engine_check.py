"""What engines ask of sizes on several GPUs: the tables, `export --check`, and a search for one of the engines."""

import json
from itertools import product
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest

from minitron import cli, export, search
from minitron.errors import UserError
from minitron.model.anatomy import AXES
from minitron.model.checkpoint import open_checkpoint
from minitron.model.config import student_config
from minitron.model.engines import BY_NAME, MEGATRON, TENSORRT_LLM, VLLM, Engine, SizeLimit
from minitron.model.families import FAMILIES
from minitron.nas.acceptance import Acceptance
from minitron.nas.budget import parse_budget
from minitron.nas.runnable import require_runnable, runnable
from minitron.nas.shapes import every_shape
from minitron.recipe import BudgetRecipe, SearchRecipe
from tests.conftest import make_model

LIMITS = [(engine, limit) for engine in BY_NAME.values() for limit in engine.size_limits]


def recipe_for(engine: str | None, gpus: int = 1, **changes: Any) -> SearchRecipe:
    return SearchRecipe.model_validate({"engine": engine, "tensor_parallel": gpus, **changes})


@pytest.mark.parametrize(("engine", "limit"), LIMITS)
def test_each_limit_of_a_size_has_an_effect_and_names_sizes_without_it(engine: Engine, limit: SizeLimit) -> None:
    wrong = [(size, gpus) for size, gpus in product(range(1, 300), (1, 2, 3, 4, 8)) if not limit.accepts(size, gpus)]
    size, gpus = wrong[len(wrong) // 2]
    near = limit.passing(size, gpus)
    assert near
    for family, axis in product(sorted(limit.families), limit.axes):
        name = AXES[axis]
        found = engine.size_obstacles(family, {name: size}, gpus)
        assert [(obstacle.source, obstacle.size, obstacle.passing) for obstacle in found] == [
            (limit.source, name, near)
        ]
        assert all(str(value) in found[0].reason for value in (size, *near))
        assert not any(engine.size_obstacles(family, {name: value}, gpus) for value in near)


def test_limits_and_notes_concern_families_that_the_engine_runs() -> None:
    for engine in BY_NAME.values():
        assert engine.families | engine.unsupported.keys() == FAMILIES.keys()
        assert not engine.families & engine.unsupported.keys()
        facts: list[Any] = [*engine.limits, *engine.size_limits, *engine.notes]
        assert all(fact.families <= engine.families and fact.source for fact in facts)


def test_a_family_under_another_name_has_equal_limits_of_sizes() -> None:
    """A search judges sizes by the teacher's family, also where the student is written as another one."""
    pairs = [(family, each.demand.restated_as) for family, each in FAMILIES.items() if each.demand]
    for family, other in ((family, other) for family, other in pairs if other):
        for engine in BY_NAME.values():
            of = [[limit.source for limit in engine.size_limits if name in limit.families] for name in (family, other)]
            assert of[0] == of[1] or family in engine.unsupported


def test_recipes_accept_the_engines_of_the_tables() -> None:
    assert {*get_args(get_args(SearchRecipe.model_fields["engine"].annotation)[0])} == BY_NAME.keys()
    with pytest.raises(ValueError, match="name it by engine"):
        recipe_for(None, 2)


def test_a_family_that_was_not_read_is_not_known() -> None:
    verdict = VLLM.verdict({"model_type": "something"}, 2)
    assert verdict.state == "not known"
    assert not verdict.passes


LLAMA = {
    "model_type": "llama", "vocab_size": 100, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 2,
    "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 64, "tie_word_embeddings": True,
    "attention_bias": False, "mlp_bias": False, "max_position_embeddings": 128,
}  # fmt: skip


@pytest.mark.parametrize(
    ("engine", "changes", "gpus", "state", "told"),
    [
        (VLLM, {}, 1, "passes", ["from 100 to 128"]),
        (VLLM, {}, 4, "passes", ["each of the 2 KV heads is held by 2 GPUs"]),
        (VLLM, {}, 3, "fails", []),
        (VLLM, {"head_dim": 100}, 1, "passes", ["a slower attention backend"]),
        (VLLM, {"quantization_config": {"bits": 4}}, 1, "passes", ["kernels of quantised weights"]),
        (TENSORRT_LLM, {}, 8, "passes", ["from 100 to 104"]),
        (TENSORRT_LLM, {"head_dim": 100}, 1, "fails", []),
        (MEGATRON, {}, 4, "passes", ["each of the 2 KV heads"]),
        (MEGATRON, {}, 8, "fails", []),  # it does not pad the vocabulary of 100
        (MEGATRON, {"attention_bias": True}, 1, "fails", []),
        (
            MEGATRON,
            {"model_type": "mistral", "hidden_size": 4096, "num_hidden_layers": 32, "sliding_window": None},
            1,
            "passes",
            ["deprecated as Mistral 7B"],
        ),
        (MEGATRON, {"model_type": "phi3"}, 1, "fails", []),
    ],
)
def test_the_verdict_names_what_happens_by_itself(
    engine: Engine, changes: dict[str, Any], gpus: int, state: str, told: list[str]
) -> None:
    verdict = engine.verdict({**LLAMA, **changes}, gpus)
    assert verdict.state == state
    assert bool(verdict.obstacles) == (state == "fails")
    assert all(any(text in note for note, _ in verdict.notes) for text in told)


def test_commands_name_the_folder_and_the_gpus() -> None:
    for name in ("vllm", "trtllm", "megatron"):
        commands = [text for _, text in BY_NAME[name].commands_for("a folder", 4, "owner/teacher")]
        assert commands
        assert all("'a folder'" in text and "{" not in text for text in commands)
        assert any(" 4" in text for text in commands)
    assert any("owner/teacher" in text for _, text in MEGATRON.commands_for("x", 1, "owner/teacher"))


def test_a_folder_is_checked_without_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_model(tmp_path / "model", "llama-tied", vocab_size=384, intermediate_size=96)  # 3 KV heads
    before = sorted(tmp_path.rglob("*"))

    def shown(gpus: int, *others: str) -> tuple[int, str, str]:
        words = ["export", str(folder), "--check", "vllm", "--tensor-parallel", str(gpus), *others]
        monkeypatch.setattr("sys.argv", ["minitron", *words])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        return (int(stopped.value.code or 0), *capsys.readouterr())

    status, out, errors = shown(2)
    assert status == 1
    assert "num_key_value_heads 3 cannot be split over 2 GPUs; 2 or 4 would pass" in out
    assert "--for vllm --tensor-parallel 2" in out
    assert "vllm serve" not in out
    assert "vllm: fails" in errors
    status, out, _ = shown(3, "--json")
    assert status == 0
    told = json.loads(out)
    assert told["passes"]
    assert told["engines"]["vllm"]["commands"]["serve"] == f"vllm serve {folder} --tensor-parallel-size 3"
    assert sorted(tmp_path.rglob("*")) == before
    both = export(folder, check=["vllm", "trtllm"])
    assert [verdict.state for verdict in both.verdicts.values()] == ["passes", "fails"]  # heads of 8 channels


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"check": "vlm"}, "did you mean 'vllm'"),
        ({"check": "llama.cpp", "tensor_parallel": 2}, "over GPUs was not read"),
        ({"check": "vllm", "out": "x"}, "writes nothing without --format"),
        ({}, "--check and an engine"),
        ({"format": "gguf", "tensor_parallel": 2}, "without --format"),
    ],
)
def test_what_cannot_be_checked_is_one_line(tmp_path: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        export(make_model(tmp_path / "model", "llama-tied"), **arguments)


PHI3 = {
    "hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "sliding_window": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "changes", "engine", "gpus"),
    [
        ("llama-tied", {}, "vllm", 2),
        ("llama-tied", {"vocab_size": 260}, "megatron", 4),
        ("qwen2", {"use_sliding_window": False}, "vllm", 2),
        ("phi3", PHI3, "trtllm", 2),
        ("nemotron_h", {"vocab_size": 384}, "vllm", 3),
    ],
)
def test_the_shapes_that_are_offered_are_those_that_the_engine_runs(
    tmp_path: Path, variant: str, changes: dict[str, Any], engine: str, gpus: int
) -> None:
    source = open_checkpoint(make_model(tmp_path / "model", variant, **changes))
    recipe = recipe_for(engine, gpus, multiple_of={"intermediate_size": 2}, fixed=["num_hidden_layers"])
    budget = parse_budget(0.9, BudgetRecipe(), 0.05, source.arch, [])
    shapes = Acceptance(source).of(every_shape(source.arch, budget, recipe, []))
    some = shapes.at(np.random.default_rng(0).permutation(len(shapes))[:150])
    runs = [_runs(source, some[i], engine, gpus) for i in range(len(some))]
    assert True in runs
    assert False in runs  # the control: without the engine, shapes are offered that it does not run
    kept = runnable(source, some, recipe)
    assert [kept[i] for i in range(len(kept))] == [some[i] for i, passes in enumerate(runs) if passes]
    assert runnable(source, some, recipe_for(None)) is some
    for i in (runs.index(True), runs.index(False)):
        if runs[i]:
            require_runnable(source, some[i], recipe)
        else:
            with pytest.raises(UserError, match="does not run this shape"):
                require_runnable(source, some[i], recipe)


def _runs(source: Any, shape: Any, engine: str, gpus: int) -> bool:
    config = student_config(source, shape, source.arch.first_layers(shape)).to_dict()
    return BY_NAME[engine].verdict(config, gpus).passes


@pytest.mark.parametrize(
    ("engine", "gpus", "changes", "message"),
    [
        ("vllm", 5, {"search.fixed": ["num_key_value_heads"]}, "num_attention_heads 6 cannot be split over 5 GPUs"),
        ("trtllm", 1, {}, "head_dim 8 is not a head size"),
        ("megatron", 4, {}, "vocab_size 258 cannot be split over 4 GPUs"),
        ("llama.cpp", 2, {}, "over GPUs was not read"),
        ("vllm", 2, {"shape": {"intermediate_size": 48}, "target_params": None}, "num_key_value_heads 3 cannot"),
    ],
)
def test_a_search_without_a_shape_for_the_engine_is_refused_before_any_work(
    tmp_path: Path, engine: str, gpus: int, changes: dict[str, Any], message: str
) -> None:
    model = make_model(tmp_path / "model", "llama-tied")
    (tmp_path / "text.txt").write_text("some text " * 2000)
    settings = {"target_params": 0.7, "context": 32, "search.engine": engine, "search.tensor_parallel": gpus, **changes}
    with pytest.raises(UserError, match=message):
        search(model, tmp_path / "out", data=str(tmp_path / "text.txt"), device="cpu", **settings)
    assert not (tmp_path / "out").exists()


def test_a_family_that_an_engine_lacks_is_refused_by_name(tmp_path: Path) -> None:
    source = open_checkpoint(make_model(tmp_path / "model", "olmo2"))
    with pytest.raises(UserError, match="does not run olmo2 models: it has no bridge"):
        require_runnable(source, source.arch, recipe_for("megatron"))
