"""Reads the rows of data files, one after another: text, JSON, tables, as they are or compressed."""

import bz2
import codecs
import csv
import gzip
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from io import TextIOWrapper
from pathlib import Path
from typing import Any, BinaryIO, TextIO, cast

from minitron.data.rows import ANSWERED, COLUMNS, FORMS, PAIR
from minitron.errors import UserError

PIECE_CHARACTERS = 100_000
"""A text file is cut at line ends into documents of about this length."""
ROWS_AT_ONCE = 1_000
"""The number of rows of a table that are turned into Python objects at once."""

ARROW_FILE = b"ARROW1"
"""The first bytes of an Arrow file; an Arrow stream, as `datasets` writes it, begins otherwise."""
LMFLOW = re.compile(r'\s*\{\s*(?:"type"\s*:\s*"\w+"\s*,\s*)?"instances"\s*:\s*\[')
"""The beginning of a file of LMFlow: one mapping, whose `instances` are the rows."""
LFS_POINTER = b"version https://git-lfs"
"""The first bytes of what Git LFS leaves in the place of a file."""

Rows = Iterator[tuple[Any, str]]
"""Rows of a file, each with the name of its place: file and line, or file and row."""


def read_rows(path: Path) -> Rows:
    """Yield the rows of a file whose kind `is_readable`: a text's pieces, or what a line or a row holds.

    Raises:
        UserError: the file is not what its name says, with the line where that is found.
    """
    read = READERS[_kind(path)]
    try:
        yield from read(path)
    except UnicodeDecodeError as error:
        raise UserError(f"data {path}{_line_of_bad_text(path)} is not UTF-8 text: {error.reason}") from error
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise UserError(f"data {path} cannot be read: {' '.join(str(error).split())}") from error


def is_readable(path: Path) -> bool:
    """Return whether a file's name is that of a kind that can be read."""
    return _kind(path) in READERS


def kinds() -> str:
    """Return the kinds of files that can be read, as words."""
    return f"{', '.join(READERS)}; text also compressed as {', '.join(DECOMPRESSORS)}"


def without_nulls(value: Any) -> Any:
    """Return a value without the nulls within it; Arrow tables hold one wherever another row has a key."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _kind(path: Path) -> str:
    """Return the ending that decides how a file is read: `.jsonl` for `a.jsonl.gz`."""
    kind = path.suffix.lower()
    inner = Path(path.stem).suffix.lower() if kind in DECOMPRESSORS else kind
    return kind if inner in TABLES and inner != kind else inner


def _zstd(path: Path) -> BinaryIO:
    import pyarrow

    return cast(BinaryIO, pyarrow.input_stream(str(path), compression="zstd"))


def _binary(path: Path) -> BinaryIO:
    return cast(BinaryIO, DECOMPRESSORS.get(path.suffix.lower(), lambda path: path.open("rb"))(path))


@contextmanager
def _text(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """Open a file of text: UTF-8, or the encoding that its byte-order mark names.

    Raises:
        UserError: the file is the pointer that Git LFS leaves in the place of a file.
    """
    with _binary(path) as file:
        beginning = file.read(len(LFS_POINTER))
    if beginning == LFS_POINTER:
        raise UserError(f"data {path} is a pointer of Git LFS instead of the file: run `git lfs pull`")
    is_utf16 = beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    with TextIOWrapper(_binary(path), encoding="utf-16" if is_utf16 else "utf-8-sig", newline=newline) as text:
        yield text


def _line_of_bad_text(path: Path) -> str:
    """Return `:` and the number of the first line that is not UTF-8."""
    with _binary(path) as file:
        for number, line in enumerate(file, start=1):
            try:
                line.decode()
            except UnicodeDecodeError:
                return f":{number}"
    return ""


def _read_text(path: Path) -> Rows:
    with _text(path) as file:
        number = 1
        while lines := file.readlines(PIECE_CHARACTERS):
            piece = "".join(lines)
            if "\0" in piece:
                raise UserError(f"data {path} is not text: it holds zero bytes")
            yield piece, f"{path}:{number}"
            number += len(lines)


def _read_jsonl(path: Path) -> Rows:
    with _text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    raise _not_json(f"{path}:{number}", error.msg, error.colno) from error
                yield row, f"{path}:{number}"


def _read_json(path: Path) -> Rows:
    """Yield the items of an array, LMFlow's instances, or values that follow each other, on one line or several."""
    decoder = json.JSONDecoder()
    with _text(path) as file:
        buffer = file.read(PIECE_CHARACTERS)
        is_array = buffer.lstrip()[:1] == "[" or LMFLOW.match(buffer) is not None
        position, number = buffer.index("[") + 1 if is_array else 0, 1
        number += buffer.count("\n", 0, position)
        between = re.compile(r"[\s,]*" if is_array else r"\s*")
        while True:
            before, position = position, cast(re.Match[str], between.match(buffer, position)).end()
            number += buffer.count("\n", before, position)
            if is_array and buffer.startswith("]", position):
                return
            try:
                row, end = decoder.raw_decode(buffer, position)
            except json.JSONDecodeError as error:
                # The row may be longer than what was read of it, which is therefore doubled.
                if more := file.read(max(PIECE_CHARACTERS, len(buffer) - position)):
                    buffer, position = buffer[position:] + more, 0
                    continue
                if position == len(buffer) and not is_array:
                    return
                line = number + buffer.count("\n", position, error.pos)
                raise _not_json(f"{path}:{line}", error.msg, error.colno) from error
            yield row, f"{path}:{number}"
            number += buffer.count("\n", position, end)
            position = end


def _not_json(where: str, message: str, column: int) -> UserError:
    return UserError(f"data {where} is not valid JSON: {message.removesuffix(' at')} at column {column}")


def _read_csv(path: Path) -> Rows:
    delimiter = "\t" if _kind(path) == ".tsv" else ","
    csv.field_size_limit(sys.maxsize)
    with _text(path, newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        try:
            for row in reader:
                if None in row:
                    raise UserError(f"data {path}:{reader.line_num} has more fields than the first line has names")
                yield {name: value or None for name, value in row.items()}, f"{path}:{reader.line_num}"
        except csv.Error as error:
            raise UserError(f"data {path}:{reader.line_num} cannot be read: {error}") from error


def _read_parquet(path: Path) -> Rows:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        yield from _rows_of(path, names, file.iter_batches(ROWS_AT_ONCE, columns=_columns(names)))
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"data {path} is not a parquet file: {error}") from error


def _read_arrow(path: Path) -> Rows:
    import pyarrow

    try:
        with path.open("rb") as file:
            is_stream = file.read(len(ARROW_FILE)) != ARROW_FILE
        with pyarrow.memory_map(str(path)) as source:
            table = pyarrow.ipc.open_stream(source) if is_stream else pyarrow.ipc.open_file(source)
            names = table.schema.names
            batches = table if is_stream else map(table.get_batch, range(table.num_record_batches))
            yield from _rows_of(path, names, (batch.select(_columns(names)) for batch in batches))
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"data {path} is not an Arrow file: {error}") from error


def _columns(names: list[str]) -> list[str]:
    """Return the columns to read of those that a table has; [] if they make no document, pair or prompt."""
    forms = (*FORMS, PAIR, *((asked,) for asked, _ in ANSWERED))
    return [name for name in names if name in COLUMNS] if any(set(form) <= set(names) for form in forms) else []


def _rows_of(path: Path, names: list[str], batches: Iterable[Any]) -> Rows:
    """Yield the rows of record batches of `_columns`, or one row of all `names` if they make no document."""
    if not _columns(names):
        yield dict.fromkeys(names), str(path)
        return
    number = 0
    for batch in batches:
        for start in range(0, batch.num_rows, ROWS_AT_ONCE):
            for row in batch.slice(start, ROWS_AT_ONCE).to_pylist():
                number += 1
                yield {name: without_nulls(value) for name, value in row.items()}, f"{path}, row {number}"


TABLES: dict[str, Callable[[Path], Rows]] = {".parquet": _read_parquet, ".arrow": _read_arrow}
READERS: dict[str, Callable[[Path], Rows]] = {
    ".txt": _read_text,
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    **TABLES,
}
DECOMPRESSORS: dict[str, Callable[[Path], Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd}
