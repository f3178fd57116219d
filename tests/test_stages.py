"""Recipes of several stages: what each stage is, and that `compress` takes them in a row."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron import compress, pipeline
from minitron.data.packing import Splits
from minitron.errors import UserError
from minitron.model.checkpoint import open_checkpoint
from minitron.recipe import Recipe, recipe_from
from minitron.series import compress_series
from minitron.session import Session
from minitron.stages import stages_of
from tests.conftest import make_model

STAGES: list[dict[str, Any]] = [
    {"name": "corrected", "correct": True, "distill": {"tokens": 256}},
    {"name": "8b", "shape": {"intermediate_size": 48}, "distill": {"tokens": 512}},
    {"name": "4b", "shape": {"hidden_size": 24}, "distill": {"tokens": 512}},
    {"name": "longer", "context": 64, "distill": {"tokens": 256}, "evaluation": {"tokens": 128}},
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stages")
    make_model(folder / "model", "qwen3-tied")
    lines = (f"{i} times {i} is {i * i}, and {i} plus {i} is {i + i}." for i in range(3000))
    (folder / "text.txt").write_text("\n".join(lines))
    return folder


def settings(place: Path, **changes: Any) -> dict[str, Any]:
    quick = {"distill.batch_size": 2, "calibration.tokens": 512, "search.tokens": 128, "evaluation.tokens": 256}
    return {"teacher": str(place / "model"), "data": str(place / "text.txt"), "context": 32, **quick, **changes}


def recipe(place: Path, stages: list[dict[str, Any]], **changes: Any) -> Recipe:
    return recipe_from(None, **settings(place, stages=stages, **changes))


@pytest.fixture(scope="module")
def made(place: Path) -> Path:
    compress_series(recipe(place, STAGES), place / "run")
    return place / "run"


def record(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "run.json").read_text()))


def test_every_stage_starts_from_the_one_before(made: Path, place: Path) -> None:
    corrected = open_checkpoint(made / "corrected" / "corrected")
    assert corrected.arch.sizes == open_checkpoint(place / "model").arch.sizes
    assert corrected.fingerprint() != open_checkpoint(place / "model").fingerprint()
    archs = {name: open_checkpoint(made / name / "student").arch.sizes for name in ("8b", "4b", "longer")}
    assert archs["8b"] == {**corrected.arch.sizes, "intermediate_size": 48}
    assert archs["4b"] == archs["longer"] == {**archs["8b"], "hidden_size": 24}
    for name, before in (("4b", "8b"), ("longer", "4b")):
        sources = record(made / name)["sources"]
        assert sources["larger"] == open_checkpoint(made / before / "student").fingerprint()
        assert sources["teacher"] == corrected.fingerprint()
    assert "larger" not in record(made / "8b")["sources"]


def test_a_stage_without_a_shape_trains_the_student_further(made: Path) -> None:
    before, after = open_checkpoint(made / "4b" / "student"), open_checkpoint(made / "longer" / "student")
    assert (made / "longer" / "pruned").resolve() == (made / "4b" / "student").resolve()
    assert any(not torch.equal(before.tensor(name), after.tensor(name)) for name in after.tensors)
    figures = json.loads((made / "longer" / "eval.json").read_text())
    assert figures["student"]["context"] == 64
    assert set(record(made / "longer")["stages"]) == {"distill", "evaluate"}


def test_pages_and_figures_are_those_of_the_stages(made: Path, place: Path) -> None:
    assert "longer" in (made / "report.html").read_text()
    for name in ("corrected", "8b", "4b", "longer"):
        assert (made / name / "report.html").exists()
        assert (made / name / "student" / "README.md").exists() == (name != "corrected")
    again = compress(settings(place)["teacher"], made, recipe=recipe(place, STAGES))
    assert list(again.to_dict()["members"]) == ["8b", "4b", "longer"]
    assert list(again.to_dict()["corrected"]) == ["corrected"]
    assert [caption.split(":")[0] for _, caption, _ in again.tables()] == ["corrected", "8b", "4b", "longer"]


def test_pages_state_what_a_stage_did(made: Path) -> None:
    pages = {name: (made / name / "report.html").read_text() for name in ("corrected", "4b", "longer")}
    assert all("under way" not in page and "that no other stage has seen" in page for page in pages.values())
    assert "model, corrected" in pages["corrected"]
    assert ["<h2>Correction" in pages[name] for name in ("corrected", "4b")] == [True, False]
    assert "distilled further" in pages["longer"]
    assert "distilled further" not in pages["4b"]
    assert "learns from the corrected teacher" in (made / "report.html").read_text()
    figures = {name: json.loads((made / name / "eval.json").read_text()) for name in ("4b", "longer")}
    assert (list(figures["4b"]), list(figures["longer"])) == (
        ["teacher", "pruned", "student"],
        ["teacher", "before", "student"],
    )


def test_a_finished_stage_is_not_taken_again(made: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitron.series.take_stage", lambda *_, **__: pytest.fail("a stage was taken again"))
    figures = compress_series(recipe(place, STAGES), made)
    assert figures == {name: json.loads((made / name / "eval.json").read_text()) for name in figures}
    assert list(figures) == [stage["name"] for stage in STAGES]


def ids(recipe: Recipe) -> list[list[int]]:
    splits: Splits = Session(recipe).splits
    return [list(map(int, block)) for block in splits.train.ids[: recipe.distill.tokens // 32]]


def test_stages_on_one_text_continue_where_the_one_before_stopped(place: Path) -> None:
    first, second, other = stages_of(
        recipe(place, [*STAGES[1:3], {"name": "other", "seed": 1, "distill": {"tokens": 512}}])
    )
    assert [stage.recipe.distill.skip_tokens for stage in (first, second, other)] == [0, 512, 0]
    whole = recipe_from(None, **settings(place, **{"distill.tokens": 1024, "calibration.tokens": 32}))
    small = {"calibration": first.recipe.calibration.model_copy(update={"tokens": 32})}
    parts = [ids(stage.recipe.model_copy(update=small)) for stage in (first, second)]
    assert parts[0] + parts[1] == ids(whole)
    assert parts[0] != parts[1]


def test_at_the_end_of_the_text_training_begins_again(place: Path) -> None:
    def train(skipped: int) -> list[list[int]]:
        changes = {"distill.tokens": 10**6, "distill.skip_tokens": skipped, "distill.batch_size": 1}
        splits = Session(recipe_from(None, **settings(place, **changes))).splits
        return [list(map(int, block)) for block in splits.train.ids]

    blocks = train(0)
    assert train(96) == blocks[3:] + blocks[:3]
    assert train(32 * len(blocks)) == blocks


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([{"shape": {"hidden_size": 24}}], "'None' is not the name of a stage"),
        ([{"name": "run.json", "shape": {"hidden_size": 24}}], "'run.json' is not the name of a stage"),
        ([STAGES[1], STAGES[1]], "the name 8b is given twice"),
        ([STAGES[1], STAGES[0]], "stage corrected: the teacher is corrected before the first student is cut"),
        ([STAGES[3]], "stage longer: the first student needs a shape"),
        ([{**STAGES[1], "teacher": "t"}], "stage 8b: teacher is that of the whole recipe"),
        ([{**STAGES[1], "distil": {}}], "stage 8b: unknown key 'distil'"),
        ([{**STAGES[1], "distill": {"token": 1}}], "stage 8b: unknown key 'distill.token'"),
        ([{**STAGES[1], "target_params": 0.5}], "stage 8b: give a shape, or a budget"),
        ([STAGES[1], {**STAGES[3], "context": 512}], "stage longer: the 512 tokens .* stage 8b trains on, after 384"),
        ([{"name": "x", "correct": "yes"}], "stage x: correct is 'yes'"),
    ],
)
def test_what_is_wrong_with_a_stage_is_one_line(place: Path, stages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        stages_of(recipe(place, stages))


def test_recipes_are_laid_over_each_other(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("context: 64\ndistill: {tokens: 2M, batch_size: 4}\nshape: {hidden_size: 24}\n")
    (tmp_path / "b.yaml").write_text("distill: {tokens: 1M}\nshape: {intermediate_size: 48}\n")
    both = recipe_from([tmp_path / "a.yaml", tmp_path / "b.yaml"], teacher="t", distill={"learning_rate": 1e-4})
    assert (both.context, both.distill.tokens, both.distill.batch_size) == (64, 10**6, 4)
    assert both.distill.learning_rate == 1e-4
    assert both.shape == {"intermediate_size": 48}  # a mapping that is not a part of the recipe is replaced whole
    reverse = recipe_from([tmp_path / "b.yaml", tmp_path / "a.yaml"], teacher="t")
    assert (reverse.distill.tokens, reverse.shape) == (2 * 10**6, {"hidden_size": 24})


def test_a_shape_that_cannot_be_cut_is_refused_before_any_work(place: Path, tmp_path: Path) -> None:
    wrong = recipe_from(None, **settings(place, shape={"hidden_size": 4096}))
    with pytest.raises(UserError, match="hidden_size 4096 is above the teacher's"):
        pipeline.compress(wrong, tmp_path / "out")
    assert not list(tmp_path.iterdir())
