"""Measures the speed of shapes on this device, once per shape, on random weights."""

import platform
import statistics
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from minitron.evaluation.speed import alternate, measure_speed
from minitron.files import read_jsonl, write_jsonl
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint
from minitron.model.language_model import random_model
from minitron.nas.budget import SPEEDS, Serving, has_speed_limits
from minitron.runtime import Runtime
from minitron.session import Session

NUM_TURNS = 5
"""How many times a shape and the teacher are timed in turn, after one turn to warm up."""


@dataclass
class Speeds:
    """The speeds of shapes of one model for one way of serving, cached in the jsonl file `path`.

    With `reference`, the speeds of a teacher, every shape is timed in turn with that teacher, and its seconds are
    scaled to those that the teacher itself took when it was measured: how fast a machine is changes from one shape to
    the next. As a context manager, it releases the teacher's model after the block.
    """

    source: Checkpoint
    serving: Serving
    runtime: Runtime
    path: Path
    reference: "Speeds | None" = None
    _teacher_model: Any = field(default=None, init=False, repr=False)

    @classmethod
    def of(cls, session: Session, work: Path) -> "Speeds":
        """Return the speeds that a search needs, with their files in `work`.

        Shapes are timed in turn with the teacher only where the budget limits speed; elsewhere speed decides ties.
        """
        budget, runtime = session.recipe.budget, session.runtime
        if not has_speed_limits(session):
            return cls(session.source, Serving(1, session.context), runtime, work / "speeds.jsonl")
        serving = Serving(budget.batch, budget.context, budget.dtype)
        reference = cls(session.teacher, serving, runtime, work / "teacher-speed.jsonl")
        return cls(session.source, serving, runtime, work / "speeds.jsonl", reference)

    def __enter__(self) -> "Speeds":
        return self

    def __exit__(self, *_: object) -> None:
        self._teacher_model = None

    def measure(self, arch: Arch) -> dict[str, float]:
        """Return the figures of `SPEEDS` for a shape, in seconds, cached or measured now."""
        if cached := self.cached(arch):
            return cached
        model = random_model(self.source, arch, self.runtime)
        if self.reference is None:
            speed = measure_speed(model, self.serving.batch, self.serving.context)
            seconds = {name: float(getattr(speed, name)) for name in SPEEDS}
        else:
            seconds = self._measure_in_turn(model, self.reference)
        write_jsonl(self.path, [*read_jsonl(self.path), self._key(arch) | seconds])
        return seconds

    def _measure_in_turn(self, model: Any, reference: "Speeds") -> dict[str, float]:
        if self._teacher_model is None:
            self._teacher_model = random_model(reference.source, reference.source.arch, self.runtime)
        models = {"shape": model, "teacher": self._teacher_model}
        speeds = alternate(models, self.serving.batch, self.serving.context, NUM_TURNS)
        pairs = list(zip(speeds["shape"], speeds["teacher"], strict=True))
        of_teacher = reference.measure(reference.source.arch)
        return {
            name: of_teacher[name] * statistics.median(getattr(a, name) / getattr(b, name) for a, b in pairs)
            for name in SPEEDS
        }

    def cached(self, arch: Arch) -> dict[str, float] | None:
        """Return the figures of `SPEEDS` for a shape if they were measured before under these conditions."""
        key = self._key(arch)
        rows = [row for row in read_jsonl(self.path) if all(row[name] == value for name, value in key.items())]
        return {name: rows[0][name] for name in SPEEDS} if rows else None

    @property
    def of_teacher(self) -> dict[str, float] | None:
        """The speed of the teacher that shapes are timed in turn with; None where there is no such teacher."""
        return self.reference.cached(self.reference.source.arch) if self.reference else None

    def _key(self, arch: Arch) -> dict[str, Any]:
        return {
            "sizes": dict(arch.sizes),
            "batch": self.serving.batch,
            "context": self.serving.context,
            **self.conditions,
        }

    @cached_property
    def conditions(self) -> dict[str, str]:
        """The device and the dtype that speeds are measured with."""
        device = self.runtime.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
        return {
            "device": f"{device.type} ({name}, {torch.get_num_threads()} threads)",
            "dtype": self.runtime.dtype_name,
        }
