"""Files that appear whole or not at all: written beside their place, then renamed into it."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from minitron.errors import UserError

PARTIAL = ".partial"


def partial_path(path: Path) -> Path:
    """Where `path` is written before it is renamed: hidden, beside it, on the same file system."""
    return path.with_name(f".{path.name}{PARTIAL}")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to; on success it becomes `path`, on any error it is removed."""
    staging = partial_path(path)
    with parents_of(path):
        try:
            yield staging
            os.replace(staging, path)
        finally:
            staging.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; on success it becomes `path`, on any error it is removed."""
    staging = partial_path(path)
    with parents_of(path):
        empty_folder(staging)
        try:
            yield staging
            publish_folder(staging, path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def empty_folder(path: Path) -> None:
    """Make `path` an empty folder, whatever was there."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def publish_folder(staging: Path, path: Path) -> None:
    """Put a finished folder in its place, instead of the one that is there."""
    if path.exists():
        # Out of the way by renaming, so that a kill in between leaves one of the two whole.
        replaced = _replaced_path(path)
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(path, replaced)
        os.replace(staging, path)
        shutil.rmtree(replaced)
    else:
        os.replace(staging, path)


def recover_folder(path: Path) -> None:
    """Bring back the folder that `publish_folder` was killed while replacing."""
    if not path.exists() and _replaced_path(path).is_dir():
        os.replace(_replaced_path(path), path)


def _replaced_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced{PARTIAL}")


@contextmanager
def parents_of(path: Path) -> Iterator[None]:
    """Make the parents of `path`; if it does not come to be, remove those that were made."""
    made = missing_parents(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if not path.exists():
            remove_empty(made)


def missing_parents(path: Path) -> list[Path]:
    """The parents of `path` that do not exist, the nearest first."""
    return [parent for parent in path.absolute().parents if not parent.exists()]


def remove_empty(folders: list[Path]) -> None:
    """Remove folders, the innermost first, as far as they are empty."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, whole or not at all."""
    with whole_file(path) as staging:
        staging.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file; a broken one is a `UserError` that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object a line, whole or not at all."""
    with whole_file(path) as staging:
        staging.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file that may end in a half-written line; [] when there is no file."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def require_space(folder: Path, num_bytes: int) -> None:
    """Raise `UserError` unless the file system of `folder` (or its nearest parent) has `num_bytes` free."""
    existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise UserError(f"no space left for {folder}: it needs about {decimal(num_bytes)}, {decimal(free)} are free")


def require_new_folder(path: Path, overwrite: bool, mark: str, inputs: tuple[Path, ...] = ()) -> None:
    """Raise `UserError` unless `path` may become a new folder.

    What is there is replaced only when `overwrite` is true, it holds the file `mark` that such a result has, and
    it is not, and does not hold, one of the `inputs`.
    """
    if path.exists() and not path.is_dir():
        raise UserError(f"{path} exists and is not a folder")
    if path.exists() and any(path.iterdir()):
        if not overwrite:
            raise UserError(f"{path} exists and is not empty: choose another folder or pass --overwrite")
        if not (path / mark).exists():
            raise UserError(
                f"{path} holds no {mark}: --overwrite replaces results of its kind only; remove it yourself"
            )
        if held := [folder for folder in inputs if folder.absolute().is_relative_to(path.absolute())]:
            raise UserError(f"{path} holds {held[0]}, which is asked for as an input: choose another folder")
    require_writable(path)


def require_writable(path: Path) -> None:
    """Raise `UserError` unless `path`, or the nearest parent that exists, can be written to."""
    existing = next(parent for parent in [path, *path.absolute().parents] if parent.exists())
    if not existing.is_dir():
        raise UserError(f"cannot create {path}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {path}: permission denied on {existing}")
