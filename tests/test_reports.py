"""Tests pictures and pages on small inputs: hybrids, runs that are not finished, comparisons, and hostile names."""

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from minitron.errors import UserError
from minitron.model.checkpoint import open_checkpoint
from minitron.reports.charts import draw_curves, draw_shape
from minitron.reports.figures import figures_table
from minitron.reports.html import write_comparison, write_report
from minitron.reports.svg import Picture, Plot
from tests.conftest import make_model

HOSTILE = "<script>alert('&')</script>"


def elements(picture: Picture, name: str) -> list[ElementTree.Element]:
    """Return the elements of a picture of one name; a picture that is not well-formed XML raises."""
    return ElementTree.fromstring(picture.svg()).findall(f"{{http://www.w3.org/2000/svg}}{name}")


@pytest.mark.parametrize("variant", ["llama-tied", "nemotron_h"])
def test_removed_layers_are_hollow(variant: str, tmp_path: Path) -> None:
    teacher = open_checkpoint(make_model(tmp_path / "model", variant)).arch
    depth = teacher.axis_size("layer")
    kept = list(range(depth - 1))
    student = teacher.resized(hidden_size=teacher.sizes["hidden_size"] // 2)
    picture = draw_shape(teacher, student, kept)
    assert len(elements(draw_shape(teacher, student, list(range(depth))), "rect")) > len(elements(picture, "rect"))
    assert any(rect.get("stroke-dasharray") == "3 3" for rect in elements(picture, "rect"))
    texts = [text.text for text in elements(picture, "text")]
    assert f"{student.sizes['hidden_size']} of {teacher.sizes['hidden_size']}" in texts
    assert draw_shape(teacher, student, None).width < picture.width  # without layers


def test_curves() -> None:
    rows: list[dict[str, Any]] = [{"tokens": 0, "heldout_perplexity": 9000.0}, {"tokens": 10, "loss": 2.0}]
    rows += [{"tokens": 20, "loss": 1.5, "heldout_perplexity": 40.0}, {"tokens": 40, "heldout_perplexity": 30.0}]
    loss, perplexity = draw_curves({HOSTILE: rows, "other": rows[1:]}, resumed_at=[10.0])
    assert len(elements(perplexity, "circle")) == 2 * 2  # the perplexity before training would flatten the rest
    assert [line.get("stroke-dasharray") for line in elements(loss, "polyline")].count("2 3") == 1
    assert HOSTILE in [text.text for text in elements(loss, "text")]
    assert draw_curves({"empty": []}) == []


def test_axes_have_ticks_within_their_range() -> None:
    for high in (1.003, 1.5, 7.0, 80.0, 3e4, 2e7):
        plot = Plot((0.0, high), (1.0, high), has_log_y=True)
        texts = [text for text in elements(plot.picture("", "", ""), "text") if text.text and text.text[0].isdigit()]
        assert len(texts) > 4
        assert plot.place(0.0, 1.0) == (plot.left, plot.top + plot.height)
        assert plot.place(high, high) == (plot.left + plot.width, plot.top)


@pytest.mark.parametrize("speed_up", [None, {"median": 1.234, "low": 1.18, "high": 1.31, "turns": 5}])
def test_speeds_are_compared_where_they_were_taken_in_turn(tmp_path: Path, speed_up: dict[str, float] | None) -> None:
    figures: dict[str, Any] = {"num_parameters": 4, "num_non_embedding_parameters": 2, "num_tokens": 9, "context": 9}
    figures |= {"perplexity": 2.0, "bits_per_byte": 1.0, "tokens_per_second": 123.0}
    student = {**figures, "tokens_per_second": 971.0} | ({"speed_up": speed_up} if speed_up else {})
    results: dict[str, Any] = {"teacher": figures, "pruned": figures, "student": student}
    text = str(figures_table(results))
    assert ("speed-up" in text) == (speed_up is not None)
    assert ("1.23× (1.18–1.31)" in text) == (speed_up is not None)
    assert "971" not in text
    assert "7.89" not in text
    record = {"recipe": {"teacher": "t", "data": "wiki"}, "seed": 0, "sources": {}, "stages": {}}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(json.dumps(record))
        (tmp_path / name / "eval.json").write_text(json.dumps(results))
    write_comparison([tmp_path / "one", tmp_path / "two"], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert ("speed-up over its own teacher" in page) == (speed_up is not None)
    assert "971" not in page


def test_runs_that_are_not_finished_are_reported_and_compared(tmp_path: Path) -> None:
    stages = {"calibrate": {"state": "running", "seconds": 1.0}}
    record = {"recipe": {"teacher": HOSTILE, "data": "wiki"}, "seed": 0, "sources": {}, "stages": stages}
    for name in ("one/run", "two/run"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "run.json").write_text(json.dumps(record))
    write_report(tmp_path / "one" / "run")
    page = (tmp_path / "one" / "run" / "report.html").read_text()
    assert "under way" in page
    assert "calibrate" in page
    assert HOSTILE not in page
    write_comparison([tmp_path / "one" / "run", tmp_path / "two" / "run"], tmp_path / "page.html")
    assert "<h3>two/run</h3>" in (tmp_path / "page.html").read_text()
    with pytest.raises(UserError, match="given twice"):
        write_comparison([tmp_path / "one" / "run"] * 2, tmp_path / "page.html")
    with pytest.raises(UserError, match="is not a run directory"):
        write_report(tmp_path)
