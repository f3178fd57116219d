"""OUT, the folder that a verb writes: what it may be, where work lies meanwhile, how a result replaces another.

Everything that a verb writes lies within OUT, under hidden names until it is whole. So OUT may be a mount point, a link
to a folder, or a folder whose parent cannot be written, and one lock guards all of it.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from minitron.errors import UserError
from minitron.files import apply_umask, empty_folder, missing_parents, remove_empty, require_writable
from minitron.lock import locked

OF_FILE_SYSTEMS = {"lost+found", "@eaDir", "System Volume Information", "$RECYCLE.BIN"}
"""Folders that a file system keeps at its root, or in each folder; a result leaves them where they are."""


@dataclass(frozen=True)
class Output:
    """The folder OUT of a verb, and the file that results of its kind have, which is the last to appear."""

    path: Path
    mark: str

    def hidden(self, name: str) -> Path:
        """Return the path of a hidden folder within OUT."""
        return self.path / f".minitron-{name}"

    @property
    def is_empty(self) -> bool:
        """Whether OUT is missing, or holds nothing but hidden entries and those of its file system."""
        return not self.path.is_dir() or not visible(self.path)

    @property
    def is_unsettled(self) -> bool:
        """Whether a process was killed while it brought a result to its place."""
        return any(self.hidden(name).exists() for name in ("complete", "arriving"))

    def require_usable(self, overwrite: bool, inputs: tuple[Path, ...] = ()) -> None:
        """Check that OUT may receive a result, and bring a result to its place that a killed process has left.

        A folder that is not empty may be replaced only if `overwrite` is true, if it has the mark of results of this
        kind, and if none of the `inputs` is this folder or inside it.

        Raises:
            UserError: it may not, OUT cannot be written, or another process writes it.
        """
        self.require_folder()
        if self.path.is_dir():
            with self.held():
                pass
        if self.is_empty:
            return
        if not overwrite:
            raise UserError(f"{self.path} exists and is not empty: choose another folder or pass --overwrite")
        if not (self.path / self.mark).exists():
            raise UserError(
                f"{self.path} holds no {self.mark}: --overwrite only replaces results of this kind; remove it yourself"
            )
        self.require_outside(inputs)

    def require_folder(self) -> None:
        """Check that OUT is a folder that can be written, or can become one.

        Raises:
            UserError: it is not, or cannot.
        """
        if self.path.is_symlink() and not self.path.exists():
            raise UserError(f"{self.path} is a link to {self.path.readlink()}, which does not exist")
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} exists and is not a folder")
        require_writable(self.path)

    def require_outside(self, inputs: tuple[Path, ...]) -> None:
        """Check that no input is within the result that is going to be replaced, and nothing in it is a mount point.

        Raises:
            UserError: one is.
        """
        if mounted := [path for path in visible(self.path) if os.path.ismount(path)]:
            raise UserError(f"{mounted[0]} is a mount point within the result to be replaced: choose another folder")
        out = self.path.resolve()
        if inside := [path for path in inputs if path.resolve().is_relative_to(out)]:
            raise UserError(f"{self.path} contains {inside[0]}, which is one of the inputs: choose another folder")

    @contextmanager
    def held(self) -> Iterator[None]:
        """Create OUT and hold its lock while the block runs; an OUT that is empty afterwards is removed again.

        Raises:
            UserError: another process holds it, or OUT cannot be written.
        """
        if os.environ.get("RANK", "0") != "0":  # of the processes that torchrun started, one writes
            yield
            return
        created = missing_parents(self.path / self.mark)
        try:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot create {self.path}: {error.strerror}") from error
            with locked(self.path):
                self._settle()
                yield
        finally:
            remove_empty(created)

    @contextmanager
    def work(self, name: str) -> Iterator[Path]:
        """Yield an empty hidden folder within OUT, and hold the lock; the folder is removed at the end.

        Raises:
            UserError: see `held`.
        """
        with self.held():
            folder = self.hidden(name)
            empty_folder(folder)
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def publish(self, folder: Path) -> None:
        """Bring a complete result, a folder within OUT, to its place, and remove the result that was there.

        A kill at any moment leaves either result whole: what is missing then is done by the next command.
        """
        apply_umask(folder)
        os.replace(folder, self.hidden("complete"))
        self._settle()

    def _settle(self) -> None:
        # The name of the folder is the state: `complete` while the old result leaves, `arriving` once it has left.
        complete, arriving, replaced = (self.hidden(name) for name in ("complete", "arriving", "replaced"))
        if complete.exists():
            replaced.mkdir(exist_ok=True)
            for entry in _marked(visible(self.path), self.mark, last=False):
                shutil.move(entry, replaced / entry.name)
            os.replace(complete, arriving)
        if arriving.exists():
            for entry in _marked(list(arriving.iterdir()), self.mark, last=True):
                shutil.move(entry, self.path / entry.name)
            arriving.rmdir()
        shutil.rmtree(replaced, ignore_errors=True)


def visible(folder: Path) -> list[Path]:
    """Return the entries of a folder, without hidden ones and those of its file system, in the order of their names."""
    entries = sorted(folder.iterdir())
    return [entry for entry in entries if not entry.name.startswith(".") and entry.name not in OF_FILE_SYSTEMS]


def _marked(entries: list[Path], mark: str, *, last: bool) -> list[Path]:
    """Return the entries with the mark first or last: where it is missing, a folder is not a result."""
    return sorted(entries, key=lambda entry: (entry.name == mark) == last)
