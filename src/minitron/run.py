"""The run directory: records its recipe, the state of its stages, and the versions and inputs of its results."""

import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minitron import __version__
from minitron.errors import UserError
from minitron.files import PARTIAL, missing_parents, read_json, remove_empty, require_writable, write_json
from minitron.recipe import Recipe

PACKAGES = ("torch", "transformers", "safetensors", "numpy", "datasets")

CHANGE_NOTHING = {"device", "distill.checkpoint_seconds", "distill.trackers"}
"""Recipe keys that may differ when a run is continued, since they change no result."""
RUN_RECORD = "run.json"
"""The file that records recipe, inputs and stages of a run directory."""
STAGES = ("calibrate", "search", "prune", "distill", "evaluate")


class Run:
    """An open run directory. Nothing is created on disk before `begin`."""

    def __init__(self, folder: Path, recipe: Recipe, replaces: bool = False) -> None:
        self.folder, self.recipe = folder, recipe
        self._replaces = replaces
        self._is_new, self._missing_parents = replaces or not folder.exists(), missing_parents(folder)
        self.record: dict[str, Any] = {
            "recipe": recipe.model_dump(mode="json"),
            "seed": recipe.seed,
            "versions": versions(),
            "sources": {},
            "stages": {},
        }

    @property
    def is_finished(self) -> bool:
        """Whether every stage is done."""
        return all(self.is_done(stage) for stage in STAGES)

    @property
    def is_begun(self) -> bool:
        """Whether the run is on disk and is not going to be replaced."""
        return self.record_path.exists() and not self._replaces

    @property
    def record_path(self) -> Path:
        """Path of `run.json`."""
        return self.folder / "run.json"

    def path(self, name: str) -> Path:
        """Return the path of a file or folder of the run."""
        return self.folder / name

    def is_done(self, stage: str) -> bool:
        """Return whether a stage has finished."""
        return bool(self.record["stages"].get(stage, {}).get("state") == "done")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Record that a stage is running while the block runs, and then that it is done, with the seconds it took.

        Seconds of interrupted attempts are added up; those of a killed attempt are lost.
        """
        started = time.monotonic()
        entry = self.record["stages"].setdefault(name, {"state": "running", "seconds": 0.0})
        self.save()
        before = entry["seconds"]
        try:
            yield
            entry["state"] = "done"
        finally:
            entry["seconds"] = round(before + time.monotonic() - started, 2)
            if self.folder.exists():
                self.save()

    def bind(self, source: str, fingerprint: str) -> None:
        """Record the fingerprint of an input, or check it against the one recorded when the run was started.

        Raises:
            UserError: the input has changed since.
        """
        if self.record["sources"].setdefault(source, fingerprint) != fingerprint:
            raise UserError(f"{self.folder} was started with a different {source} of this name: pass --overwrite")

    def begin(self) -> None:
        """Create the folder, replacing an earlier run if asked to; call it after the inputs are checked."""
        if self._replaces:
            shutil.rmtree(self.folder)
            self._replaces = False
        self.folder.mkdir(parents=True, exist_ok=True)
        self.save()

    def save(self) -> None:
        """Write `run.json`."""
        write_json(self.record_path, self.record)

    def clean(self) -> None:
        """Remove half-written (hidden) files, and the folder too if this run created it and finished no stage."""
        if not self.folder.is_dir() or self._replaces:
            return
        for path in self.folder.glob(".*"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        holds_runs = any((path / "run.json").exists() for path in self.folder.iterdir())
        if self._is_new and not holds_runs and not any(self.is_done(stage) for stage in self.record["stages"]):
            shutil.rmtree(self.folder)
            remove_empty(self._missing_parents)


def open_run(folder: Path, recipe: Recipe, overwrite: bool) -> Run:
    """Start a run in a new or empty folder, or continue the run of an equal recipe.

    Raises:
        UserError: the folder holds the run of another recipe or other files, or cannot be written.
    """
    require_writable(folder)
    run = Run(folder, recipe)
    if not folder.exists() or all(path.name.endswith(PARTIAL) for path in folder.iterdir()):
        return run
    if overwrite:
        if not run.record_path.is_file():
            raise UserError(f"{folder} holds no run.json: --overwrite only replaces runs; remove the folder yourself")
        return Run(folder, recipe, replaces=True)
    if not run.record_path.is_file():
        raise UserError(f"{folder} exists and is not a run of minitron: choose another folder")
    record = read_json(run.record_path)
    if not isinstance(record, dict) or not {"recipe", "sources", "stages"} <= set(record):
        raise UserError(f"{run.record_path} is not the record of a run: choose another folder")
    if difference := _first_difference(record["recipe"], run.record["recipe"]):
        raise UserError(f"{folder} belongs to another recipe ({difference}): choose another folder or pass --overwrite")
    run.record = {**record, "versions": versions()}
    return run


def versions() -> dict[str, str]:
    """Return the versions of all software that can change a result."""
    return {
        "minitron": __version__,
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def _first_difference(there: Any, here: Any, where: str = "") -> str | None:
    """Describe the first key in which the recipe of a run differs from the present one; None if they are equal."""
    if where in CHANGE_NOTHING:
        return None
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted({*there, *here}):
            if difference := _first_difference(there.get(key), here.get(key), f"{where}.{key}" if where else key):
                return difference
        return None
    return None if there == here else f"{where} is {there} in the folder and {here} now"
