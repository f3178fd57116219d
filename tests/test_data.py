"""Documents, packing and splits: no token is lost or used twice, and the seed decides the order."""

import bz2
import csv
import gzip
import io
import json
import lzma
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from minitron.data.corpus import read_documents
from minitron.data.packing import Packing, SplitTokens, pack, read_blocks, read_splits
from minitron.distillation import _warn_once, warn_of_repetition
from minitron.errors import UserError
from minitron.recipe import Data, Recipe, data_in_words, load_recipe
from minitron.session import Session
from tests.conftest import byte_tokenizer

TEXTS = ["plain words here", "naïve café — 日本語 🙂 text", "  leading and trailing  ", "line\nbreaks\n\nkept"]


def texts_of(data: Data, seed: int) -> list[str]:
    """Return the documents that are texts."""
    return [document for document in read_documents(data, seed) if isinstance(document, str)]


def test_packing_keeps_every_token_and_every_byte() -> None:
    tokenizer = byte_tokenizer()
    blocks = pack(TEXTS, Packing(tokenizer, 258, 1))
    ids = blocks.ids.flatten().tolist()
    assert ids.count(tokenizer.eos_token_id) == len(TEXTS)
    assert tokenizer.decode(ids, skip_special_tokens=True) == "".join(TEXTS)
    assert int(blocks.num_bytes.sum()) == len("".join(TEXTS).encode())


def test_blocks_are_cut_in_order_and_the_rest_is_dropped() -> None:
    tokenizer = byte_tokenizer()
    flat = pack(TEXTS, Packing(tokenizer, 258, 1)).ids.flatten()
    blocks = pack(TEXTS, Packing(tokenizer, 258, 7))
    assert blocks.ids.flatten().tolist() == flat[: len(flat) // 7 * 7].tolist()
    assert pack(TEXTS, Packing(tokenizer, 258, 7), max_blocks=3).ids.tolist() == blocks.ids[:3].tolist()


def test_splits_share_no_block_and_evaluation_is_the_beginning(text_file: Path) -> None:
    packing = Packing(byte_tokenizer(), 258, 32)
    splits = read_splits(str(text_file), packing, SplitTokens(320, 160, 3200))
    assert [len(part) for part in (splits.evaluation, splits.heldout, splits.train)] == [10, 5, 100]
    rows = [tuple(row) for part in (splits.evaluation, splits.heldout, splits.train) for row in part.ids.tolist()]
    assert len(set(rows)) == 115
    alone = read_blocks(str(text_file), packing, 320)
    assert alone.ids.tolist() == splits.evaluation.ids.tolist()
    other = read_blocks(str(text_file), packing, 640)
    assert other.ids[:10].tolist() == alone.ids.tolist()


def test_a_short_corpus_is_split_by_fifths(tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("abcdefghij" * 32)
    splits = read_splits(
        str(tmp_path / "short.txt"), Packing(byte_tokenizer(), 258, 32), SplitTokens(10_000, 10_000, 10_000)
    )
    assert [len(part) for part in (splits.evaluation, splits.heldout, splits.train)] == [2, 2, 6]


def test_the_seed_decides_the_order(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"document {i}"}) for i in range(50)))
    assert texts_of(str(path), 0) == texts_of(str(path), 0)
    assert texts_of(str(path), 0) != texts_of(str(path), 1)
    assert sorted(texts_of(str(path), 0)) == sorted(texts_of(str(path), 1))


def _compressed(data: bytes) -> dict[str, bytes]:
    zstd = pyarrow.compress(data, codec="zstd", asbytes=True)
    return {"gz": gzip.compress(data), "bz2": bz2.compress(data), "xz": lzma.compress(data), "zst": zstd}


def _write_formats(folder: Path, texts: list[str | None]) -> list[str]:
    """Write texts, None being null, as files of every kind; return the names of the files."""
    rows = [{"id": number, "text": text} for number, text in enumerate(texts)]
    lines = "\n".join(map(json.dumps, rows))
    files = {
        "rows.jsonl": lines.encode(),
        "bom.jsonl": lines.encode("utf-8-sig"),
        "utf-16.jsonl": lines.encode("utf-16"),
        "rows.ndjson": lines.encode(),
        "rows.JSONL": lines.encode(),
        "lines.json": lines.encode(),
        "array.json": json.dumps(rows, indent=1).encode("utf-8-sig"),
        "line.json": json.dumps(rows).encode(),
        "strings.json": json.dumps(texts).encode(),
        "pretty.json": "\n\n".join(json.dumps(row, indent=2) for row in rows).encode(),
        **{f"rows.jsonl.{kind}": data for kind, data in _compressed(lines.encode()).items()},
        **{f"bom.json.{kind}": data for kind, data in _compressed(json.dumps(rows).encode("utf-8-sig")).items()},
    }
    for name, delimiter in (("rows.csv", ","), ("rows.tsv", "\t")):
        table = io.StringIO()
        csv.writer(table, delimiter=delimiter).writerows([["id", "text"], *([row["id"], row["text"]] for row in rows)])
        files[name] = files[f"bom-{name}"] = table.getvalue().encode("utf-8-sig")
    for name, data in files.items():
        (folder / name).write_bytes(data)
    table = pyarrow.Table.from_pylist(rows)
    as_bytes = pyarrow.table({"text": [None if text is None else text.encode() for text in texts]})
    pyarrow.parquet.write_table(table, folder / "rows.parquet")
    pyarrow.parquet.write_table(as_bytes, folder / "bytes.parquet")
    for name, writer in (("file.arrow", pyarrow.ipc.new_file), ("stream.arrow", pyarrow.ipc.new_stream)):
        with writer(folder / name, table.schema) as sink:
            sink.write_table(table)
    return [path.name for path in folder.iterdir()]


def test_every_format_gives_the_same_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitron.data.readers.PIECE_CHARACTERS", 7)
    names = _write_formats(tmp_path, [None, *TEXTS, None])
    assert len(names) > 20
    for name in names:
        assert texts_of(str(tmp_path / name), 0) == texts_of(str(tmp_path / "rows.jsonl"), 0), name
    assert sorted(texts_of(str(tmp_path / "rows.jsonl"), 0)) == sorted(TEXTS)


def test_every_encoding_of_a_text_gives_the_same_documents(tmp_path: Path) -> None:
    text = "\n".join(TEXTS)
    files = {"a.txt": text.encode(), "bom.txt": text.encode("utf-8-sig"), "utf-16.txt": text.encode("utf-16")}
    files |= {f"a.txt.{kind}": data for kind, data in _compressed(text.encode()).items()}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
        assert texts_of(str(tmp_path / name), 0) == [text], name


def test_a_folder_is_its_readable_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    texts = {"b/2.txt": "two", "b/1.txt.gz": "one", "a.jsonl": '"zero"', "README.md": "x", ".cache/x.txt": "x"}
    for name, text in (texts | {"dataset_info.json": "{}", "b/_SUCCESS": "", "b/model.bin": "x"}).items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    assert sorted(texts_of(str(tmp_path), 0)) == ["one", "two", "zero"]
    assert sorted(texts_of(f"{tmp_path}/b*", 0)) == ["one", "two"]
    assert not caplog.records
    (tmp_path / "data").mkdir()
    for split in ("train-00000-of-00001", "test-00000-of-00001", "validation"):
        pyarrow.parquet.write_table(pyarrow.table({"text": [split]}), tmp_path / "data" / f"{split}.parquet")
    assert texts_of(str(tmp_path / "data"), 0) == ["train-00000-of-00001"]
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "1 of 3 files are read, those of the split train"
    ]


@pytest.mark.parametrize("columns", [("content",), ("document", "id"), ("text", "content"), ("text", "messages")])
def test_a_column_of_text_is_found(tmp_path: Path, columns: tuple[str, ...]) -> None:
    row = {name: "words" if name == columns[0] else None for name in columns}
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "a.parquet")
    assert texts_of(str(tmp_path / "a.jsonl"), 0) == texts_of(str(tmp_path / "a.parquet"), 0) == ["words"]


HUB_ERRORS: dict[str, tuple[str, Exception, str]] = {
    "config": (
        "org/name",
        ValueError("Config name is missing.\nPick one of: ['en', 'de']"),
        r"missing. Pick one of: \['en'",
    ),
    "split": (
        "org/name:en:validation",
        ValueError("Unknown split"),
        "org/name:en:validation' is neither .*Unknown split",
    ),
    "script": ("org/name", RuntimeError("Dataset scripts are no longer supported"), "scripts are no longer"),
    "gated": ("org/name::test", FileNotFoundError("is a gated dataset on the Hub"), "gated dataset"),
    "a missing folder": ("org/name", ConnectionError("Couldn't reach it"), "neither a file or folder here .* reach it"),
    "of no common kind": ("org/name", Exception("Connection reset"), "Connection reset"),
    "without a message": ("org/name", TimeoutError(), "TimeoutError"),
}


@pytest.mark.parametrize("case", HUB_ERRORS)
def test_what_the_hub_library_states_is_passed_on(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, error, message = HUB_ERRORS[case]
    asked: list[tuple[Any, Any, Any]] = []

    def load(path: str, config: str | None, *, split: str, streaming: bool) -> Iterator[dict[str, Any]]:
        asked.append((path, config, split))
        raise error

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))  # whose import takes seconds
    with pytest.raises(UserError, match=message):
        texts_of(name, 0)
    _, config, split = [*name.split(":"), "", ""][:3]
    assert asked == [("org/name", config or None, split or "train")]


def test_rows_of_the_hub_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"text": "a", "id": None}, {"text": None, "id": 1}, {"text": "b", "id": 2}]
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **options: rows))
    assert sorted(texts_of("org/name:config:split", 0)) == ["a", "b"]
    with pytest.raises(UserError, match="accepted on the hub: org/name, org/name:config and org/name:config:split"):
        texts_of("org/name:a:b:c", 0)


def test_a_text_that_is_repeated_is_named_once(
    text_file: Path, model_folder: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    _warn_once.cache_clear()
    for tokens, warnings in ((1_000, 0), (1_000_000, 1), (1_000_000, 1)):
        values = {"teacher": str(model_folder()), "data": str(text_file), "context": 32, "distill": {"tokens": tokens}}
        warn_of_repetition(Session(Recipe.model_validate(values | {"search": {"tokens": 64}})))
        assert [record.name for record in caplog.records].count("minitron.distillation") == warnings
    assert "training tokens: distill.tokens 1,000,000 reads them" in caplog.text


def test_a_mixture_keeps_its_weights_all_the_way(tmp_path: Path) -> None:
    for name, length, count in (("a", 30, 400), ("b", 70, 100)):
        rows = [json.dumps({"text": (f"{name}{i:03}" * length)[:length]}) for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    weights = {str(tmp_path / "a.jsonl"): 0.3, str(tmp_path / "b.jsonl"): 0.7}
    mixed = texts_of(weights, 0)
    given = {"a": 0, "b": 0}
    for document in mixed:
        given[document[0]] += len(document)
        assert abs(given["a"] - 0.3 * sum(given.values())) <= 70
    assert given["b"] == 7000  # it ends with the first source that does
    assert [d for d in mixed if d[0] == "b"] == texts_of(str(tmp_path / "b.jsonl"), 0)
    assert mixed != texts_of(weights, 1)
    assert data_in_words({"wiki": 3, "code": 7}) == "0.3 of wiki, 0.7 of code"
    for bad in ({}, {"wiki": 0}, 3):
        with pytest.raises(UserError, match="data"):
            load_recipe(None, {"teacher": "x", "data": bad})


def _binary(path: Path) -> Path:
    path.write_bytes(bytes(range(256)) * 10)
    return path


def test_a_token_that_the_model_lacks_is_named(text_file: Path) -> None:
    with pytest.raises(UserError, match="the tokenizer returns token 257, the model has only 200"):
        read_blocks(str(text_file), Packing(byte_tokenizer(), 200, 32))


def test_a_long_text_is_shuffled_through_a_bounded_buffer(text_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("minitron.data.readers.PIECE_CHARACTERS", 500)
    whole = texts_of(str(text_file), 0)
    monkeypatch.setattr("minitron.data.corpus.BUFFER_CHARACTERS", 5_000)
    bounded = texts_of(str(text_file), 0)
    assert sorted(bounded) == sorted(whole)
    assert bounded != whole
    assert "".join(sorted(whole)) != "".join(whole)


def test_a_name_with_brackets_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "part[1].txt").write_text("words")
    assert texts_of(str(tmp_path / "part[1].txt"), 0) == ["words"]


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda folder: folder / "none.txt", "does not exist"),
    "a missing folder": (lambda folder: folder / "none", "does not exist"),
    "empty": (lambda folder: _written(folder / "empty.txt", ""), "is empty"),
    "blank": (lambda folder: _written(folder / "blank.txt", "\n\n  \n"), "is empty"),
    "nulls alone": (lambda folder: _written(folder / "a.jsonl", '{"text": null}'), "is empty"),
    "binary": (lambda folder: _binary(folder / "b.txt"), "is not text|is not UTF-8"),
    "zero bytes": (lambda folder: _written(folder / "z.txt", "a\0b"), "zero bytes"),
    "another encoding": (
        lambda folder: _written(folder / "a.txt", "one\ncaf\xe9 two\n", "latin-1"),
        "a.txt:2 is not UTF-8 text: invalid continuation byte",
    ),
    "another encoding of a compressed file": (
        lambda folder: _written(folder / "a.jsonl.gz", '{"text": "one"}\n{"text": "caf\xe9"}', "latin-1"),
        "a.jsonl.gz:2 is not UTF-8 text",
    ),
    "not compressed": (lambda folder: _written(folder / "a.zst", "x").rename(folder / "a.txt.zst"), "cannot be read:"),
    "cut off": (lambda folder: _cut_off(folder / "a.txt.gz"), "cannot be read: Compressed file ended"),
    "not json": (lambda folder: _written(folder / "a.jsonl", "{"), "a.jsonl:1 is not valid JSON"),
    "a broken line": (
        lambda folder: _written(folder / "a.jsonl", '{"text": "x"}\n' * 39 + '{"text": "the file ends he'),
        "a.jsonl:40 is not valid JSON: Unterminated string starting at column 10",
    ),
    "a broken array": (
        lambda folder: _written(folder / "a.json", '[\n{"text": "x"},\n{"text" "y"}]'),
        "a.json:3 is not",
    ),
    "an array that does not end": (lambda folder: _written(folder / "a.json", '["x",\n'), "a.json:2 is not valid JSON"),
    "no text field": (
        lambda folder: _written(folder / "a.jsonl", '{"body": "x"}'),
        "a.jsonl:1 has no column .* has body",
    ),
    "no text column": (
        lambda folder: _written(folder / "a.csv", "id,body\n1,x"),
        "a.csv:2 has no column .* has id, body",
    ),
    "no text column of a table": (lambda folder: _parquet(folder / "a.parquet", body="x"), "has no column .* has body"),
    "two columns of text": (
        lambda folder: _parquet(folder / "a.parquet", content="x", document="y"),
        "has no column that is read: .*; it has content, document",
    ),
    "a number": (
        lambda folder: _written(folder / "a.jsonl", '\n{"text": 3}'),
        "a.jsonl:2: column 'text' holds a number",
    ),
    "too many fields": (lambda folder: _written(folder / "a.csv", "id,text\n1,a,b"), "a.csv:2 has more fields than"),
    "not parquet": (lambda folder: _written(folder / "a.parquet", "x"), "is not a parquet file"),
    "not arrow": (lambda folder: _written(folder / "a.arrow", "words" * 9), "is not an Arrow file|cannot be read"),
    "a pointer": (
        lambda folder: _written(folder / "a.txt", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        "a.txt is a pointer of Git LFS",
    ),
    "unknown kind": (lambda folder: _written(folder / "a.pdf", "x"), "cannot read '.pdf' files; accepted: .txt"),
    "one of several unknown": (
        lambda folder: _written(folder / "a.txt", "x").with_name("*") if _written(folder / "b.pdf", "x") else folder,
        "b.pdf: cannot read '.pdf' files",
    ),
    "an empty folder": (lambda folder: folder, "is a folder without a file that can be read; accepted: .txt"),
    "short": (lambda folder: _written(folder / "s.txt", "too short"), "shorter than one block of 64 tokens"),
}


def _parquet(path: Path, **row: str) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    return path


def _cut_off(path: Path) -> Path:
    path.write_bytes(gzip.compress(b"words " * 99)[:-9])
    return path


def _written(path: Path, text: str, encoding: str = "utf-8") -> Path:
    data = text.encode(encoding)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_named(tmp_path: Path, case: str) -> None:
    make, message = BAD[case]
    with pytest.raises(UserError, match=message):
        read_blocks(str(make(tmp_path)), Packing(byte_tokenizer(), 258, 64))
