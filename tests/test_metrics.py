"""What a run writes down, and where else it goes if asked."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minitron.data.packing import Packing, pack
from minitron.data.tokens import load_tokenizer
from minitron.distillation.metrics import Metrics, require_trackers
from minitron.errors import UserError
from minitron.evaluation.generation import greedy_continuation
from minitron.model.checkpoint import Checkpoint
from minitron.model.language_model import load_model
from minitron.runtime import World
from tests.conftest import byte_tokenizer

ROWS: list[dict[str, Any]] = [
    {"step": 0, "tokens": 0, "heldout_perplexity": 9.5, "sample": "words"},
    {"step": 1, "tokens": 8, "skipped": "loss nan, gradient 1.0"},
    {"step": 2, "tokens": 16, "loss": 0.5, "learning_rate": 0.1},
]


def test_rows_are_appended_and_those_after_a_checkpoint_dropped(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, 0, (), World())
    for row in ROWS:
        metrics.add(**row)
    assert metrics.in_words() == " · held-out perplexity 9.50 · 1 steps skipped"
    again = Metrics(tmp_path, 1, (), World())
    assert again.num_skipped_last == 1
    again.add(**ROWS[2])
    assert again.num_skipped_last == 0
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == ROWS
    Metrics(tmp_path, 0, (), World(1, 2)).add(**ROWS[0])
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_trackers_get_the_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            seen.append(folder)

        def add_scalar(self, *given: Any) -> None:
            seen.append(given)

        def add_text(self, *given: Any) -> None:
            seen.append(given)

        def flush(self) -> None:
            pass

    run = SimpleNamespace(log=lambda figures, step: seen.append((figures, step)))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **_: run))
    Metrics(tmp_path, 0, ("tensorboard", "wandb"), World()).add(**ROWS[0])
    assert seen == [
        str(tmp_path / "tensorboard"), ("tokens", 0, 0), ("heldout_perplexity", 9.5, 0), ("sample", "words", 0),
        ({"tokens": 0, "heldout_perplexity": 9.5}, 0),
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    require_trackers(("json",))
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=f"{name} is not installed: pip install {name}"):
        require_trackers((name,))


@pytest.mark.parametrize("num_rows", [0, 1, 2])
def test_a_tracker_that_fails_is_left_out_with_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, num_rows: int
) -> None:
    seen: list[int] = []

    def log(figures: dict[str, float], step: int) -> None:
        if len(seen) == num_rows - 1:
            raise ConnectionError("no route to host")
        seen.append(step)

    def init(**_: Any) -> SimpleNamespace:
        if num_rows == 0:
            raise ConnectionError("no route to host")
        return SimpleNamespace(log=log)

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    metrics = Metrics(tmp_path, 0, ("wandb",), World())
    for row in ROWS:
        metrics.add(**row)
    assert seen == list(range(num_rows - 1))
    assert [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == ROWS
    assert caplog.text.count("in wandb could not be made: no route to host") == 1


def test_a_continuation_is_the_likeliest_one(teacher: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitron.evaluation.generation.CONTINUATION_TOKENS", 4)
    ids = expected = pack(["some words " * 9], Packing(byte_tokenizer(), 258, 8), 1).ids
    model, tokenizer = load_model(teacher, torch.device("cpu"), torch.float32), load_tokenizer(teacher.folder)
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        for _ in range(4):
            expected = torch.cat([expected, model(expected).logits[:, -1:].argmax(dim=-1)], dim=1)
    assert greedy_continuation(model, tokenizer, ids) == tokenizer.decode(expected[0].tolist())
