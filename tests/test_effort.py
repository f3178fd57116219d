"""Tests how much a search does for its share of the distillation, and that the distillation continues a trial."""

import json
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minitron import nas, pipeline
from minitron.distillation.optimizers import learning_rate
from minitron.distillation.trainer import batch_indices
from minitron.errors import UserError
from minitron.evaluation.speed import Speed
from minitron.files import read_json, read_jsonl
from minitron.history import history_of
from minitron.model.arch import Arch
from minitron.model.language_model import Headless
from minitron.nas import speed
from minitron.nas.effort import LEVELS, Costs, rungs, totals, why_not_continued
from minitron.recipe import DistillRecipe, Recipe, recipe_from
from minitron.session import Session
from tests.conftest import make_model
from tests.processes import exit_code, start

GIVEN = {"search.probe_tokens": 64, "search.zero_shot": 5, "search.zero_shot_tokens": 64, "search.shortlist": 3}


def settings(place: Path, **changes: Any) -> dict[str, Any]:
    return {
        "teacher": str(place / "model"), "data": str(place / "text.txt"), "target_params": 0.7, "context": 32,
        "device": "cpu", "calibration.tokens": 256, "search.tokens": 128, "distill.tokens": 1024,
        "distill.batch_size": 2, "distill.learning_rate": 1e-3, "distill.checkpoint_seconds": 0.0,
        "evaluation.tokens": 128, **changes,
    }  # fmt: skip


TRIALS = {
    "search.distill_tokens": 256, "search.probe_tokens": 0, "search.zero_shot": 4, "search.zero_shot_tokens": 64,
    "search.shortlist": 2,
}  # fmt: skip


def recipe(place: Path, **changes: Any) -> Recipe:
    return recipe_from(None, **settings(place, **changes))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("effort")
    make_model(folder / "model", "llama-tied")
    text = [f"{i} times {i} is {i * i}, and {i} plus {i} is {i + i}." for i in range(1500)]
    (folder / "text.txt").write_text("\n".join(text))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minitron.nas.speed.measure_speed", equal_speed)
        pipeline.compress(recipe(folder, **TRIALS), folder / "run")
        yield folder


def equal_speed(model: Any, batch: int, context: int) -> Speed:
    return Speed(1.0, 1.0, batch, context)


def costs(place: Path, **changes: Any) -> Costs:
    session = Session(recipe(place, **changes))
    return nas.costs_of(session, nas.shapes_within(session)[0])


def test_every_level_costs_no_less_than_the_next(place: Path) -> None:
    for changes in ({}, {"distill.tokens": "1M"}, {"distill.batch_size": 16}, {"prune.refit": True}, GIVEN):
        search = costs(place, **changes)
        added = [search.at(level).added for level in LEVELS]
        assert added == sorted(added, reverse=True), changes
        assert added[0] > 3 * added[-1] or changes is GIVEN


@pytest.mark.parametrize("tokens", ["4k", "30k", "300k", "3M"])
def test_a_search_adds_no_more_than_its_share(place: Path, tokens: str) -> None:
    search, before = costs(place, **{"distill.tokens": tokens}), -1.0
    for share in (0.01, 0.1, 0.25, 1.0, 10.0):
        other = search.recipe.search.model_copy(update={"effort": share})
        effort = replace(search, recipe=search.recipe.model_copy(update={"search": other})).affordable()
        assert effort.added <= max(share, search.at(LEVELS[-1]).added)
        assert before <= effort.added
        before = effort.added


def test_a_longer_distillation_pays_for_no_less_and_never_for_more_than_helps(place: Path) -> None:
    efforts = [costs(place, **{"distill.tokens": tokens}).affordable() for tokens in ("1k", "10k", "100k", "1M", "50M")]
    for shorter, longer in pairwise(efforts):
        for name in ("zero_shot", "shortlist", "trial_steps"):
            assert getattr(shorter, name) <= getattr(longer, name), name
    last = efforts[-1]
    assert (last.shortlist, last.trial_steps * 64, last.probe_tokens) == (8, 32_768, 128)
    assert last.zero_shot <= 256
    assert efforts[0].trial_steps == 0
    assert efforts[1].shortlist < 8


def test_what_is_left_out_is_said(place: Path) -> None:
    search = costs(place)
    assert search.at(LEVELS[0]).in_words(64).startswith("8 trials of up to 960 tokens, ")
    assert "left out" not in search.at(LEVELS[0]).in_words(64)
    without_trials = next(level for level in LEVELS if level.trial == 0)
    assert search.at(without_trials).in_words(64) == "8 untrained shapes; left out: trials and training of probes"
    left_out = "trials and comparisons of untrained shapes and training of probes"
    assert search.at(LEVELS[-1]).in_words(64) == f"untrained probes; left out: {left_out}"


def test_what_a_recipe_gives_holds_whatever_it_costs(place: Path) -> None:
    given: dict[str, Any] = {**GIVEN, "search.distill_tokens": 512, "search.effort": 0.001}
    effort = costs(place, **given).affordable()
    assert (effort.probe_tokens, effort.zero_shot, effort.zero_shot_tokens) == (64, 5, 64)
    assert (effort.shortlist, effort.trial_steps) == (3, 8)
    assert effort.added > 0.001
    # A trial leaves one step to its distillation; without trials none are made.
    assert costs(place, **{**given, "search.distill_tokens": "1M"}).affordable().trial_steps == 1024 // 64 - 1
    assert costs(place, **{**given, "search.distill_tokens": 0}).affordable().trial_steps == 0
    with pytest.raises(UserError, match=r"search\.effort"):
        recipe(place, **{"search.effort": -1})


def test_operations_are_those_that_a_search_takes(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in a search of given numbers: the tokens of every forward pass, of the teacher and of candidates."""
    tokens, plain = {True: 0, False: 0}, Headless.forward
    teacher = Arch.from_config(read_json(place / "model" / "config.json"))

    def counted(self: Headless, ids: torch.Tensor, *rest: Any) -> Any:
        model: Any = self.model
        tokens[Arch.from_config(model.config.to_dict()).sizes == teacher.sizes] += ids.numel()
        return plain(self, ids, *rest)

    monkeypatch.setattr(Headless, "forward", counted)
    given: dict[str, Any] = {**TRIALS, "search.probe_tokens": 64}
    session = Session(recipe(place, **given))
    shapes, budget = nas.shapes_within(session)
    importance = load_file(place / "run" / "importance.safetensors")
    nas.search(session, importance, shapes, budget, tmp_path)
    effort = nas.costs_of(session, shapes).affordable()
    assert effort.tokens["teacher"] == 128 + 256
    probes = len(read_json(tmp_path / "search.json")["probes"])
    compared = probes * 64 + 2 * 128  # probes and trials, after training
    of_students = effort.tokens["probes"] + effort.tokens["untrained"] + effort.tokens["trials"] + compared
    whole = effort.tokens["probes"] // probes + 64  # the teacher itself, trained like a probe and compared
    assert tokens[True] == effort.tokens["teacher"] + whole
    assert tokens[False] == of_students - whole


def test_rungs_end_with_a_comparison_of_two_after_all_steps() -> None:
    assert rungs(8, 16) == [(4, 8), (8, 5), (16, 4)]
    assert rungs(4, 16) == [(8, 4), (16, 3)]
    assert rungs(2, 16) == [(16, 2)]
    assert rungs(8, 2) == [(1, 8), (2, 4)]  # no two after equal steps
    assert totals(4, 16) == (8 * 4 + 8 * 3, 4 + 3)
    assert totals(4, 0) == (0, 0)


def test_the_distillation_begins_with_the_trial(place: Path) -> None:
    run, given = place / "run", recipe(place, **TRIALS)
    rows = read_jsonl(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(17))
    assert [row.get("trial", False) for row in rows[1:]] == [True] * 4 + [False] * 12
    assert "heldout_perplexity" in rows[0]  # of the pruned model
    rates = [row["learning_rate"] for row in rows[5:]]
    assert rates == [learning_rate(step, 16, given.distill) for step in range(4, 16)]
    assert rows[4]["learning_rate"] < rows[2]["learning_rate"]  # falls at the end of the trial
    steps = history_of(run / "student").steps
    assert [step["step"] for step in steps] == ["prune", "distill"]
    assert (steps[1]["steps"], steps[1]["steps_of_trial"]) == (16, 4)
    assert not (run / "trial").exists()
    record = json.loads((run / "run.json").read_text())
    assert "resumed_at" not in record["stages"]["distill"]
    assert set(record["expected"]) >= {"calibrate", "search", "trials", "prune", "distill", "evaluate"}


def test_trial_and_distillation_read_equal_blocks(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block of the order once: those of the first steps in each trial, the others in the distillation."""
    from minitron.distillation.objective import Objective

    read: list[list[int]] = []
    plain = Objective.accumulate

    def noted(self: Objective, student: Headless, blocks: Any, numbers: torch.Tensor) -> torch.Tensor:
        read.append(numbers.tolist())
        assert torch.equal(blocks.ids, train.ids[numbers])
        return plain(self, student, blocks, numbers)

    given = recipe(place, **TRIALS)
    train = Session(given).splits.train
    monkeypatch.setattr("minitron.forecast.measure_throughput", lambda *_, **__: None)
    monkeypatch.setattr(Objective, "accumulate", noted)
    pipeline.compress(given, tmp_path / "run")
    order = [batch_indices(step, 2, len(train), 0).tolist() for step in range(16)]
    assert read == order[:4] + order[:4] + order[4:]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"quantize": "int8"}, "rounds"),
        ({"correction": {"trains": "full"}}, "learns"),
        ({}, None),
        ({"trains": "norms"}, None),
    ],
)
def test_what_a_trial_cannot_begin(changes: dict[str, Any], reason: str | None) -> None:
    why = why_not_continued(DistillRecipe.model_validate(changes))
    assert (why is None) == (reason is None)
    assert reason is None or reason in str(why)


def test_where_a_trial_cannot_continue_the_student_starts_from_the_pruned_model(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline.compress(recipe(place, **TRIALS, **{"distill.correction.trains": "full"}), tmp_path / "run")
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(17))
    assert not any("trial" in row for row in rows)
    assert "does not continue the trial of the chosen shape: the teacher learns" in capsys.readouterr().err
    # The pruned model is that of the trial, and that of the run that continued it.
    one, other = (load_file(run / "run" / "pruned" / "model.safetensors") for run in (place, tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_trial_continues_with_losses_within_the_layers(place: Path, tmp_path: Path) -> None:
    """Whose projection the trial did not have."""
    narrow = {"search.space": {"hidden_size": [32]}, "target_params": "45k..52k"}
    added = {"distill.intermediate.of": ["block_output"]}
    pipeline.compress(recipe(place, **TRIALS, **narrow, **added), tmp_path / "run")
    rows = read_jsonl(tmp_path / "run" / "metrics.jsonl")
    assert ["intermediate_loss" in row for row in rows[1:]] == [False] * 4 + [True] * 12
    sizes = [read_json(tmp_path / "run" / name / "config.json")["hidden_size"] for name in ("teacher", "student")]
    assert sizes[0] > sizes[1]


def compress_until_killed(times: int, place: Path, out: Path) -> None:
    """Compress, and die before the trial's files are moved the given number of times."""
    speed.measure_speed = equal_speed  # type: ignore[attr-defined]
    plain, seen = Path.replace, 0

    def replaced(self: Path, target: Any) -> Path:
        nonlocal seen
        seen += self.parent.name == nas.TRIAL
        if seen == times:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, target)

    Path.replace = replaced  # type: ignore[method-assign,assignment]
    pipeline.compress(recipe(place, **TRIALS), out)


def test_a_run_killed_between_search_and_distillation_continues_to_the_same_bits(place: Path, tmp_path: Path) -> None:
    for times in (1, 2, 2):
        killed = start(compress_until_killed, times, place, tmp_path / "run", log=tmp_path / "log")
        assert exit_code(killed) == -signal.SIGKILL, (tmp_path / "log").read_text()[-2000:]
        assert (tmp_path / "run" / "trial").is_dir()
    pipeline.compress(recipe(place, **TRIALS), tmp_path / "run")
    whole, continued = (load_file(run / "run" / "student" / "model.safetensors") for run in (place, tmp_path))
    assert all(torch.equal(whole[name], continued[name]) for name in whole)
    assert read_jsonl(place / "run" / "metrics.jsonl") == read_jsonl(tmp_path / "run" / "metrics.jsonl")


def test_before_a_run_begins_it_says_what_it_will_do(
    place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minitron.runtime.Runtime.free_memory", 400_000)
    monkeypatch.setattr("minitron.pipeline._train", lambda *_, **__: pytest.skip("said"))
    with pytest.raises(pytest.skip.Exception):
        pipeline.compress(recipe(place, **TRIALS), tmp_path / "run")
    lines = [line.split() for line in capsys.readouterr().err.splitlines()]
    assert ["distill", "768", "tokens"] in lines  # without a time, and without the tokens of the trial
    assert ["trials", "512", "tokens"] in lines
    assert any("memory" in line for line in lines)
