"""Tests of nested series: students that are the beginnings of each other, and are trained on shared weights."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from minitron import compress, prune
from minitron.data.blocks import Blocks
from minitron.derivation.proof import random_importance
from minitron.distillation import Member
from minitron.distillation.nested import Nested, drawn, require_equal_names
from minitron.distillation.optimizers import take_step
from minitron.errors import UserError
from minitron.files import read_json, read_jsonl
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.model.language_model import Head, Headless, load_model
from minitron.pruning.calibrate import calibrate
from minitron.pruning.cut import Cut, write_pruned
from minitron.pruning.nested import beginning_of, nested_cuts, nested_layers
from minitron.pruning.repair import repaired
from minitron.pruning.scores import score
from minitron.pruning.selection import LAYER_BLOCKS
from minitron.recipe import CalibrationRecipe, LineageRecipe, PruneRecipe, recipe_from
from minitron.runtime import Runtime
from minitron.stages import nested_stages
from tests.conftest import Verb, variant_arch
from tests.test_prefixes import can_cut_everywhere_but_in_hidden, cut_everywhere_but_in_hidden, narrower
from tests.test_trim import CPU

RUNTIME = Runtime(CPU, torch.float32)
QUICK: dict[str, Any] = {
    "search.shortlist": 1,  # of shapes that tie, the faster one is chosen, by the clock
    "context": 32, "dtype": "float32", "calibration.tokens": 256, "evaluation.tokens": 128, "search.tokens": 64,
    "distill.tokens": 768, "distill.batch_size": 2, "search.probe_tokens": 0,
}  # fmt: skip
TARGETS = "0.85,0.7,0.55"
SHARED = ("llama", "llama-tied", "gemma3", "phi3", "gpt2", "opt", "mamba2", "falcon_h1", "granite")
"""Variants whose tensors transformers holds as the files do."""


@pytest.fixture(scope="module")
def blocks() -> Blocks:
    ids = torch.randint(0, 256, (4, 40), generator=torch.Generator().manual_seed(3))
    return Blocks(ids, torch.ones_like(ids, dtype=torch.int32))


def shapes_of(teacher: Arch) -> list[Arch]:
    """Return three shapes, each with fewer channels or entries than the one before."""
    largest = narrower(teacher)
    cut = cut_everywhere_but_in_hidden(teacher) if can_cut_everywhere_but_in_hidden(teacher) else teacher
    sizes = {name: min(size, largest.sizes[name]) for name, size in cut.sizes.items()}
    smaller = teacher.resized(**{name: size for name, size in sizes.items() if size != teacher.sizes[name]})
    return [teacher, largest, smaller]


def written(
    teacher: Checkpoint, folder: Path, blocks: Blocks, recipe: PruneRecipe
) -> tuple[list[Checkpoint], list[Cut]]:
    """Write a nested series of pruned models."""
    statistics = calibrate(teacher, blocks, recipe=CalibrationRecipe(), runtime=RUNTIME, others=blocks[:1])
    importance = {**random_importance(teacher.arch), **score(statistics, teacher, CalibrationRecipe())}
    cuts = nested_cuts(teacher, importance, shapes_of(teacher.arch), recipe)
    models = []
    for number, cut in enumerate(cuts):
        out = folder / str(number)
        out.mkdir()
        write_pruned(teacher, cut, repaired(teacher, cut, blocks=blocks, recipe=recipe, runtime=RUNTIME), out)
        models.append(open_checkpoint(out))
    return models, cuts


def states(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of a headless model."""
    found: torch.Tensor = model(ids, lambda hidden, head: head.logits(hidden))
    return found


@pytest.mark.parametrize("teacher", SHARED, indirect=True)
def test_a_member_computes_with_the_largest_ones_weights_what_its_pruned_model_does(
    teacher: Checkpoint, tmp_path: Path, blocks: Blocks, input_ids: torch.Tensor
) -> None:
    models, cuts = written(teacher, tmp_path, blocks, PruneRecipe())
    largest = Headless(load_model(models[0], CPU, torch.float32))
    for number in (1, 2):
        begins = beginning_of(models[0], cuts[0].layers, models[number], cuts[number].layers)
        member = Member("small", models[number], begins, 0.5)
        nested = Nested(member, largest, load_model(models[number], CPU, torch.float32))
        expected = states(Headless(load_model(models[number], CPU, torch.float32)), input_ids)
        torch.testing.assert_close(states(nested, input_ids), expected, atol=2e-3, rtol=1e-3)
        assert [id(each) for each in nested.parameters()] == [id(each) for each in largest.parameters()]
        with torch.no_grad():
            next(iter(nested.parameters())).mul_(1.5)
            assert (states(nested, input_ids) - expected).abs().max() > 1e-2
            next(iter(nested.parameters())).div_(1.5)


@pytest.mark.parametrize("teacher", ["llama"], indirect=True)
def test_a_step_of_a_member_moves_what_it_has_and_nothing_else(
    teacher: Checkpoint, tmp_path: Path, blocks: Blocks
) -> None:
    models, cuts = written(teacher, tmp_path, blocks, PruneRecipe())
    largest = Headless(load_model(models[0], CPU, torch.float32))
    begins = beginning_of(models[0], cuts[0].layers, models[2], cuts[2].layers)
    nested = Nested(Member("small", models[2], begins, 1.0), largest, load_model(models[2], CPU, torch.float32))

    def loss(hidden: torch.Tensor, head: Head) -> torch.Tensor:
        return head.logits(hidden).square().mean()

    nested(blocks.ids, loss).backward()
    gradients = {name: value.grad for name, value in largest.model.named_parameters() if value.grad is not None}
    ones = {name: torch.ones_like(value, requires_grad=True) for name, value in gradients.items()}
    torch.stack([part.sum() for _, part in begins.of(ones)]).sum().backward()
    inside = {name: value.grad for name, value in ones.items() if value.grad is not None}
    assert inside.keys() == gradients.keys()
    assert any((mask == 0).any() for mask in inside.values())
    for name, gradient in gradients.items():
        assert gradient[inside[name] == 0].abs().sum() == 0
    assert all(gradients[name].abs().sum() > 0 for name in gradients if "norm" not in name)
    removed = set(range(models[0].arch.axis_size("layer"))) - set(begins.layers)
    assert removed
    assert not any(f"layers.{number}." in name for number in removed for name in gradients)


@pytest.mark.parametrize("teacher", [*SHARED, "mixtral"], indirect=True)
def test_tensors_that_transformers_joins_cannot_be_shared(teacher: Checkpoint) -> None:
    if teacher.arch.model_type in {variant_arch(variant).model_type for variant in SHARED}:
        require_equal_names(teacher)
    else:
        with pytest.raises(UserError, match="mixtral: transformers does not hold"):
            require_equal_names(teacher)


def test_layers_of_a_smaller_student_are_among_those_of_the_larger_one() -> None:
    arch = variant_arch("llama")
    depth = arch.axis_size("layer")
    archs = [arch.resized(num_hidden_layers=depth - number) for number in range(1, depth)]
    for seed in range(20):
        kept = nested_layers(random_importance(arch, seed), arch, archs)
        assert [len(layers) for layers in kept] == [each.axis_size("layer") for each in archs]
        assert all(set(smaller) < set(larger) for larger, smaller in pairwise(kept))


def test_blocks_of_removed_layers_grow_around_each_other() -> None:
    arch = variant_arch("llama")
    depth = arch.axis_size("layer")
    scores = torch.full((depth + 1, depth), float("inf"))
    for count in range(1, depth):
        # By themselves, blocks of one would be removed at the end and longer ones at the beginning.
        scores[count, : depth - count + 1] = torch.arange(depth - count + 1.0) * (-1 if count == 1 else 1)
    importance = {**random_importance(arch), LAYER_BLOCKS: scores}
    kept = nested_layers(importance, arch, [arch.resized(num_hidden_layers=depth - n) for n in (1, 2)])
    assert kept == [list(range(depth - 1)), list(range(depth - 2))]
    alone = nested_layers(importance, arch, [arch.resized(num_hidden_layers=depth - 2)])
    assert alone == [list(range(2, depth))]


def test_steps_are_drawn_by_weight_evenly() -> None:
    assert LineageRecipe().shares(3) == pytest.approx([1 / 3] * 3)
    assert LineageRecipe(weights=(5, 3, 2)).shares(3) == pytest.approx([0.5, 0.3, 0.2])
    for seed in range(5):
        numbers = [drawn(step, [0.5, 0.3, 0.2], seed) for step in range(60)]
        for number, weight in enumerate([0.5, 0.3, 0.2]):
            assert abs(numbers.count(number) - 60 * weight) <= 3
    assert [drawn(s, [0.5, 0.3, 0.2], 0) for s in range(9)] != [drawn(s, [0.5, 0.3, 0.2], 1) for s in range(9)]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.conftest import make_model

    folder = tmp_path_factory.mktemp("nested")
    make_model(folder / "model", "llama-tied")
    words = [f"word{(7 * i * i) % 31} stands here" for i in range(3_000)]
    (folder / "text.txt").write_text(". ".join(words), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def made(place: Path) -> Path:
    compress(place / "model", place / "series", **given(place))
    return place / "series"


def test_students_of_a_series_are_stock_folders_that_share_weights(made: Path, place: Path) -> None:
    runs = [made / name for name in TARGETS.split(",")]
    kept = [read_json(run / "run.json")["kept_layers"] for run in runs]
    models = [open_checkpoint(run / "student") for run in runs]
    sizes = [model.arch.num_parameters for model in models]
    assert sizes == sorted(sizes, reverse=True)
    assert len(set(sizes)) == 3
    tensors = [load_file(run / "student" / "model.safetensors") for run in runs]
    for number in (1, 2):
        begins = beginning_of(models[0], kept[0], models[number], kept[number])
        shared = dict(begins.of(tensors[0]))
        assert shared.keys() == tensors[number].keys()
        for name, value in shared.items():
            if "norm" not in name:
                torch.testing.assert_close(value, tensors[number][name], rtol=0, atol=0)
        before = load_file(runs[number] / "pruned" / "model.safetensors")
        assert any((before[name] != tensors[number][name]).any() for name in before)
        loaded = AutoModelForCausalLM.from_pretrained(runs[number] / "student")
        assert sum(parameter.numel() for parameter in loaded.parameters()) == sizes[number]
    again: dict[str, Any] = {"data": str(place / "text.txt"), "context": 32, "calibration": {"tokens": 256}}
    prune(made / "0.7" / "student", place / "again", num_hidden_layers=1, **again)


def test_the_training_is_recorded_for_each_student(made: Path) -> None:
    rows = read_jsonl(made / "metrics.jsonl")
    steps = [row for row in rows if "learning_rate" in row]
    assert [row["step"] for row in steps] == list(range(1, 13))
    for name in TARGETS.split(","):
        own = read_jsonl(made / name / "metrics.jsonl")
        assert own == [row for row in rows if row["member"] == name]
        assert own[0]["step"] == 0
        assert sum("heldout_perplexity" in row for row in own) == 6
        step = read_json(made / name / "student" / "minitron.json")["steps"][-1]
        assert step["series"]["steps"] == sum(row["member"] == name for row in steps)
        assert math.isclose(sum(step["series"]["weights"].values()), 1, abs_tol=1e-3)
        figures = read_json(made / name / "eval.json")
        assert figures["student"]["kl"] != figures["pruned"]["kl"]
        assert (made / name / "report.html").exists()
    assert "one training" in (made / "report.html").read_text()
    assert "nested series" in (made / "0.7" / "student" / "README.md").read_text()


def test_an_interrupted_series_continues_to_equal_bits(
    made: Path, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(100))

    def interrupted(*given: Any) -> float:
        if next(calls) == 7:
            raise KeyboardInterrupt
        return take_step(*given)

    monkeypatch.setattr("minitron.distillation.trainer.take_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compress(place / "model", tmp_path / "run", **given(place, **{"distill.checkpoint_seconds": 0.0}))
    monkeypatch.setattr("minitron.distillation.trainer.take_step", take_step)
    monkeypatch.setattr("minitron.nested.write_importance", lambda *_: pytest.fail("scored again"))
    compress(place / "model", tmp_path / "run", **given(place))
    for name in TARGETS.split(","):
        one, other = (load_file(run / name / "student" / "model.safetensors") for run in (made, tmp_path / "run"))
        assert all(torch.equal(one[key], other[key]) for key in one)
    monkeypatch.setattr("minitron.nested.distill_nested", lambda *_: pytest.fail("trained again"))
    compress(place / "model", tmp_path / "run", **given(place))


def test_the_flag_of_the_command_line_makes_a_series(made: Path, place: Path, verb: Verb) -> None:
    """A finished series with equal settings is read."""
    settings = [item for key, value in QUICK.items() for item in ("--set", f"{key}={value}")]
    found = verb("compress", place / "model", made, "--data", place / "text.txt", "--target-params", TARGETS,
                 "--nested", *settings)  # fmt: skip
    assert str(made) in str(found)


def given(place: Path, **changes: Any) -> dict[str, Any]:
    return {"data": str(place / "text.txt"), "target_params": TARGETS, "lineage.nested": True, **QUICK, **changes}


def test_chats_of_the_teacher_reach_every_student(place: Path, tmp_path: Path, chatty: Path) -> None:
    settings = given(place, **{"chats.share": 0.25, "chats.max_new_tokens": 8, "target_params": "0.8,0.6"})
    compress(chatty, tmp_path / "run", **settings)
    assert (tmp_path / "run" / "chats.jsonl").exists()
    for name in ("0.8", "0.6"):
        assert read_json(tmp_path / "run" / name / "student" / "minitron.json")["steps"][-1]["chats"] == 0.25
        assert len(read_json(tmp_path / "run" / name / "eval.json")["student"]["answers"]) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_params": "0.7"}, "needs several"),
        ({"lineage.weights": [0.5, 0.5]}, "2 numbers for 3"),
        ({"lineage.taught_by": "larger"}, "teaches nothing new"),
        ({"vocabulary.trim": True}, "keeps the teacher's vocabulary"),
        ({"chats.share": 0.1}, "no chat template"),
        ({"distill.trains": "norms"}, "distill.trains norms"),
        ({"distill.quantize": "int8"}, "distill.quantize"),
        ({"distill.activation_checkpointing": True}, "activation_checkpointing"),
        ({"prune.refit": True}, "prune.refit"),
        ({"prune.rounds": 2}, "prune.rounds"),
    ],
)
def test_what_a_series_cannot_have_is_refused_before_any_work(
    place: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        compress(place / "model", tmp_path / "out", **given(place, **changes))
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_shapes_that_are_stated_must_nest(place: Path, tmp_path: Path) -> None:
    shapes = [{"name": "a", "shape": {"intermediate_size": 32}}, {"name": "b", "shape": {"intermediate_size": 48}}]
    settings = {"data": str(place / "text.txt"), "lineage": {"nested": True}, **QUICK, "stages": shapes}
    with pytest.raises(UserError, match="intermediate_size 48 of a smaller student is above the 32"):
        compress(place / "model", tmp_path / "out", **settings)


def test_searches_of_a_series_share_the_effort_and_have_no_trials() -> None:
    stages = nested_stages(recipe_from(None, teacher="x", target_params=TARGETS, lineage={"nested": True}))
    assert [stage.name for stage in stages] == TARGETS.split(",")
    assert all(stage.recipe.search.distill_tokens == 0 for stage in stages)
    assert sum(stage.recipe.search.effort for stage in stages) == pytest.approx(
        recipe_from(None, teacher="x").search.effort
    )
