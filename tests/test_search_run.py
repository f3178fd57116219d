"""Tests the search on a tiny model: its files, its budgets, and that an interrupted search repeats nothing."""

import json
import os
import signal
import socket
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minitron import calibrate, nas, pipeline, prune, search
from minitron.errors import UserError
from minitron.evaluation.speed import Speed, measure_speed
from minitron.files import write_jsonl
from minitron.history import history_of
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.model.language_model import load_model
from minitron.nas import shapes_within, trial, zero_shot
from minitron.nas.budget import Serving
from minitron.nas.candidates import Candidate
from minitron.nas.effort import rungs
from minitron.nas.estimate import estimate, fitted
from minitron.nas.probes import Probing
from minitron.nas.speed import Speeds
from minitron.nas.trial import better_half, choose
from minitron.recipe import Recipe, recipe_from
from minitron.reports.candidates import draw_candidates
from minitron.reports.svg import side_by_side
from minitron.runtime import Runtime
from minitron.series import compress_series
from minitron.session import Session
from minitron.verbs.results import Shaped
from tests.conftest import MECHANISMS, make_model
from tests.processes import exit_code, start

CPU = torch.device("cpu")
RUNTIME = Runtime(CPU, torch.float32)


def settings(place: Path, **changes: Any) -> dict[str, Any]:
    """Return the arguments of a verb for a small search with the model and the text in `place`."""
    return {
        "teacher": place / "model", "data": str(place / "text.txt"), "target_params": 0.7, "context": 32,
        "device": "cpu",
        "calibration.tokens": 256, "search.tokens": 128, "search.shortlist": 4, "search.zero_shot": 10,
        "search.zero_shot_tokens": 64, "search.probe_tokens": 64, "search.distill_tokens": 256,
        "distill.tokens": 512, "distill.batch_size": 2, "distill.learning_rate": 1e-3,
        "distill.checkpoint_seconds": 0.0, "evaluation.tokens": 256, **changes,
    }  # fmt: skip


def recipe(place: Path, **changes: Any) -> Recipe:
    return recipe_from(None, **settings(place, **changes))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("search")
    make_model(folder / "model", "llama-tied")
    text = [f"{i} times {i} is {i * i}, and {i} plus {i} is {i + i}." for i in range(1500)]
    (folder / "text.txt").write_text("\n".join(text))
    search(out=folder / "found", **settings(folder))
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
    assert sorted(len(row["distilled_kl"]) for row in distilled) == [1, 1, 2, 2]
    assert all(row["prefill_seconds"] > 0 and row["decode_seconds"] > 0 for row in distilled)
    [chosen] = [row for row in rows if row["chosen"]]
    assert len(chosen["distilled_kl"]) == 2
    assert chosen["arch"] == json.loads((place / "found" / "arch.json").read_text())
    summary = json.loads((place / "found" / "search.json").read_text())
    assert summary["compared"]["shapes"] == 10
    assert summary["distilled"] == {"shapes": 4, "tokens": 2 * 128 + 2 * 256, "tokens_each": 256}
    assert summary["effort"]["tokens"]["teacher"] == 256 + 128  # each once
    assert set(summary["probes"]) == {"whole", "hidden", "ffn", "query", "kv", "layer"}
    assert summary["limits"]["num_parameters"]["high"] >= chosen["num_parameters"]


def test_a_line_of_the_candidates_survives_a_round_trip(place: Path) -> None:
    teacher = open_checkpoint(place / "model").arch
    for line in (place / "found" / "candidates.jsonl").read_text().splitlines():
        assert json.dumps(Candidate.from_dict(0, json.loads(line), teacher).to_dict()) == line


def test_the_poorer_half_stops_at_every_rung(place: Path) -> None:
    rows = rows_of(place / "found")
    heights = [str(64 * height) for height, _ in rungs(finalists=4, steps=4)]
    assert heights == ["128", "256"]
    for here, after in pairwise(heights):
        continued = [row["distilled_kl"][here] for row in rows if after in row["distilled_kl"]]
        stopped = [kl for row in rows if (kl := row["distilled_kl"].get(here)) and after not in row["distilled_kl"]]
        assert len(stopped) in {1, 2}
        assert max(continued) <= min(stopped)


def test_an_equal_search_finds_equal_candidates(place: Path, tmp_path: Path) -> None:
    search(out=tmp_path / "again", **settings(place))
    assert without_speeds(rows_of(tmp_path / "again")) == without_speeds(rows_of(place / "found"))
    search(out=tmp_path / "other", **settings(place, seed=1))
    assert without_speeds(rows_of(tmp_path / "other")) != without_speeds(rows_of(place / "found"))


def without_speeds(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if not key.endswith("_seconds")} for row in rows]


def search_in(place: Path, out: Path) -> None:
    search(out=out, **settings(place))


def search_until_killed(name: str, times: int, place: Path, out: Path) -> None:
    note_calls(setattr, out.with_name("calls"), name, times)
    search(out=out, **settings(place))


COSTLY = {
    "probe": (Probing, "__call__"), "train": (trial.Trial, "__call__"),
    "compare": (zero_shot.ZeroShot, "__call__"),
}  # fmt: skip


def note_calls(patch: Any, log: Path, kill_in: str | None = None, times: int = 0) -> None:
    """Write every costly call that finishes to `log`, and kill the process at the beginning of one of them."""
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


def test_a_killed_search_continues_and_repeats_nothing_that_was_finished(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In the third of 6 probes, in the sixth comparison, and in a trial after the first rung; each process continues.
    for name, times in (("probe", 3), ("compare", 6), ("train", 5)):
        killed = start(search_until_killed, name, times, place, tmp_path / "out", log=tmp_path / "log")
        assert exit_code(killed) == -signal.SIGKILL, (tmp_path / "log").read_text()[-2000:]
    note_calls(monkeypatch.setattr, tmp_path / "calls")
    search(out=tmp_path / "out", **settings(place))
    assert without_speeds(rows_of(tmp_path / "out")) == without_speeds(rows_of(place / "found"))
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == len(set(calls)) == 6 + 10 + 4 + 2  # probes, compared, and at each rung


def test_candidates_are_split_among_processes(place: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        start(search_in, place, tmp_path / "out", log=tmp_path / "log",
              environment={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(2)
    ]  # fmt: skip
    for process in processes:
        assert exit_code(process) == 0, (tmp_path / "log").read_text()[-2000:]
    assert without_speeds(rows_of(tmp_path / "out")) == without_speeds(rows_of(place / "found"))


def test_without_training_the_untrained_candidates_decide(place: Path, tmp_path: Path) -> None:
    search(out=tmp_path / "found", **settings(place, **{"search.distill_tokens": 0}))
    rows = rows_of(tmp_path / "found")
    [chosen] = [row for row in rows if row["chosen"]]
    assert not any(row["distilled_kl"] for row in rows)
    assert chosen["zero_shot_kl"] <= min(row["zero_shot_kl"] for row in rows) * 1.01


def test_among_candidates_that_tie_the_fastest_is_chosen(place: Path) -> None:
    arch = open_checkpoint(place / "model").arch

    def candidate(kl: float, seconds: float) -> Candidate:
        return Candidate(
            0, arch, {}, predicted_kl=5.0, zero_shot_kl=5.0, distilled_kl={10: 9.0, 20: kl}, prefill_seconds=seconds
        )

    candidates = [candidate(1.0, 3.0), candidate(1.005, 2.0), candidate(1.02, 1.0)]
    assert choose(candidates) is candidates[1]
    candidates = [candidate(1.0, 3.0), candidate(1.02, 1.0)]
    assert choose(candidates) is candidates[0]


def test_the_better_half_of_a_comparison_continues_and_what_ties_with_it() -> None:
    assert better_half({1: 1.0, 2: 1.2, 3: 1.1, 4: 1.3}) == {1, 3}
    assert better_half({1: 1.0, 2: 1.105, 3: 1.1, 4: 1.12}) == {1, 2, 3}
    assert better_half({1: 1.0, 2: 1.105, 3: 1.1, 4: 1.106}) == {1, 2, 3}  # one of those that tie, the better one
    assert better_half({1: 1.0, 2: 1.2, 3: 1.1}) == {1, 3}
    assert better_half({7: 1.0}) == {7}


def test_a_memory_budget_is_kept_by_what_is_written(place: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "target_params": None, "budget.memory": "0.6", "budget.context": 4096, "budget.batch": 4,
        "search.tolerance": 0.2, "search.distill_tokens": 0,
    }  # fmt: skip
    pruned = prune(out=tmp_path / "pruned", **settings(place, **changes))
    assert isinstance(pruned, Shaped)
    student = load_model(open_checkpoint(tmp_path / "pruned"), CPU, torch.bfloat16)
    ids = torch.zeros(4, 256, dtype=torch.int64)
    with torch.no_grad():
        cache = student(input_ids=ids, use_cache=True).past_key_values
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    held = sum(parameter.nbytes for parameter in student.parameters()) + 4096 // 256 * sum(t.nbytes for t in tensors)
    limit = shapes_within(Session(recipe(place, **changes)))[1].limits["memory_bytes"]
    assert limit.low <= held <= limit.high
    teacher = open_checkpoint(place / "model").arch
    assert pruned.arch.axis_size("kv") < teacher.axis_size("kv") or pruned.arch.axis_size("layer") < 4


class Pretended:
    """Pretends that each layer takes a second and each of its neurons a millisecond, times `slower`."""

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
    changes: dict[str, Any] = {
        "target_params": None, "budget.throughput": "1.35x", "budget.context": 64, "search.distill_tokens": 0,
        "search.tolerance": 0.2,
    }  # fmt: skip
    arch = search(out=tmp_path / "found", **settings(place, **changes)).arch
    of_teacher = 4 * (1 + 64 / 1000)
    seconds = arch.axis_size("layer") * (1 + arch.axis_size("ffn") / 1000)
    assert 0.8 * of_teacher / 1.35 <= seconds <= of_teacher / 1.35
    with pytest.raises(UserError, match="is met by the teacher already"):
        search(out=tmp_path / "slower", **settings(place, **{**changes, "budget.throughput": "0.5x"}))


def test_a_fit_of_times_has_no_negative_factor() -> None:
    parts = torch.rand(20, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).numpy()
    exact = parts @ [0.0, 2.0, 0.5, 1.0]
    assert fitted(parts, exact) == pytest.approx([0.0, 2.0, 0.5, 1.0], abs=1e-9)
    assert (fitted(parts, exact - 0.3 * parts[:, 0] + 0.2) >= 0).all()


def test_a_machine_that_slows_down_changes_no_shape_that_is_timed_in_turn_with_the_teacher(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, small = open_checkpoint(place / "model"), {"num_hidden_layers": 2}
    seconds = {}
    for slower in (1.0, 3.0):
        of_teacher = Speeds(teacher, Serving(1, 32), RUNTIME, tmp_path / f"{slower}-teacher.jsonl")
        monkeypatch.setattr("minitron.nas.speed.measure_speed", Pretended())
        of_teacher.measure(teacher.arch)
        monkeypatch.setattr("minitron.nas.speed.measure_speed", Pretended(slower))
        monkeypatch.setattr("minitron.nas.speed.alternate", Pretended(slower).alternate)
        for reference in (of_teacher, None):
            path = tmp_path / f"{slower}-{reference is None}"
            with Speeds(teacher, Serving(1, 32), RUNTIME, path, reference) as speeds:
                shape_seconds = speeds.measure(teacher.arch.resized(**small))["prefill_seconds"]
            assert speeds._teacher_model is None
            seconds[slower, reference is None] = shape_seconds
    assert seconds[3.0, False] == pytest.approx(seconds[1.0, False]) == pytest.approx(seconds[1.0, True])
    assert seconds[3.0, True] == pytest.approx(3 * seconds[1.0, True])  # alone


def test_an_estimate_tells_embeddings_from_weights_of_layers(place: Path, tmp_path: Path) -> None:
    """In a prefill, weights of layers take time and embeddings take none; the control counts both equally."""
    session = Session(recipe(place, target_params=None, **{"budget.throughput": "1.1x", "budget.context": 32}))
    teacher, shapes = open_checkpoint(place / "model"), shapes_within(session)[0]
    speeds = Speeds(teacher, Serving(1, 32), RUNTIME, tmp_path / "speeds.jsonl")
    exact = {i: 1e-6 * shapes[i].num_non_embedding_parameters for i in range(0, len(shapes), max(1, len(shapes) // 40))}
    timed = list(exact)[::4]
    times = [{"prefill_seconds": exact[i], "decode_seconds": 1e-6 * shapes[i].num_parameters} for i in timed]
    write_jsonl(speeds.path, [{"sizes": dict(shapes[i].sizes), **row} for i, row in zip(timed, times, strict=True)])
    estimated = estimate(speeds, shapes)
    for i, seconds in exact.items():
        assert estimated["prefill_seconds"][i] == pytest.approx(seconds, rel=1e-6)
        assert estimated["decode_seconds"][i] == pytest.approx(1e-6 * shapes[i].num_parameters, rel=1e-6)
    shares = [shapes[i].num_parameters / exact[i] for i in exact]
    assert max(shares) > 1.1 * min(shares)


def test_speeds_are_measured_once_and_cached(place: Path, tmp_path: Path) -> None:
    teacher = open_checkpoint(place / "model")
    speeds = Speeds(teacher, Serving(1, 32), RUNTIME, tmp_path / "speeds.jsonl")
    small = teacher.arch.resized(num_hidden_layers=2)
    first = speeds.measure(small)
    assert speeds.measure(small) == first
    assert len((tmp_path / "speeds.jsonl").read_text().splitlines()) == 1
    other = Speeds(teacher, Serving(2, 32), RUNTIME, tmp_path / "speeds.jsonl")
    assert other.cached(small) is None


@pytest.mark.parametrize("teacher", MECHANISMS, indirect=True)
def test_every_mechanism_can_be_timed(teacher: Checkpoint) -> None:
    speed = measure_speed(load_model(teacher, CPU, torch.float32), batch=2, context=24)
    assert speed.prefill_seconds > 0
    assert speed.decode_seconds > 0
    assert speed.prefill_tokens_per_second == pytest.approx(48 / speed.prefill_seconds)


def test_candidates_of_hybrids_are_timed_with_layers_of_each_kind(tmp_path: Path) -> None:
    teacher = open_checkpoint(make_model(tmp_path / "model", "nemotron_h"))
    speeds = Speeds(teacher, Serving(1, 16), RUNTIME, tmp_path / "speeds.jsonl")
    assert speeds.measure(teacher.arch.resized(num_hidden_layers=5))["prefill_seconds"] > 0


def test_a_common_ranking_of_layers_splits_the_depth(place: Path, tmp_path: Path) -> None:
    """Of prune and of a search alike: eight layers of four kinds, two of each; the shape in proportion differs."""
    make_model(tmp_path / "model", "nemotron_h")
    (tmp_path / "text.txt").write_text((place / "text.txt").read_text())
    given = settings(tmp_path, **{"target_params": None, "search.distill_tokens": 0, "search.zero_shot": 2})
    calibrate(out=tmp_path / "stats", **given)
    scores = load_file(tmp_path / "stats" / "importance.safetensors")["layer"].tolist()
    kinds = open_checkpoint(tmp_path / "model").arch.layers
    best_first = sorted(range(8), key=lambda i: -scores[i])
    firsts = [next(i for i in best_first if kinds[i] == kind) for kind in set(kinds)]
    kept = sorted([*firsts, *[i for i in best_first if i not in firsts][:1]])  # five layers
    wanted = [kinds[i] for i in kept]

    def layers(ranking: str, **sizes: int) -> list[str]:
        out = tmp_path / f"out-{len(list(tmp_path.iterdir()))}"
        arguments: dict[str, Any] = {**given, "depth.ranking": ranking, **sizes}
        prune(out=out, importance=tmp_path / "stats", **arguments)
        return list(open_checkpoint(out).arch.layers)

    assert layers("together", num_hidden_layers=5) == wanted != layers("within_kinds", num_hidden_layers=5)
    of_three = layers("together", num_hidden_layers=5, num_attention_layers=2)
    assert (len(of_three), of_three.count("attention")) == (5, 2)
    whole = {"hidden_size": [48], "num_attention_heads": [6], "num_key_value_heads": [3], "intermediate_size": [64],
             "mamba_num_heads": [6], "mamba_head_dim": [8], "num_local_experts": [4], "moe_intermediate_size": [24],
             "moe_shared_expert_intermediate_size": [40]}  # fmt: skip
    depth = {"search.space": whole | {"num_hidden_layers": [5]}, "target_params": "10k..100k"}
    for ranking, is_ranked in (("together", True), ("within_kinds", False)):
        found = search(out=tmp_path / ranking, **given | depth | {"depth.ranking": ranking})
        counts = {f"num_{kind}_layers": wanted.count(kind) for kind in kinds}
        assert (counts.items() <= found.arch.sizes.items()) == is_ranked
        # A shape that the recipe states, without a search.
        session = Session(recipe_from(None, **given, **{"depth.ranking": ranking, "shape": {"num_hidden_layers": 5}}))
        shapes, budget = shapes_within(session)
        stated = nas.search(session, load_file(tmp_path / "stats" / "importance.safetensors"), shapes, budget, tmp_path)
        assert (counts.items() <= stated.sizes.items()) == is_ranked


def test_the_plot_shows_each_candidate_and_marks_the_chosen(place: Path) -> None:
    rows, summary = rows_of(place / "found"), json.loads((place / "found" / "search.json").read_text())
    svg = side_by_side(draw_candidates(rows, summary)).svg()
    assert svg == (place / "found" / "candidates.svg").read_text()
    assert svg.count("<circle") == 10 + 4 + 2 * 2  # untrained; by size; in the legends
    assert svg.count('r="6"') == 2 + 2
    in_turn = {**summary, "teacher_speed": {"prefill_seconds": 1.0, "decode_seconds": 1.0}}
    svg = side_by_side(draw_candidates(rows, in_turn)).svg()
    assert svg.count("<circle") == 10 + 4 + 4 + 3 * 2  # as well by speed
    assert svg.count('r="6"') == 3 + 3
    rows[0]["arch"]["hidden_size"] = "<script>"
    svg = side_by_side(draw_candidates(rows, summary)).svg()
    assert "&lt;script&gt;" in svg
    assert "<script>" not in svg


QUICK = {"search.zero_shot": 4, "search.shortlist": 1, "search.probe_tokens": 0, "search.distill_tokens": 0}


@pytest.fixture(scope="module")
def series(place: Path) -> Path:
    compress_series(recipe(place, target_params="0.85,0.7,0.55", **QUICK), place / "series")
    return place / "series"


def test_each_member_of_a_series_is_cut_out_of_the_next_larger_one(series: Path, place: Path) -> None:
    assert {path.name for path in series.iterdir()} == {
        "0.85", "0.7", "0.55", "run.json", "report.html", "teacher.json"
    }  # fmt: skip
    archs = [open_checkpoint(series / name / "student").arch for name in ("0.85", "0.7", "0.55")]
    teacher = open_checkpoint(place / "model").arch
    for larger, smaller, share in zip([teacher, *archs], archs, (0.85, 0.7, 0.55), strict=False):
        larger.require_prunable_to(smaller)
        assert share * 0.95 <= smaller.num_parameters / teacher.num_parameters <= share
    record = json.loads((series / "0.7" / "run.json").read_text())
    assert record["sources"]["larger"] == open_checkpoint(series / "0.85" / "student").fingerprint()
    assert record["sources"]["teacher"] == open_checkpoint(place / "model").fingerprint()
    steps = [(step["step"], step.get("of")) for step in history_of(series / "0.7" / "student").steps]
    larger_student = str(series / "0.85" / "student")
    assert steps == [("prune", str(place / "model")), ("distill", None), ("prune", larger_student), ("distill", None)]
    assert "| cut from | 0.85/student, " in (series / "0.7" / "student" / "README.md").read_text()
    assert "0.85/student" not in (series / "0.85" / "student" / "README.md").read_text()
    page = (series / "report.html").read_text()
    assert "once" in page
    assert '<a href="0.55/report.html">' in page


def test_a_member_starts_from_the_larger_one(series: Path, place: Path) -> None:
    """The pruned model of a member is a cut of the larger student, not of the teacher."""
    pruned, larger = open_checkpoint(series / "0.7" / "pruned"), open_checkpoint(series / "0.85" / "student")
    norms = [name for name in pruned.tensors if name.endswith("post_attention_layernorm.weight")]
    assert norms
    values = settings(place, teacher=series / "0.85" / "student", target_params=None)
    prune(out=place / "by-hand", arch=series / "0.7" / "arch.json", overwrite=True, **values)
    by_hand = open_checkpoint(place / "by-hand")
    assert by_hand.arch.num_parameters == pruned.arch.num_parameters < larger.arch.num_parameters
    assert all(torch.equal(by_hand.tensor(name), pruned.tensor(name)) for name in pruned.tensors)


def test_a_finished_member_is_not_made_again(series: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in series.rglob("student/*")}
    monkeypatch.setattr("minitron.series.take_stage", lambda *_, **__: pytest.fail("a member was made again"))
    compress_series(recipe(place, target_params="0.85,0.7,0.55", **QUICK), series)
    assert before == {path: path.stat().st_mtime_ns for path in series.rglob("student/*")}


def test_members_may_be_taught_by_the_larger_one(place: Path, tmp_path: Path) -> None:
    taught = recipe(place, target_params="0.85,0.7", **QUICK, **{"lineage.taught_by": "larger"})
    compress_series(taught, tmp_path / "series")
    record = json.loads((tmp_path / "series" / "0.7" / "run.json").read_text())
    assert record["sources"]["teacher"] == open_checkpoint(tmp_path / "series" / "0.85" / "student").fingerprint()
    student = open_checkpoint(tmp_path / "series" / "0.7" / "student")
    whole = open_checkpoint(place / "model").arch.num_parameters
    assert 0.66 * whole <= student.arch.num_parameters <= 0.7 * whole


def test_members_must_get_smaller(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="each member must be smaller than the one before"):
        compress_series(recipe(place, target_params="0.6,0.7"), tmp_path / "series")
    with pytest.raises(UserError, match="make a series of students, which is what compress does"):
        search(out=tmp_path / "s", **settings(place, target_params="0.7,0.6"))
    assert not list(tmp_path.iterdir())


def test_compress_searches_too(place: Path, tmp_path: Path) -> None:
    pipeline.compress(recipe(place), tmp_path / "run")
    assert without_speeds(rows_of(tmp_path / "run")) == without_speeds(rows_of(place / "found"))
    assert (
        "KL to the teacher in nats per token: untrained on 64 held-out tokens"
        in (tmp_path / "run" / "report.html").read_text()
    )
