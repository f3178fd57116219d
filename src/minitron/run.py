"""The run directory: records its recipe, the state of its stages, and the versions and inputs of its results."""

import glob
import logging
import os
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron import __version__
from minitron.errors import UserError
from minitron.files import PARTIAL, read_json, whole_file, write_json
from minitron.history import HISTORY
from minitron.output import Output, visible
from minitron.recipe import Recipe, validate

if TYPE_CHECKING:
    from minitron.runtime import World

PACKAGES = ("torch", "transformers", "safetensors", "numpy", "datasets")

CHANGE_NOTHING = {"device", "distill.checkpoint_seconds", "distill.trackers"}
"""Recipe keys that may differ when a run is continued, since they change no result."""
RUN_RECORD = "run.json"
"""The file that records recipe, inputs and stages of a run directory."""


class Run:
    """An open run directory; no file of the run is created before `begin`.

    A run that replaces another lies in a hidden folder of that one's run directory until it is finished. Of the
    processes of torchrun the main one writes; in the others a run `follows` it, and knows what `share` has handed over.
    """

    def __init__(self, output: Output, recipe: Recipe, *, replaces: bool = False, follows: bool = False) -> None:
        self._output, self._replaces, self._follows = output, replaces, follows
        self.folder = output.hidden("overwrite") if replaces else output.path
        self._fresh: dict[str, Any] = {
            "recipe": recipe.model_dump(mode="json"),
            "seed": recipe.seed,
            "versions": versions(),
            "sources": {},
            "stages": {},
        }
        self.record, self._is_new = self._fresh, not self.is_begun
        if self.is_begun and not follows:
            self._continue()

    def share(self, world: "World") -> None:
        """Hand the state of the run over to the processes that follow, once all processes have come this far."""
        self.folder, self.record = world.gather((self.folder, self.record))[0]

    def _continue(self) -> None:
        """Read the record of a run that has begun; a replacement with another recipe is begun again.

        Raises:
            UserError: the record is not one of a run, or of another recipe.
        """
        record = read_json(self.record_path)
        if not isinstance(record, dict) or not {"recipe", "sources", "stages"} <= set(record):
            raise UserError(f"{self.record_path} is not the record of a run: choose another folder")
        difference = _first_difference(_with_defaults(record["recipe"]), self._fresh["recipe"])
        if difference and not self._replaces:
            raise UserError(
                f"{self.folder} belongs to another recipe ({difference}): choose another folder or pass --overwrite"
            )
        if not difference:
            self.record = {**record, "versions": versions()}

    @property
    def is_begun(self) -> bool:
        """Whether the run is on disk."""
        return self.record_path.is_file()

    @property
    def record_path(self) -> Path:
        """Path of `run.json`."""
        return self.folder / RUN_RECORD

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

        A replacement is begun again with the present input.

        Raises:
            UserError: the input has changed since.
        """
        if self.record["sources"].setdefault(source, fingerprint) == fingerprint:
            return
        if not self._replaces:
            raise UserError(f"{self.folder} was started with a different {source} of this name: pass --overwrite")
        self.record = {**self._fresh, "sources": {source: fingerprint}}

    def begin(self) -> None:
        """Create the folder; call it after the inputs are checked."""
        if self._follows:
            return
        if self._replaces and not self.record["stages"]:
            shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.save()

    def save(self) -> None:
        """Write `run.json`."""
        if not self._follows:
            write_json(self.record_path, self.record)

    def link(self, name: str, model: Path) -> None:
        """Let `name` in the run be a link to a model's folder, or a file with its path where no link can be made.

        Within a series, the link to another student is relative: it is valid after the series has been moved.
        """
        if self._follows:
            return
        link, target, series = self.path(name), model.resolve(), self.folder.resolve().parent
        if link.is_symlink() or link.exists():
            return
        if (series / RUN_RECORD).is_file() and target.is_relative_to(series):
            target = Path(os.path.relpath(target, self.folder.resolve()))
        try:
            link.symlink_to(target, target_is_directory=True)
        except OSError:
            link.write_text(f"{target}\n", encoding="utf-8")

    def publish(self) -> None:
        """Bring a finished replacement to the place of the run that it replaces.

        Members of a series name each other by paths, which are changed to those that hold from then on.
        """
        if self._replaces:
            for name in (RUN_RECORD, "report.html", "README.md", HISTORY):
                for path in self.folder.rglob(name):
                    text = path.read_text(encoding="utf-8").replace(str(self.folder), str(self._output.path))
                    with whole_file(path) as staging:
                        staging.write_text(text, encoding="utf-8")
            self._output.publish(self.folder)
            self.folder, self._replaces = self._output.path, False

    def clean(self) -> None:
        """Remove half-written files, and the files of a run that was started here and finished no stage."""
        if not self.is_begun:
            return
        for path in self.folder.glob(f".*{PARTIAL}"):
            _remove(path)
        holds_runs = any((path / RUN_RECORD).exists() for path in self.folder.iterdir())
        if self._is_new and not holds_runs and not any(self.is_done(stage) for stage in self.record["stages"]):
            for path in visible(self.folder):
                _remove(path)
            if self._replaces:
                shutil.rmtree(self.folder)


@contextmanager
def open_run(folder: Path, recipe: Recipe, overwrite: bool, *, follows: bool = False) -> Iterator[Run]:
    """Start a run in a new or empty folder, or continue the run of an equal recipe, and hold the folder's lock.

    A process that `follows` the main one of torchrun holds no lock and writes nothing.

    With `overwrite`, a run that is there is replaced once the new one is finished and published; an unfinished
    replacement with equal recipe and inputs is continued.

    Raises:
        UserError: the folder holds the run of another recipe or other files, cannot be written, or is being written.
    """
    output = Output(folder, RUN_RECORD)
    if follows:
        yield Run(output, recipe, follows=True)
        return
    output.require_folder()
    was_replaced = output.is_unsettled  # the command before this one was killed while it replaced the run
    with output.held():
        has_run = (folder / RUN_RECORD).is_file()
        if not output.is_empty and not has_run:
            raise UserError(
                f"{folder} holds no run.json: --overwrite only replaces runs; remove the folder yourself"
                if overwrite
                else f"{folder} exists and is not a run of minitron: choose another folder"
            )
        replaces = overwrite and has_run and not was_replaced
        if replaces:
            output.require_outside(local_inputs(recipe))
        elif (unfinished := output.hidden("overwrite")).is_dir():
            logging.warning(f"{unfinished} holds an unfinished run, which --overwrite continues")
        run = Run(output, recipe, replaces=replaces)
        try:
            yield run
        finally:
            run.clean()


def local_inputs(recipe: Recipe) -> tuple[Path, ...]:
    """Return the paths on this machine that a recipe names as its teacher and as its data."""
    named = [recipe.teacher, *([recipe.data] if isinstance(recipe.data, str) else recipe.data)]
    paths = [Path(name).expanduser() for name in named]
    return tuple(path for path in paths if path.exists() or glob.has_magic(path.name))


def teacher_of(run: Path) -> Path:
    """Return the folder of a run directory's teacher."""
    return linked(run, "teacher")


def linked(run: Path, name: str) -> Path:
    """Return the folder of a model of a run directory, which may lie elsewhere; see `Run.link`."""
    link = run / name
    return run / link.read_text(encoding="utf-8").strip() if link.is_file() else link


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def versions() -> dict[str, str]:
    """Return the versions of all software that can change a result."""
    return {
        "minitron": __version__,
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
    }


def _with_defaults(recipe: Any) -> Any:
    """Return the values of a recipe with the defaults of keys that it lacks, which an earlier version did not have.

    One that this version does not accept is returned as it is.
    """
    try:
        return validate(Recipe, recipe, RUN_RECORD).model_dump(mode="json")
    except UserError:
        return recipe


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
