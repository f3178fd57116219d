"""Writes files and folders completely or not at all: under a hidden name first, then renamed into place."""

import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from minitron.errors import UserError

PARTIAL = ".partial"


def cache_folder() -> Path:
    """Return the folder of converted teachers and derived tables: `$MINITRON_CACHE`, or `~/.cache/minitron`."""
    return Path(os.environ.get("MINITRON_CACHE") or Path.home() / ".cache" / "minitron")


def partial_path(path: Path) -> Path:
    """Return the hidden path next to `path`, on the same file system, that is written first and renamed at the end."""
    return path.with_name(f".{path.name}{PARTIAL}")


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; rename it to `path` on success, remove it on any error."""
    staging = partial_path(path)
    with parents_of(path):
        try:
            yield staging
            apply_umask(staging)
            os.replace(staging, path)
        finally:
            staging.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary empty folder to fill; rename it to `path` on success, remove it on any error."""
    staging = partial_path(path)
    with parents_of(path):
        empty_folder(staging)
        try:
            yield staging
            publish_folder(staging, path)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def empty_folder(path: Path) -> None:
    """Create `path` as an empty folder, removing any folder of that name first."""
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


def publish_folder(staging: Path, path: Path) -> None:
    """Rename the finished folder `staging` to `path`, replacing a folder that exists there."""
    apply_umask(staging)
    if path.exists():
        # The old folder is renamed before it is removed, so that a kill at any moment leaves one of the two complete.
        replaced = _replaced_path(path)
        shutil.rmtree(replaced, ignore_errors=True)
        shutil.move(path, replaced)  # copies where overlayfs cannot rename a folder of a lower layer
        os.replace(staging, path)
        shutil.rmtree(replaced, ignore_errors=True)
    else:
        os.replace(staging, path)


def apply_umask(path: Path) -> None:
    """Give a file, or a folder with all that it holds, the permissions of the user's umask.

    Some libraries (safetensors among them) write files that only their owner can read, under any umask. A folder keeps
    its setgid and sticky bits; file systems without permissions refuse the change, and need none.
    """
    umask = os.umask(0)
    os.umask(umask)
    for each in [path, *path.rglob("*")] if path.is_dir() else [path]:
        mode = each.lstat().st_mode
        if not stat.S_ISLNK(mode):
            wanted = (0o777 if stat.S_ISDIR(mode) else 0o666) & ~umask
            with suppress(OSError):
                each.chmod(stat.S_IMODE(mode) & ~0o777 | wanted)


def recover_folder(path: Path) -> None:
    """Restore the old folder at `path` if the process was killed while `publish_folder` replaced it."""
    if not path.exists() and _replaced_path(path).is_dir():
        os.replace(_replaced_path(path), path)


def _replaced_path(path: Path) -> Path:
    return path.with_name(f".{path.name}.replaced{PARTIAL}")


@contextmanager
def parents_of(path: Path) -> Iterator[None]:
    """Create the parents of `path` for the block; if `path` does not exist afterwards, remove them again."""
    created = missing_parents(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        if not path.exists():
            remove_empty(created)


def missing_parents(path: Path) -> list[Path]:
    """Return the parents of `path` that do not exist, innermost first."""
    return [parent for parent in path.absolute().parents if not parent.exists()]


def remove_empty(folders: list[Path]) -> None:
    """Remove those of the folders, given innermost first, that are empty."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, completely or not at all."""
    with whole_file(path) as staging:
        staging.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: the file is not valid JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write one JSON object per line, completely or not at all."""
    with whole_file(path) as staging:
        staging.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSON-lines file, without a half-written last line; [] if the file does not exist."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def require_space(folder: Path, num_bytes: int) -> None:
    """Check that the file system of `folder`, or of its nearest existing parent, has `num_bytes` free.

    Raises:
        UserError: it has less.
    """
    existing = next(parent for parent in [folder, *folder.absolute().parents] if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < num_bytes:
        raise UserError(f"no space left for {folder}: it needs about {decimal(num_bytes)}, {decimal(free)} are free")


def require_writable(path: Path) -> None:
    """Check that `path`, or its nearest existing parent, can be written to.

    Raises:
        UserError: it cannot.
    """
    existing = next(parent for parent in [path, *path.absolute().parents] if parent.exists())
    if not existing.is_dir():
        raise UserError(f"cannot create {path}: {existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"cannot write to {path}: permission denied on {existing}")
