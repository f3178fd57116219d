"""The run directory: which recipe it belongs to, which stages are done, and where everything came from."""

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
"""Entries of a recipe that may differ when a run is continued."""
RUN_RECORD = "run.json"
"""The file that says what a run directory is of."""
STAGES = ("calibrate", "search", "prune", "distill", "evaluate")


class Run:
    """An open run directory. Nothing is created before the first stage begins to write."""

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
        """Whether every stage was done before."""
        return all(self.is_done(stage) for stage in STAGES)

    @property
    def is_begun(self) -> bool:
        """Whether something of it is on disk."""
        return self.record_path.exists() and not self._replaces

    @property
    def record_path(self) -> Path:
        """`run.json`."""
        return self.folder / "run.json"

    def path(self, name: str) -> Path:
        """A file or folder of the run."""
        return self.folder / name

    def is_done(self, stage: str) -> bool:
        """Whether a stage has finished."""
        return bool(self.record["stages"].get(stage, {}).get("state") == "done")

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Run a stage and record that it is done, with the seconds it took, those of a killed attempt left out."""
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
        """Record what an input was, or refuse to go on when it has changed since the run began.

        Raises:
            UserError: the run was begun on another content.
        """
        known = self.record["sources"].setdefault(source, fingerprint)
        if known != fingerprint:
            raise UserError(f"{self.folder} was begun with another {source} of the same name: pass --overwrite")

    def begin(self) -> None:
        """Create the folder, in place of the run that it replaces, once the inputs are known to be good."""
        if self._replaces:
            shutil.rmtree(self.folder)
            self._replaces = False
        self.folder.mkdir(parents=True, exist_ok=True)
        self.save()

    def save(self) -> None:
        """Write `run.json`."""
        write_json(self.record_path, self.record)

    def clean(self) -> None:
        """Remove half-written (hidden) files; and the folder, when this run made it and finished nothing."""
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
    """Begin a run in a new or empty folder, or continue the one of the same recipe.

    Raises:
        UserError: the folder holds another recipe's run or something else, or cannot be written.
    """
    require_writable(folder)
    run = Run(folder, recipe)
    if not folder.exists() or all(path.name.endswith(PARTIAL) for path in folder.iterdir()):
        return run
    if overwrite:
        if not run.record_path.is_file():
            raise UserError(f"{folder} holds no run.json: --overwrite replaces runs only; remove it yourself")
        return Run(folder, recipe, replaces=True)
    if not run.record_path.is_file():
        raise UserError(f"{folder} exists and is not a run of minitron: choose another folder")
    found = read_json(run.record_path)
    if not isinstance(found, dict) or not {"recipe", "sources", "stages"} <= set(found):
        raise UserError(f"{run.record_path} is not the record of a run: choose another folder")
    if difference := _first_difference(found["recipe"], run.record["recipe"]):
        raise UserError(f"{folder} belongs to another recipe ({difference}): choose another folder or pass --overwrite")
    run.record = {**found, "versions": versions()}
    return run


def versions() -> dict[str, str]:
    """Versions of what decides a result."""
    return {
        "minitron": __version__,
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def _first_difference(there: Any, here: Any, where: str = "") -> str | None:
    if where in CHANGE_NOTHING:
        return None
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted({*there, *here}):
            if found := _first_difference(there.get(key), here.get(key), f"{where}.{key}" if where else key):
                return found
        return None
    return None if there == here else f"{where} is {there} there and {here} here"
