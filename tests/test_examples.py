"""The examples run as they stand, on a tiny teacher in the place of SmolLM2."""

import json
import re
import runpy
from collections.abc import Iterator
from pathlib import Path

import pytest

import minitron
from tests.conftest import make_model

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples")
    make_model(folder / "model", "llama-tied")
    text = (f"{i} times {i} is {i * i}, and {i} plus {i} is {i + i}." for i in range(300))
    (folder / "text.txt").write_text("\n".join(text))
    return folder


@pytest.fixture
def with_progress() -> Iterator[None]:
    yield
    minitron.enable_progress()


def test_the_whole_job(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    out = place / "run"
    monkeypatch.setattr("sys.argv", ["whole_job.py", str(place / "model"), str(out), str(place / "text.txt")])
    fewer = {"context": 32, "search.tokens": 128, "search.probe_tokens": 64, "search.distill_tokens": 128,
             "distill.tokens": 256, "calibration.tokens": 256, "evaluation.tokens": 128}  # fmt: skip
    compress = minitron.compress
    monkeypatch.setattr(minitron, "compress", lambda *given, **settings: compress(*given, **settings | fewer))
    runpy.run_path(str(EXAMPLES / "whole_job.py"), run_name="__main__")
    printed = capsys.readouterr().out
    figures = json.loads((out / "eval.json").read_text())
    assert f"{figures['student']['num_parameters']:,} parameters in {out / 'student'}" in printed
    assert "perplexity" in printed


@pytest.mark.usefixtures("with_progress")
def test_the_notebook(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = json.loads((EXAMPLES / "step_by_step.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] for cell in notebook["cells"][4:-1] if cell["cell_type"] == "code"), "executed"
    names: dict[str, object] = {}
    exec(cells[0], names)
    tiny = {"teacher": str(place / "model"), "data": str(place / "text.txt"), "context": 32, "tokens": 256}
    names.update(tiny, widths={"hidden_size": 32, "intermediate_size": 48})
    for cell in cells[1:]:
        exec(cell, names)
    pruned, student = names["pruned"], names["student"]
    assert "<table>" in pruned._repr_html_()  # type: ignore[attr-defined]
    assert (student.student / "model.safetensors").exists()  # type: ignore[attr-defined]


def test_a_loss_of_your_own(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "custom_loss.py"), run_name="__main__")
    before, after = ([float(number) for number in re.findall(r"KL ([\d.]+)", line)]
                     for line in capsys.readouterr().out.splitlines())  # fmt: skip
    assert after[0] < 0.5 * before[0]
    assert after[1] < before[1]
