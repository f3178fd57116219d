"""What speed a shape has on this device: measured once on random weights and remembered, or estimated from those."""

import platform
import statistics
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from minitron.errors import UserError
from minitron.evaluation.speed import alternate, measure_speed
from minitron.files import read_jsonl, write_jsonl
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint, student_config
from minitron.nas.budget import SPEEDS, Serving
from minitron.nas.shapes import Shapes

Array = NDArray[np.float64]
TURNS = 5
"""How often a shape and the teacher are timed in turn, each once more to warm up."""


@dataclass
class Speeds:
    """Speeds of shapes of one teacher for one way of serving; `path` is the jsonl file that remembers them.

    With `beside`, speeds of a teacher, every shape is timed in turn with that teacher. Its seconds are then those that
    it would have taken when the teacher itself was timed: how fast a machine is changes from one shape to the next.
    """

    teacher: Checkpoint
    serving: Serving
    device: torch.device
    dtype: torch.dtype
    path: Path
    beside: "Speeds | None" = None

    def __call__(self, arch: Arch) -> dict[str, float]:
        """The figures of `SPEEDS`, in seconds, of a shape."""
        if known := self.remembered(arch):
            return known
        model = self._on_random_weights(arch)
        if self.beside is None:
            speed = measure_speed(model, self.serving.batch, self.serving.context)
            found = {name: getattr(speed, name) for name in SPEEDS}
        else:
            found = self._in_turn(model, self.beside)
        write_jsonl(self.path, [*read_jsonl(self.path), self._key(arch) | found])
        return found

    def _in_turn(self, model: Any, beside: "Speeds") -> dict[str, float]:
        models = {"shape": model, "teacher": beside.own}
        turns = alternate(models, self.serving.batch, self.serving.context, TURNS)
        pairs, seconds = list(zip(turns["shape"], turns["teacher"], strict=True)), beside(beside.teacher.arch)
        return {
            name: seconds[name] * statistics.median(getattr(a, name) / getattr(b, name) for a, b in pairs)
            for name in SPEEDS
        }

    @cached_property
    def own(self) -> Any:
        """The teacher itself, on random weights, kept until it is forgotten."""
        return self._on_random_weights(self.teacher.arch)

    def forget(self) -> None:
        """Let go of the teacher that others were timed in turn with."""
        self.__dict__.pop("own", None)

    def remembered(self, arch: Arch) -> dict[str, float] | None:
        """The same if they have been measured before."""
        key = self._key(arch)
        rows = [row for row in read_jsonl(self.path) if all(row[name] == value for name, value in key.items())]
        return {name: rows[0][name] for name in SPEEDS} if rows else None

    def estimated(self, shapes: Shapes) -> dict[str, Array]:
        """The same of many shapes, (n,) each, from a fit through all that have been measured.

        Time is a sum of five parts, each with a factor that is not negative: what does not depend on the shape, what
        every layer takes, every multiplication with a weight of a layer, every one between tokens of the context, and
        what embeddings take, which a prefill multiplies with the last token alone.

        Raises:
            UserError: too few have been measured to say.
        """
        rows = read_jsonl(self.path)
        archs = [self.teacher.arch.resized(**row["sizes"]) for row in rows]
        sizes = {name: np.array([arch.sizes[name] for arch in archs]) for name in self.teacher.arch.sizes}
        measured = Shapes(self.teacher.arch, sizes, {"num_active_parameters": np.array(
            [arch.num_active_parameters for arch in archs])})  # fmt: skip
        if len(rows) < 2:
            raise UserError("the speed of too few shapes has been measured to estimate others")
        known, wanted = self._parts(measured), self._parts(shapes)
        return {name: wanted @ _fitted(known, np.array([row[name] for row in rows])) for name in SPEEDS}

    def _parts(self, shapes: Shapes) -> Array:
        """(n, 5)."""
        teacher = self.teacher.arch
        size = {**teacher.sizes, **shapes.sizes}
        layers = np.asarray(size["num_hidden_layers"], dtype=float)
        heads = np.asarray(size.get("num_attention_heads", 0), dtype=float) * size.get("head_dim", 0)
        embeddings = np.asarray(teacher.count_grid(size) - teacher.count_grid(size, without="vocab"), dtype=float)
        active = np.asarray(shapes.figures["num_active_parameters"], dtype=float) - embeddings
        parts = np.broadcast_arrays(np.ones(len(shapes)), layers, active, layers * heads, embeddings)
        return np.stack(parts, axis=1)

    def _on_random_weights(self, arch: Arch) -> Any:
        # Which layers are kept matters to no speed, but for their kinds, of which each keeps the teacher's first.
        config = student_config(self.teacher, arch, self._first_layers(arch))
        with torch.random.fork_rng(devices=[]), torch.device(self.device):
            torch.manual_seed(0)
            return AutoModelForCausalLM.from_config(config, dtype=self.dtype).eval()

    def _first_layers(self, arch: Arch) -> list[int]:
        if not arch.layer_counts:
            return list(range(arch.axis_size("layer")))
        return sorted(
            i for kind, count in arch.layer_counts.items() for i in self.teacher.arch.layer_numbers(kind)[:count]
        )

    def _key(self, arch: Arch) -> dict[str, Any]:
        return {
            "sizes": dict(arch.sizes),
            "batch": self.serving.batch,
            "context": self.serving.context,
            **self.where,
        }

    @cached_property
    def where(self) -> dict[str, Any]:
        """The device and dtype that speeds are of."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else platform.machine()
        threads = torch.get_num_threads()
        return {
            "device": f"{self.device.type} ({name}, {threads} threads)",
            "dtype": str(self.dtype).removeprefix("torch."),
        }


def _fitted(parts: Array, seconds: Array) -> Array:
    """Least squares of the relative errors, without the parts whose factor would be negative."""
    used = list(range(parts.shape[1]))
    while True:
        scale = parts[:, used].max(axis=0)
        found, *_ = np.linalg.lstsq(parts[:, used] / scale / seconds[:, None], np.ones(len(seconds)), rcond=None)
        if (found >= 0).all() or len(used) == 1:
            factors = np.zeros(parts.shape[1])
            factors[used] = np.maximum(found, 0) / scale
            return factors
        used.pop(int(found.argmin()))
