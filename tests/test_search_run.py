"""The search at work on a tiny model: what it writes, what it keeps to, and that a killed one repeats nothing."""

import json
import os
import signal
import socket
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

import minitron
from minitron import pipeline
from minitron.errors import UserError
from minitron.evaluation.speed import Speed, measure_speed
from minitron.files import write_jsonl
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.model.language_model import load_model
from minitron.nas import trial, zero_shot
from minitron.nas.budget import Serving
from minitron.nas.rank import _choose, shapes_within
from minitron.nas.speed import Speeds, _fitted
from minitron.nas.trial import better_half, rungs
from minitron.pipeline import compress_series
from minitron.recipe import Recipe, load_recipe
from minitron.reports.candidates import draw_candidates
from minitron.reports.svg import side_by_side
from minitron.session import Session
from tests.conftest import make_model

CPU = torch.device("cpu")


def recipe(teacher: Path, text: Path, **changes: Any) -> Recipe:
    values = {
        "teacher": str(teacher), "data": str(text), "target_params": 0.7, "context": 32, "device": "cpu",
        "calibration.tokens": "1k", "search.tokens": 128, "search.shortlist": 4, "search.zero_shot": 10,
        "search.zero_shot_tokens": 64, "search.probe_tokens": 64, "search.distill_tokens": 256,
        "distill.tokens": 512, "distill.batch_size": 2, "distill.learning_rate": 1e-3,
        "distill.checkpoint_seconds": 0.0, "evaluation.tokens": 256, **changes,
    }  # fmt: skip
    return load_recipe(None, values)


def search(recipe: Recipe, out: Path) -> Arch:
    return minitron.search(recipe.teacher, out, recipe=recipe).arch


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    make_model(folder / "model", "llama-tied")
    text = [f"{i} times {i} is {i * i}, and {i} plus {i} is {i + i}." for i in range(1500)]
    (folder / "text.txt").write_text("\n".join(text))
    search(recipe(folder / "model", folder / "text.txt"), folder / "found")
    return folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "candidates.jsonl").read_text().splitlines()]


def test_every_candidate_is_there_with_its_figures(place: Path) -> None:
    assert {path.name for path in (place / "found").iterdir()} == {
        "arch.json", "candidates.jsonl", "candidates.svg", "search.json"
    }  # fmt: skip
    assert not list(place.glob(".*"))
    rows = rows_of(place / "found")
    assert len(rows) == 10
    for row in rows:
        assert row["zero_shot_kl"] > 0
        assert row["predicted_kl"] > 0
        assert row["memory_bytes"] > 2 * row["num_parameters"]
    distilled = [row for row in rows if row["distilled_kl"]]
    assert [len(row["distilled_kl"]) for row in sorted(distilled, key=lambda row: len(row["distilled_kl"]))] == [
        1,
        1,
        2,
        3,
    ]
    assert all(row["prefill_seconds"] > 0 and row["decode_seconds"] > 0 for row in distilled)
    [chosen] = [row for row in rows if row["chosen"]]
    assert len(chosen["distilled_kl"]) == 3
    assert chosen["arch"] == json.loads((place / "found" / "arch.json").read_text())
    search = json.loads((place / "found" / "search.json").read_text())
    assert search["compared"]["shapes"] == 10
    assert search["distilled"] == {"shapes": 4, "tokens": 2 * 64 + 128 + 256, "tokens_each": 256}
    assert search["teacher_tokens"] == 256 + 128  # each once
    assert set(search["probes"]) == {"hidden", "ffn", "query", "kv", "layer"}
    assert search["limits"]["num_parameters"]["high"] >= chosen["num_parameters"]


def test_the_poorer_half_stops_at_every_rung(place: Path) -> None:
    rows = rows_of(place / "found")
    heights = [str(tokens) for tokens in rungs(recipe(place / "model", place / "text.txt"), 32)]
    assert heights == ["64", "128", "256"]
    for here, after in pairwise(heights):
        going_on = [row["distilled_kl"][here] for row in rows if after in row["distilled_kl"]]
        stopped = [kl for row in rows if (kl := row["distilled_kl"].get(here)) and after not in row["distilled_kl"]]
        assert len(stopped) in {1, 2}
        assert max(going_on) <= min(stopped)
    assert rungs(recipe(place / "model", place / "text.txt", **{"search.halving": False}), 32) == [256]


def test_the_same_search_finds_the_same_again(place: Path, tmp_path: Path) -> None:
    search(recipe(place / "model", place / "text.txt"), tmp_path / "again")
    assert without_speeds(rows_of(tmp_path / "again")) == without_speeds(rows_of(place / "found"))
    other = recipe(place / "model", place / "text.txt", seed=1)
    search(other, tmp_path / "other")
    assert without_speeds(rows_of(tmp_path / "other")) != without_speeds(rows_of(place / "found"))


def without_speeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.endswith("_seconds")} for row in rows]


# Kills its own process without warning at the n-th of some calls; speeds are as if they had been measured.
KILLED = """
import sys
from pathlib import Path
from tests.test_search_run import note_calls, recipe, search

name, times, teacher, text, out = sys.argv[1], int(sys.argv[2]), *map(Path, sys.argv[3:])
note_calls(setattr, out.with_name("calls"), name, times)
search(recipe(teacher, text), out)
"""
COSTLY = {"train": (trial.Trial, "__call__"), "compare": (zero_shot.ZeroShot, "__call__")}


def note_calls(patch: Any, log: Path, kill_in: str | None = None, times: int = 0) -> None:
    """Note every costly call that has come to its end, and kill the process at the beginning of one."""
    seen = dict.fromkeys(COSTLY, 0)
    for name, (owner, attribute) in COSTLY.items():
        plain = getattr(owner, attribute)

        def noted(*args: Any, name: str = name, plain: Any = plain) -> Any:
            seen[name] += 1
            if name == kill_in and seen[name] == times:
                os.kill(os.getpid(), signal.SIGKILL)
            result = plain(*args)
            with log.open("a") as file:
                file.write(f"{name} {args[1:4]}\n")
            return result

        patch(owner, attribute, noted)


@pytest.mark.parametrize(("name", "times"), [("train", 3), ("compare", 6), ("train", 11)])
def test_a_killed_search_goes_on_and_repeats_nothing_that_was_finished(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, times: int
) -> None:
    arguments = [name, str(times), str(place / "model"), str(place / "text.txt"), str(tmp_path / "out")]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()[-2000:]
    before = (tmp_path / "calls").read_text().splitlines()
    note_calls(monkeypatch.setattr, tmp_path / "calls")
    search(recipe(place / "model", place / "text.txt"), tmp_path / "out")
    assert without_speeds(rows_of(tmp_path / "out")) == without_speeds(rows_of(place / "found"))
    after = (tmp_path / "calls").read_text().splitlines()[len(before) :]
    assert len(before) + len(after) == 5 + 10 + 4 + 2 + 1  # probes, compared, and at each rung
    assert not set(before) & set(after)


def test_processes_share_the_candidates_out(place: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = tmp_path / "recipe.json"
    path.write_text(recipe(place / "model", place / "text.txt").model_dump_json())
    code = (
        "import sys, minitron; from minitron.recipe import load_recipe; from pathlib import Path; "
        "given = load_recipe(Path(sys.argv[1]), {}); minitron.search(given.teacher, sys.argv[2], recipe=given)"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(path), str(tmp_path / "out")],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1",
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
            stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()[-2000:]
    assert without_speeds(rows_of(tmp_path / "out")) == without_speeds(rows_of(place / "found"))


def test_without_training_the_untrained_candidates_decide(place: Path, tmp_path: Path) -> None:
    untrained = recipe(place / "model", place / "text.txt", **{"search.distill_tokens": 0})
    search(untrained, tmp_path / "found")
    rows = rows_of(tmp_path / "found")
    [chosen] = [row for row in rows if row["chosen"]]
    assert not any(row["distilled_kl"] for row in rows)
    assert chosen["zero_shot_kl"] <= min(row["zero_shot_kl"] for row in rows) * 1.01


def test_of_candidates_as_good_the_fastest_is_chosen() -> None:
    def row(kl: float, seconds: float) -> dict[str, Any]:
        return {"distilled_kl": {"10": 9.0, "20": kl}, "zero_shot_kl": 5.0, "prefill_seconds": seconds}

    rows = [row(1.0, 3.0), row(1.005, 2.0), row(1.02, 1.0)]
    assert _choose(rows, [0, 1, 2]) == 1
    assert _choose([row(1.0, 3.0), row(1.02, 1.0)], [0, 1]) == 0


def test_of_a_comparison_the_better_half_goes_on_and_who_is_as_good() -> None:
    assert better_half({1: 1.0, 2: 1.2, 3: 1.1, 4: 1.3}) == {1, 3}
    assert better_half({1: 1.0, 2: 1.105, 3: 1.1, 4: 1.12}) == {1, 2, 3}
    assert better_half({1: 1.0, 2: 1.2, 3: 1.1}) == {1, 3}
    assert better_half({7: 1.0}) == {7}


def test_a_memory_budget_is_kept_by_what_is_written(place: Path, tmp_path: Path) -> None:
    asked = recipe(
        place / "model", place / "text.txt",
        **{"target_params": None, "budget.memory": "0.6", "budget.context": 4096, "budget.batch": 4,
           "search.tolerance": 0.2, "search.distill_tokens": 0},
    )  # fmt: skip
    found = minitron.prune(asked.teacher, tmp_path / "pruned", recipe=asked).to_dict()
    student = load_model(open_checkpoint(tmp_path / "pruned"), CPU, torch.bfloat16)
    ids = torch.zeros(4, 256, dtype=torch.int64)
    with torch.no_grad():
        cache = student(input_ids=ids, use_cache=True).past_key_values
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    held = sum(parameter.nbytes for parameter in student.parameters()) + 4096 // 256 * sum(t.nbytes for t in tensors)
    limit = shapes_within(Session(asked))[1].limits["memory_bytes"]
    assert limit.low <= held <= limit.high
    whole = Session(asked).teacher.arch
    assert found["arch"]["num_key_value_heads"] < whole.axis_size("kv") or found["arch"]["num_hidden_layers"] < 4


class Pretended:
    """Times as if each layer took a second, and each of its neurons a millisecond; or so many times that."""

    def __init__(self, slower: float = 1.0) -> None:
        self.slower = slower

    def __call__(self, model: Any, batch: int, context: int) -> Speed:
        config = model.config
        seconds = self.slower * config.num_hidden_layers * (1 + config.intermediate_size / 1000)
        return Speed(seconds, seconds / context, batch, context)

    def alternate(self, models: dict[str, Any], batch: int, context: int, repeats: int) -> dict[str, list[Speed]]:
        return {name: [self(model, batch, context)] * repeats for name, model in models.items()}


def test_a_speed_budget_is_kept_by_what_is_measured(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minitron.nas.speed.measure_speed", Pretended())
    monkeypatch.setattr("minitron.nas.speed.alternate", Pretended(slower=3.0).alternate)
    asked = recipe(place / "model", place / "text.txt", **{"target_params": None, "budget.throughput": "1.35x",
                   "budget.context": 64, "search.distill_tokens": 0, "search.tolerance": 0.2})  # fmt: skip
    found = search(asked, tmp_path / "found")
    whole = 4 * (1 + 64 / 1000)
    seconds = found.sizes["num_hidden_layers"] * (1 + found.sizes["intermediate_size"] / 1000)
    assert 0.8 * whole / 1.35 <= seconds <= whole / 1.35
    with pytest.raises(UserError, match="is met by the teacher already"):
        search(
            asked.model_copy(update={"budget": asked.budget.model_copy(update={"throughput": "0.5x"})}),
            tmp_path / "slower",
        )


def test_a_fit_of_times_has_no_negative_factor() -> None:
    parts = torch.rand(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).numpy()
    exact = parts @ [0.0, 2.0, 0.5, 1.0]
    assert _fitted(parts, exact) == pytest.approx([0.0, 2.0, 0.5, 1.0], abs=1e-9)
    assert (_fitted(parts, exact - 0.3 * parts[:, 0] + 0.2) >= 0).all()


def test_a_machine_that_slows_down_changes_no_shape_that_is_timed_beside_the_teacher(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, small = open_checkpoint(place / "model"), {"num_hidden_layers": 2}
    seconds = {}
    for slower in (1.0, 3.0):
        own = Speeds(teacher, Serving(1, 32), CPU, torch.float32, tmp_path / f"{slower}-teacher.jsonl")
        monkeypatch.setattr("minitron.nas.speed.measure_speed", Pretended())
        own(teacher.arch)
        monkeypatch.setattr("minitron.nas.speed.measure_speed", Pretended(slower))
        monkeypatch.setattr("minitron.nas.speed.alternate", Pretended(slower).alternate)
        for beside in (own, None):
            speeds = Speeds(
                teacher, Serving(1, 32), CPU, torch.float32, tmp_path / f"{slower}-{beside is None}", beside
            )
            seconds[slower, beside is None] = speeds(teacher.arch.resized(**small))["prefill_seconds"]
    assert seconds[3.0, False] == pytest.approx(seconds[1.0, False]) == pytest.approx(seconds[1.0, True])
    assert seconds[3.0, True] == pytest.approx(3 * seconds[1.0, True])  # alone


def test_an_estimate_knows_embeddings_from_weights_of_layers(place: Path, tmp_path: Path) -> None:
    """Where a layer's weights take time and embeddings none, as in a prefill; the control counts them alike."""
    asked = recipe(place / "model", place / "text.txt", target_params=None, **{"budget.throughput": "1.1x"})
    teacher, shapes = open_checkpoint(place / "model"), shapes_within(Session(asked))[0]
    speeds = Speeds(teacher, Serving(1, 32), CPU, torch.float32, tmp_path / "speeds.jsonl")
    exact = {i: 1e-6 * shapes[i].num_non_embedding_parameters for i in range(0, len(shapes), max(1, len(shapes) // 40))}
    fitted = list(exact)[::4]
    times = [{"prefill_seconds": exact[i], "decode_seconds": 1e-6 * shapes[i].num_parameters} for i in fitted]
    write_jsonl(speeds.path, [{"sizes": dict(shapes[i].sizes), **row} for i, row in zip(fitted, times, strict=True)])
    found = speeds.estimated(shapes)
    for i, seconds in exact.items():
        assert found["prefill_seconds"][i] == pytest.approx(seconds, rel=1e-6)
        assert found["decode_seconds"][i] == pytest.approx(1e-6 * shapes[i].num_parameters, rel=1e-6)
    shares = [shapes[i].num_parameters / exact[i] for i in exact]
    assert max(shares) > 1.1 * min(shares)


def test_speeds_are_measured_once_and_remembered(place: Path, tmp_path: Path) -> None:
    teacher = open_checkpoint(place / "model")
    speeds = Speeds(teacher, Serving(1, 32), CPU, torch.float32, tmp_path / "speeds.jsonl")
    small = teacher.arch.resized(num_hidden_layers=2)
    first = speeds(small)
    assert speeds(small) == first
    assert len((tmp_path / "speeds.jsonl").read_text().splitlines()) == 1
    other = Speeds(teacher, Serving(2, 32), CPU, torch.float32, tmp_path / "speeds.jsonl")
    assert other.remembered(small) is None


def test_every_family_can_be_timed(teacher: Checkpoint) -> None:
    speed = measure_speed(load_model(teacher, CPU, torch.float32), batch=2, context=24)
    assert speed.prefill_seconds > 0
    assert speed.decode_seconds > 0
    assert speed.prefill_tokens_per_second == pytest.approx(48 / speed.prefill_seconds)


def test_candidates_of_hybrids_are_timed_with_layers_of_each_kind(tmp_path: Path) -> None:
    teacher = open_checkpoint(make_model(tmp_path / "model", "nemotron_h"))
    speeds = Speeds(teacher, Serving(1, 16), CPU, torch.float32, tmp_path / "speeds.jsonl")
    assert speeds(teacher.arch.resized(num_hidden_layers=5))["prefill_seconds"] > 0


def test_the_plot_shows_each_candidate_and_marks_the_chosen(place: Path) -> None:
    rows, search = rows_of(place / "found"), json.loads((place / "found" / "search.json").read_text())
    svg = side_by_side(draw_candidates(rows, search)).svg()
    assert svg == (place / "found" / "candidates.svg").read_text()
    assert svg.count("<circle") == 10 + 4 + 4 + 3 * 2  # untrained; by size; by speed; in the legends
    assert svg.count('r="6"') == 3 + 3
    rows[0]["arch"]["hidden_size"] = "<script>"
    svg = side_by_side(draw_candidates(rows, search)).svg()
    assert "&lt;script&gt;" in svg
    assert "<script>" not in svg


@pytest.fixture(scope="module")
def family(place: Path) -> Path:
    compress_series(recipe(place / "model", place / "text.txt", target_params="0.85,0.7,0.55"), place / "family")
    return place / "family"


def test_members_of_a_family_are_cut_one_out_of_the_other(family: Path, place: Path) -> None:
    assert {path.name for path in family.iterdir()} == {
        "0.85", "0.7", "0.55", "run.json", "report.html", "teacher.json"
    }  # fmt: skip
    archs = [open_checkpoint(family / name / "student").arch for name in ("0.85", "0.7", "0.55")]
    teacher = open_checkpoint(place / "model").arch
    for larger, smaller, share in zip([teacher, *archs], archs, (0.85, 0.7, 0.55), strict=False):
        larger.require_prunable_to(smaller)
        assert share * 0.95 <= smaller.num_parameters / teacher.num_parameters <= share
    record = json.loads((family / "0.7" / "run.json").read_text())
    assert record["sources"]["larger"] == open_checkpoint(family / "0.85" / "student").fingerprint()
    assert record["sources"]["teacher"] == open_checkpoint(place / "model").fingerprint()
    page = (family / "report.html").read_text()
    assert "once" in page
    assert '<a href="0.55/report.html">' in page


def test_a_member_starts_from_the_larger_one(family: Path, place: Path) -> None:
    """Its pruned model is a cut of that student, not of the teacher."""
    pruned, larger = open_checkpoint(family / "0.7" / "pruned"), open_checkpoint(family / "0.85" / "student")
    norms = [name for name in pruned.tensors if name.endswith("post_attention_layernorm.weight")]
    assert norms
    student = family / "0.85" / "student"
    from_larger = minitron.prune(
        student,
        place / "by-hand",
        arch=family / "0.7" / "arch.json",
        recipe=recipe(student, place / "text.txt", target_params=None),
        overwrite=True,
    )
    by_hand = open_checkpoint(place / "by-hand")
    assert from_larger.arch.num_parameters == pruned.arch.num_parameters < larger.arch.num_parameters
    assert all(torch.equal(by_hand.tensor(name), pruned.tensor(name)) for name in pruned.tensors)


def test_a_finished_member_is_not_made_again(family: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in family.rglob("student/*")}
    monkeypatch.setattr("minitron.pipeline.compress", lambda *_, **__: pytest.fail("a member was made again"))
    compress_series(recipe(place / "model", place / "text.txt", target_params="0.85,0.7,0.55"), family)
    assert before == {path: path.stat().st_mtime_ns for path in family.rglob("student/*")}


def test_members_may_be_taught_by_the_larger_one(place: Path, tmp_path: Path) -> None:
    taught = recipe(place / "model", place / "text.txt", target_params="0.85,0.7", **{"lineage.taught_by": "larger"})
    compress_series(taught, tmp_path / "family")
    record = json.loads((tmp_path / "family" / "0.7" / "run.json").read_text())
    assert record["sources"]["teacher"] == open_checkpoint(tmp_path / "family" / "0.85" / "student").fingerprint()
    student = open_checkpoint(tmp_path / "family" / "0.7" / "student")
    whole = open_checkpoint(place / "model").arch.num_parameters
    assert 0.66 * whole <= student.arch.num_parameters <= 0.7 * whole


def test_members_must_get_smaller(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="each member must be smaller than the one before"):
        compress_series(recipe(place / "model", place / "text.txt", target_params="0.6,0.7"), tmp_path / "family")
    with pytest.raises(UserError, match="make a series of students, which is what compress does"):
        search(recipe(place / "model", place / "text.txt", target_params="0.7,0.6"), tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_compress_searches_too(place: Path, tmp_path: Path) -> None:
    pipeline.compress(recipe(place / "model", place / "text.txt"), tmp_path / "run")
    assert without_speeds(rows_of(tmp_path / "run")) == without_speeds(rows_of(place / "found"))
    assert (
        "KL to the teacher in nats per token: untrained on 64 held-out tokens"
        in (tmp_path / "run" / "report.html").read_text()
    )
