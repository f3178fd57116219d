"""`benchmarks/on_gpu.sh` at tiny size: every part reports figures, or that it needs a GPU; a failure costs no other."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu_parts import PARTS
from benchmarks.on_gpu import NAMES, ROOT, Part, in_words, run_alone

FIGURES = {
    "teacher": {"num_parameters"},
    "loss": {"seconds", "loss"},
    "accuracy": {"relative_errors"},
    "step": {"seconds", "tokens_per_second", "flops_per_second"},
    "attention": {"perplexity", "tokens_per_second"},
    "fsdp": {"loss", "seconds"},
    "compress": {"seconds", "eval", "last_loss"},
    "search": {"seconds", "search", "arch"},
    "tests": {"passed"},
}
"""What the figures of each part hold."""
PEERS = {"liger-1024", "liger-256", "liger-compiled"}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the parts, with a teacher."""
    folder = tmp_path_factory.mktemp("work")
    PARTS["teacher"](Part("teacher", folder, is_tiny=True))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_every_part_reports(name: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]))
    if name != "teacher":
        PARTS[name](part := Part(name, work, is_tiny=True))
        assert name == "fsdp" or part.figures == json.loads((work / f"{name}.json").read_text())
        figures = part.figures
    else:
        figures = json.loads((work / "teacher.json").read_text())
    assert figures
    for figure in figures:
        assert {"name", "device", "dtype", "seed"} <= figure.keys()
        if figure["name"] in PEERS and "No module named 'liger_kernel'" in figure.get("error", ""):
            continue
        assert "error" not in figure, figure
        assert figure.get("needs") == "a GPU" or figure.keys() >= FIGURES[name], figure
    assert any(figure.keys() >= FIGURES[name] for figure in figures)
    {"fsdp": of_fsdp, "accuracy": of_accuracy, "tests": of_tests}.get(name, lambda _: None)(figures)


def of_fsdp(figures: list[dict[str, Any]]) -> None:
    one, sharded = figures
    assert sharded["gradient_error"] < 1e-6
    assert sharded["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert sharded["checkpoint_is_read"]


def of_accuracy(figures: list[dict[str, Any]]) -> None:
    errors = {each["name"]: each["relative_errors"]["gradient by states"] for each in figures}
    assert errors["minitron"] < errors["minitron, as on CUDA"] < errors["logits in bfloat16"] < math.inf


def of_tests(figures: list[dict[str, Any]]) -> None:
    assert figures[0]["passed"] > 0
    assert not figures[0]["failed"]


def test_a_figure_that_fails_costs_no_other(tmp_path: Path) -> None:
    part = Part("loss", tmp_path, is_tiny=True)
    for name in ("one", "two"):
        with part.figure(name) as row:
            row["seconds"] = 1 / (name == "two")
    one, two = json.loads((tmp_path / "loss.json").read_text())
    assert one["error"] == "ZeroDivisionError: division by zero"
    assert two["seconds"] == 1
    assert in_words({"figures": [one, two], "seconds": 1.0}) == "2 figures in 1 s; failed: one"


def test_a_part_that_takes_too_long_leaves_its_figures(tmp_path: Path) -> None:
    (tmp_path / "loss.json").write_text('[{"name": "measured before"}]')
    row = run_alone("loss", 0.2, tmp_path, is_tiny=True)
    assert row["error"] == "took longer than 0.2 seconds"
    assert row["figures"] == [{"name": "measured before"}]


def test_the_script_writes_one_file(tmp_path: Path) -> None:
    given = ["--tiny", "--parts", "attention"]  # without the teacher that it reads: it fails, and says so
    environment = os.environ | {"PYTHON": sys.executable}
    command = [str(ROOT / "benchmarks" / "on_gpu.sh"), str(tmp_path / "out.json"), *given]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["versions"]["torch"]
    assert report["is_tiny"]
    assert "ended with 1" in report["parts"]["attention"]["error"]
    limits = (ROOT / "benchmarks" / "on_gpu.sh").read_text().rpartition("--limits")[2]
    assert re.findall(r"(\w+)=\d+", limits) == list(NAMES)
