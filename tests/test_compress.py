"""The main job on a tiny model: its result, its files, and that a killed run continues to the same bits."""

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from minitron import pipeline
from minitron.data.packing import Packing, read_blocks
from minitron.data.tokens import load_tokenizer
from minitron.evaluation.speed import Speed
from minitron.model.checkpoint import open_checkpoint
from minitron.nas import speed
from minitron.recipe import CUT_ONLY, Recipe, load_recipe, validate
from minitron.reports.figures import figures_table
from minitron.reports.html import write_report
from minitron.runtime import Runtime
from minitron.session import Session
from minitron.verbs.bench import bench
from minitron.verbs.evaluate import evaluate, evaluate_tasks
from tests.conftest import MECHANISMS, make_model
from tests.processes import exit_code, kill_in, start

LAYOUT = {
    "teacher", "calibration.safetensors", "importance.safetensors", "candidates.jsonl", "arch.json",
    "search.json", "pruned", "student", "metrics.jsonl", "eval.json", "report.html", "run.json",
}  # fmt: skip


def recipe(teacher: Path, text: Path, **changes: Any) -> Recipe:
    values = {
        "teacher": str(teacher), "data": str(text), "target_params": 0.6, "context": 32, "device": "cpu",
        "calibration.tokens": 512, "search.tokens": 128, "search.shortlist": 3, "distill.tokens": 1024,
        "search.distill_tokens": 256, "search.probe_tokens": 0, "search.zero_shot": 8, "search.zero_shot_tokens": 64,
        "distill.batch_size": 2, "distill.learning_rate": 1e-3, "distill.checkpoint_seconds": 0.0,
        "evaluation.tokens": 256, **changes,
    }  # fmt: skip
    return load_recipe(None, values)


QUICK = {"search.distill_tokens": 0, "search.zero_shot": 4, "search.shortlist": 1, "distill.tokens": 256}
"""Changes of the recipe for a run whose search and training are not looked at."""


def equal_speed(model: Any, batch: int, context: int) -> Speed:
    """Pretend that all shapes are equally fast: speed decides ties, and two measurements of it differ."""
    return Speed(1.0, 1.0, batch, context)


@pytest.fixture(scope="module", autouse=True)
def equal_speeds() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minitron.nas.speed.measure_speed", equal_speed)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, with its teacher and text beside it."""
    folder = tmp_path_factory.mktemp("compress")
    teacher = make_model(folder / "model", "qwen3-tied")
    text = folder / "text.txt"
    text.write_text("\n".join(f"{i} times {i} is {i * i}, and {i} plus {i} is {i + i}." for i in range(1500)))
    pipeline.compress(recipe(teacher, text), folder / "run")
    return folder


def text_settings(made: Path) -> dict[str, Any]:
    return {"data": str(made / "text.txt"), "context": 32, "device": "cpu"}


def test_the_run_directory_is_as_drawn(made: Path) -> None:
    assert {path.name for path in (made / "run").iterdir()} == LAYOUT
    record = json.loads((made / "run" / "run.json").read_text())
    assert {stage["state"] for stage in record["stages"].values()} == {"done"}
    assert set(record["sources"]) == {"teacher", "data"}
    assert record["seed"] == 0
    assert "torch" in record["versions"]


def test_the_figures_are_those_of_the_files(made: Path) -> None:
    results = json.loads((made / "run" / "eval.json").read_text())
    assert list(results) == ["teacher", "pruned", "student"]
    teacher, student = (open_checkpoint(made / "run" / name).arch for name in ("teacher", "student"))
    assert results["teacher"]["num_parameters"] == teacher.num_parameters
    assert results["student"]["num_parameters"] == student.num_parameters
    assert 0.57 * teacher.num_parameters <= student.num_parameters <= 0.6 * teacher.num_parameters
    # The blocks are those of the run, by seed, context and tokens.
    again = evaluate(made / "run" / "student", max_tokens=256, **text_settings(made)).figures
    assert again["perplexity"] == results["student"]["perplexity"]
    assert again["bits_per_byte"] == results["student"]["bits_per_byte"]
    assert again["perplexity"] != pytest.approx(results["pruned"]["perplexity"])
    for name in ("pruned", "student"):
        against = {"against": made / "run" / "teacher", **text_settings(made)}
        compared = evaluate(made / "run" / name, max_tokens=256, **against).figures
        assert (compared["kl"], compared["top1"]) == (results[name]["kl"], results[name]["top1"])
    assert "kl" not in results["teacher"]
    assert results["pruned"]["kl"] != pytest.approx(results["student"]["kl"])
    row = next(row for row in figures_table(results) if row[0].startswith("KL"))
    compared_models = [results[name] for name in ("pruned", "student")]
    assert row[1:] == ["", *(f"{figures['kl']:.4g} ({figures['top1']:.1%})" for figures in compared_models)]
    for page in ("report.html", "student/README.md"):
        assert row[3] in (made / "run" / page).read_text()
    ratio = results["student"]["speed_up"]
    assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]


@pytest.mark.parametrize("free", [None, 0])
def test_the_speed_up_is_left_out_where_memory_does_not_hold_both_models(
    made: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, free: int | None
) -> None:
    monkeypatch.setattr(Runtime, "free_memory", free)
    run: Any = SimpleNamespace(path=lambda name: made / "run" / name)
    session = Session(validate(Recipe, json.loads((made / "run" / "run.json").read_text())["recipe"], "run.json"))
    assert (pipeline._speed_up(run, session) is None) == (free == 0)
    assert ("the speed-up is not measured" in caplog.text) == (free == 0)


@pytest.mark.filterwarnings("ignore")
def test_what_is_measured_of_a_run_later_is_in_its_report(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval")
    run = tmp_path / "run"
    shutil.copytree(made / "run", run, symlinks=True)
    items = [{"goal": f"count to {i}", "sol1": "one, two", "sol2": "two, one", "label": i % 2} for i in range(5)]
    (tmp_path / "piqa.validation.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    settings = text_settings(made)
    both = evaluate_tasks(run, ["piqa"], tasks_data_folder=str(tmp_path), **settings).figures
    assert json.loads((run / "tasks.json").read_text()) == both
    assert set(both["tasks"]) == set(both["teacher_tasks"]) == {"piqa"}
    teacher = evaluate_tasks(run / "teacher", ["piqa"], tasks_data_folder=str(tmp_path), **settings).figures
    assert teacher["tasks"] == both["teacher_tasks"]
    monkeypatch.setattr("minitron.evaluation.peak_memory.peak_memory", lambda *_: 2**20)  # a process for each model
    speeds = bench(run, context=[16], repeats=1, device="cpu").figures
    assert json.loads((run / "bench.json").read_text()) == {"transformers": speeds}
    assert speeds["run"] == str(run)
    against = evaluate(run, max_tokens=256, **settings).figures
    assert against["perplexity"] == json.loads((run / "eval.json").read_text())["student"]["perplexity"]
    assert against["kl"] > 0
    write_report(run)
    page = (run / "report.html").read_text()
    share = both["tasks"]["piqa"]["metrics"]["acc"] / both["teacher_tasks"]["piqa"]["metrics"]["acc"]
    assert f"<td>{share:.1%}</td>" in page
    assert "prefill tokens/s" in page
    assert "Benchmarks" not in (made / "run" / "report.html").read_text()


def test_distillation_brings_the_student_closer(made: Path, tmp_path: Path) -> None:
    # Without repair, which brings so small a random model to within the noise of its blocks.
    plain = recipe(made / "model", made / "text.txt", prune=CUT_ONLY.model_dump())
    pipeline.compress(plain, tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in rows if "loss" in row]
    assert len(losses) == 16
    assert sum(losses[-4:]) < sum(losses[:4])
    # The steps that the distillation took over from the trial of its shape were not measured.
    last_of_trial = max(row["step"] for row in rows if row.get("trial"))
    measured = [row["step"] for row in rows if "heldout_perplexity" in row]
    assert measured == [0, *(step for step in (3, 6, 10, 13, 16) if step > last_of_trial)]


def test_the_card_says_what_a_reader_needs(made: Path) -> None:
    card = (made / "run" / "student" / "README.md").read_text()
    arch = json.loads((made / "run" / "arch.json").read_text())
    for needed in ("library_name: transformers", f"{arch['intermediate_size']:,}", "perplexity", "AutoModelForCausalLM",
                   "seed 0", "blocks of 32 tokens"):  # fmt: skip
        assert needed in card


def test_the_report_states_how_depth_was_cut_and_what_the_papers_prefer(made: Path) -> None:
    run, depths = made / "run", []
    text = (run / "report.html").read_text()
    for name in ("teacher", "student"):
        depths.append(json.loads((run / name / "config.json").read_text())["num_hidden_layers"])
    removed = f"{depths[0] - depths[1]} of {depths[0]} layers were removed."
    assert (f"All {depths[0]} layers were kept." in text) == (depths[0] == depths[1])
    assert (removed in text) == (depths[0] > depths[1])
    assert "prefer cutting width to cutting depth in models of up to 15 B parameters" in text


def test_a_finished_run_repeats_nothing(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.stat().st_mtime_ns for path in (made / "run").rglob("*") if path.is_file()}
    monkeypatch.setattr("minitron.session.open_teacher", lambda _: pytest.fail("the teacher was opened again"))
    results = pipeline.compress(recipe(made / "model", made / "text.txt"), made / "run")
    assert results["student"]["perplexity"] > 1
    assert before == {path: path.stat().st_mtime_ns for path in (made / "run").rglob("*") if path.is_file()}


def compress_until_killed(stage: str, times: int, made: Path, out: Path) -> None:
    kill_in(stage, times, signal.SIGKILL)
    speed.measure_speed = equal_speed  # type: ignore[attr-defined]
    pipeline.compress(recipe(made / "model", made / "text.txt"), out)


# Each process continues what the one before left, and counts anew how often a stage advances.
KILLS = {
    "search": [("check teacher", 5), ("calibrate", 10), ("zero-shot", 5), ("candidate 2 of 3", 1), ("repair", 7)],
    "distill": [("distill", 1), ("distill", 8), ("distill", 5)],
    "evaluate": [("evaluate teacher", 3), ("evaluate student", 3)],
}


@pytest.mark.parametrize("part", KILLS)
def test_a_killed_run_continues_to_the_same_bits(made: Path, tmp_path: Path, part: str) -> None:
    for stage, times in KILLS[part]:
        log = tmp_path / "log"
        killed = start(compress_until_killed, stage, times, made, tmp_path / "run", log=log)
        assert exit_code(killed) == -signal.SIGKILL, (stage, log.read_text()[-2000:])
        assert not (tmp_path / "run" / "eval.json").exists() or stage.startswith("evaluate")
    path = tmp_path / "run" / "eval.json"
    measured = json.loads(path.read_text()) if path.exists() else {}
    assert list(measured) == (["teacher", "pruned"] if part == "evaluate" else [])
    results = pipeline.compress(recipe(made / "model", made / "text.txt"), tmp_path / "run")
    # With their speeds, which no second measurement repeats.
    assert {name: results[name] for name in measured} == measured
    whole_results = json.loads((made / "run" / "eval.json").read_text())
    for name in ("pruned", "student"):
        assert all(results[name][key] == whole_results[name][key] for key in ("kl", "top1", "perplexity"))
    assert {path.name for path in (tmp_path / "run").iterdir()} == LAYOUT
    whole, continued = (load_file(run / "student" / "model.safetensors") for run in (made / "run", tmp_path / "run"))
    assert set(whole) == set(continued)
    assert all(torch.equal(whole[name], continued[name]) for name in whole)
    metrics = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for run in (made / "run", tmp_path / "run")
    ]
    assert metrics[0] == metrics[1]


def test_another_seed_gives_other_bits(made: Path, tmp_path: Path) -> None:
    pipeline.compress(recipe(made / "model", made / "text.txt", seed=1), tmp_path / "run")
    whole, other = (load_file(run / "student" / "model.safetensors") for run in (made / "run", tmp_path / "run"))
    assert set(whole) != set(other) or any(
        whole[name].shape != other[name].shape or not torch.equal(whole[name], other[name]) for name in whole
    )


@pytest.mark.parametrize("variant", [*MECHANISMS[1:], "granite"])  # the divisor of logits is granite's
def test_a_family_goes_through(variant: str, tmp_path: Path, text_file: Path) -> None:
    teacher = make_model(tmp_path / "model", variant)
    # Candidates are trained as students are; one family stands for all in that.
    training = {"search.shortlist": 2, "search.distill_tokens": 128} if variant == "nemotron_h" else {}
    results = pipeline.compress(recipe(teacher, text_file, target_params=0.7, **QUICK | training), tmp_path / "run")
    student = open_checkpoint(tmp_path / "run" / "student")
    assert student.arch.num_parameters == results["student"]["num_parameters"]
    assert 0.66 * results["teacher"]["num_parameters"] <= student.arch.num_parameters
    # What transformers makes of the folder has the loss that was measured, its final soft-cap or divisor included.
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "student", local_files_only=True)
    blocks = read_blocks(str(text_file), Packing(load_tokenizer(teacher), 258, 32), 256)
    with torch.no_grad():
        nll = torch.stack([model(input_ids=ids[None], labels=ids[None]).loss for ids in blocks.ids]).mean()
    assert float(nll.exp()) == pytest.approx(results["student"]["perplexity"], rel=1e-3)
