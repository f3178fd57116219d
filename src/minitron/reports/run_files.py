"""Reads what a run directory holds for its reports, finished or not."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitron.errors import UserError
from minitron.files import read_json, read_jsonl
from minitron.history import HISTORY, History, history_of
from minitron.model.arch import Arch
from minitron.model.config import config_values
from minitron.run import linked, teacher_of


@dataclass(frozen=True)
class RunFiles:
    """The files of a run directory, each read when it is asked for.

    Raises:
        UserError: (on reading the record) the folder is not a run directory.
    """

    folder: Path

    def read(self, name: str) -> Any:
        """Return what the JSON file `name` holds; None when there is no such file."""
        path = self.folder / name
        return read_json(path) if path.exists() else None

    @cached_property
    def record(self) -> dict[str, Any]:
        """What `run.json` holds: recipe, versions, sources, stages."""
        path = self.folder / "run.json"
        if not path.is_file():
            raise UserError(f"{self.folder} holds no run.json: it is not a run directory of minitron")
        record = read_json(path)
        if not isinstance(record, dict) or not {"recipe", "stages"} <= set(record):
            raise UserError(f"{path} is not the record of a run")
        return record

    @cached_property
    def results(self) -> dict[str, Any]:
        """What `eval.json` holds: figures by model, of those that have been measured so far."""
        return dict(self.read("eval.json") or {})

    @cached_property
    def exports(self) -> dict[str, dict[str, Any]]:
        """What the exports in folders of the run directory have recorded, by folder."""
        return {path.parent.name: read_json(path) for path in sorted(self.folder.glob("*/export.json"))}

    @property
    def made(self) -> dict[str, Any] | None:
        """Figures of the model that the run has made, a student or a corrected teacher; None before it is measured."""
        return self.results.get("student") or self.results.get("corrected")

    @property
    def history(self) -> History:
        """How the student, the corrected teacher or the pruned model was made, whichever there is; empty before."""
        folders = [linked(self.folder, name) for name in ("student", "corrected", "pruned")]
        made = [folder for folder in folders if (folder / HISTORY).is_file()]
        return history_of(made[0]) if made else History()

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The rows of `metrics.jsonl`."""
        return read_jsonl(self.folder / "metrics.jsonl")

    @property
    def resumed_at(self) -> list[float]:
        """The tokens at which an interrupted distillation continued."""
        return list(self.record["stages"].get("distill", {}).get("resumed_at", []))

    @property
    def is_cut_from_larger(self) -> bool:
        """Whether the student was cut out of another student, so that scores and layers kept are of that one."""
        return "larger" in self.record["sources"]

    @property
    def kept_layers(self) -> list[int] | None:
        """The numbers of the teacher's layers that the student has; None before pruning, or where they are unknown."""
        return None if self.is_cut_from_larger else self.record.get("kept_layers")

    @cached_property
    def archs(self) -> tuple[Arch, Arch] | None:
        """Teacher and student; None before a shape is found."""
        sizes = self.read("arch.json")
        folder = teacher_of(self.folder)
        if sizes is None or not folder.exists():
            return None
        teacher = Arch.from_config(config_values(folder, self.record["recipe"].get("family")))
        return teacher, Arch.from_dict(sizes, teacher)

    @cached_property
    def importance(self) -> dict[str, NDArray[Any]]:
        """The scores by axis of `importance.safetensors`; empty before calibration."""
        path = self.folder / "importance.safetensors"
        if not path.exists():
            return {}
        from safetensors.numpy import load_file

        scores: dict[str, NDArray[Any]] = load_file(path)
        return {axis: np.asarray(values) for axis, values in scores.items()}
