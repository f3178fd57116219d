"""Formats in which a model leaves this project for other engines.

A format is a function `export(session, folder, request)` that writes files into an existing folder and returns what was
written and checked, for JSON. A further format is one module with such a function, or a package where it takes
several, and its line in `FORMATS`.
"""

import importlib.util
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from minitron.errors import UserError, nearest
from minitron.files import write_json

if TYPE_CHECKING:
    from minitron.session import Session

RECORD = "export.json"
"""What an exported folder holds beside the files: what they are, and what was checked."""


class Format(NamedTuple):
    """A format, what it needs, and what runs it."""

    module: str
    """The module within this package that has its `export`."""
    needs: str
    """The library that writes the format."""
    extra: str
    """The extra of this project that installs the library."""
    engine: str
    """The engine whose answers a check compares with those of transformers."""


COMPRESSED = Format("compressed.export", "compressed_tensors", "compressed", "transformers")
FORMATS = {
    "gguf": Format("gguf.export", "gguf", "gguf", "llama.cpp"),
    "onnx": Format("onnx.export", "onnxscript", "onnx", "onnxruntime"),
    **dict.fromkeys(("fp8", "w8a8", "w4a16"), COMPRESSED),
}
"""The formats by name. FP8, and integers of eight or four bits, are one layout, which vLLM and transformers read."""


@dataclass(frozen=True)
class Request:
    """What an export is asked for."""

    format: str
    name: str
    """That of the model, by which files are named."""
    quantize: str | None = None
    """The type of the matrices, for formats that have several; None: they keep theirs."""
    checks: bool = False
    """Whether the engine's answers are compared with those of transformers."""


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


def export(session: "Session", folder: Path, request: Request) -> dict[str, Any]:
    """Write the session's teacher in a format into an existing folder, with `export.json` beside it.

    The text of the session is read by formats that measure activations. Returns what `export.json` holds.

    Raises:
        UserError: see `require_format`, or the format cannot represent the model.
    """
    from minitron import __version__

    module = import_module(f"minitron.formats.{require_format(request.format).module}")
    written = module.export(session, folder, request)
    record = {
        "format": request.format,
        **written,
        "model": session.teacher.folder.name,
        "num_parameters": session.teacher.arch.num_parameters,
        "minitron": __version__,
    }
    write_json(folder / RECORD, record)
    return record
