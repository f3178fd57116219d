"""Formats in which a model leaves this project for engines that do not read Hugging Face folders.

A format is a function `export(checkpoint, folder, name=…, quantize=…, checks=…)` that writes files into an existing
folder and returns what was written and checked, for JSON. A further format is one module with such a function, or a
package where it takes several, and its line in `FORMATS`.
"""

import importlib.util
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from minitron.errors import UserError, nearest
from minitron.files import write_json
from minitron.model.checkpoint import Checkpoint

RECORD = "export.json"
"""What an exported folder holds beside the files: what they are, and what was checked."""


class Format(NamedTuple):
    """A format, and what it needs."""

    module: str
    """The module within this package that has its `export`."""
    needs: str
    """The library that writes the format."""
    extra: str
    """The extra of this project that installs the library."""


FORMATS = {"gguf": Format("gguf.export", "gguf", "gguf")}


def require_format(name: str) -> Format:
    """Return a format whose library is installed.

    Raises:
        UserError: the format is unknown, or its library is missing.
    """
    if name not in FORMATS:
        raise UserError(f"--format {name}: {nearest(name, list(FORMATS))}")
    chosen = FORMATS[name]
    if importlib.util.find_spec(chosen.needs) is None:
        raise UserError(f"--format {name} needs the {chosen.needs} package: pip install 'minitron[{chosen.extra}]'")
    return chosen


def export(
    checkpoint: Checkpoint, folder: Path, *, format: str, name: str, quantize: str | None, checks: bool
) -> dict[str, Any]:
    """Write a model in a format into an existing folder, with `export.json` beside it, and return what that holds.

    Raises:
        UserError: see `require_format`, or the format cannot represent the model.
    """
    from minitron import __version__

    module = import_module(f"minitron.formats.{require_format(format).module}")
    written = module.export(checkpoint, folder, name=name, quantize=quantize, checks=checks)
    record = {
        "format": format,
        **written,
        "model": checkpoint.folder.name,
        "num_parameters": checkpoint.arch.num_parameters,
        "minitron": __version__,
    }
    write_json(folder / RECORD, record)
    return record
