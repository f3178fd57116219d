"""Records the figures of a training: always in `metrics.jsonl`, on request in TensorBoard and Weights & Biases."""

import importlib.util
import json
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from minitron.errors import UserError, courtesy
from minitron.files import read_jsonl, write_jsonl
from minitron.runtime import World

Row = dict[str, Any]
METRICS = "metrics.jsonl"


class Metrics:
    """Appends one row per step to `metrics.jsonl`; a resumed training drops the rows after its checkpoint.

    A tracker that fails is left out from then on, with a warning.
    """

    def __init__(
        self, work: Path, step: int, trackers: tuple[str, ...], world: World, start: Sequence[Row] = ()
    ) -> None:
        """`start` are rows of figures before the first step, which the rows so far lack."""
        self.path, self.is_main = work / METRICS, world.is_main
        self.rows = [row for row in read_jsonl(self.path) if row["step"] <= step]
        self.trackers: dict[str, Callable[[Row], None]] = {}
        for name in trackers if world.is_main else ():
            with courtesy(f"distill.trackers: curves in {name}"):
                self.trackers[name] = TRACKERS[name](work)
        self.rows = [*({"step": 0, "tokens": 0, **figures} for figures in start), *self.rows]
        for row in self.rows[: len(start)]:
            self._track(row)
        if self.is_main:
            write_jsonl(self.path, self.rows)

    def add(self, **row: Any) -> None:
        """Append a row."""
        self.rows.append(row)
        if self.is_main:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        self._track(row)

    def _track(self, row: Row) -> None:
        for name, track in list(self.trackers.items()):
            del self.trackers[name]
            with courtesy(f"distill.trackers: further curves in {name}"):
                track(row)
                self.trackers[name] = track

    def last(self, name: str) -> Any:
        """Return the entry of a name in the last row that has it, or None."""
        return next((row[name] for row in reversed(self.rows) if name in row), None)

    @property
    def num_skipped_last(self) -> int:
        """The number of steps skipped since the last step that was taken."""
        return sum(1 for _ in takewhile(lambda row: "skipped" in row, reversed(self.rows)))

    def in_words(self) -> str:
        """Return the last held-out perplexity and the number of skipped steps, as text for the progress line."""
        perplexities = [row["heldout_perplexity"] for row in self.rows if "heldout_perplexity" in row]
        num_skipped = sum("skipped" in row for row in self.rows)
        skipped = f" · {num_skipped} steps skipped" if num_skipped else ""
        return f"{f' · held-out perplexity {perplexities[-1]:.2f}' if perplexities else ''}{skipped}"


def is_measured(work: Path) -> bool:
    """Return whether a `metrics.jsonl` has figures before the first step."""
    return any(row["step"] == 0 for row in read_jsonl(work / METRICS))


def require_trackers(names: tuple[str, ...]) -> None:
    """Check that trackers are installed, without importing them.

    Raises:
        UserError: one is not.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UserError(f"distill.trackers: {name} is not installed: pip install {name}")


def _tensorboard(work: Path) -> Callable[[Row], None]:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(work / "tensorboard"))

    def track(row: Row) -> None:
        for name, value in _figures(row).items():
            writer.add_scalar(name, value, row["step"])
        if "sample" in row:
            writer.add_text("sample", row["sample"], row["step"])
        writer.flush()

    return track


def _wandb(work: Path) -> Callable[[Row], None]:
    import wandb

    run = wandb.init(project="minitron", dir=str(work))
    return lambda row: run.log(_figures(row), step=row["step"])


def _figures(row: Row) -> dict[str, float]:
    return {name: value for name, value in row.items() if isinstance(value, (int, float)) and name != "step"}


TRACKERS: dict[str, Callable[[Path], Callable[[Row], None]]] = {"tensorboard": _tensorboard, "wandb": _wandb}
