"""Documents, packing and splits: no token is lost or used twice, and the seed decides the order."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from minitron.data.blocks import Packing, SplitTokens, pack, read_blocks, read_splits
from minitron.data.corpus import read_documents
from minitron.errors import UserError
from minitron.recipe import Data, data_in_words, load_recipe
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


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps({"text": text, "id": 1}) for text in TEXTS))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "rows.parquet")
    for i, text in enumerate(TEXTS):
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    for source in ("rows.jsonl", "rows.parquet", "*.txt"):
        assert sorted(texts_of(str(tmp_path / source), 0)) == sorted(TEXTS)


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
    monkeypatch.setattr("minitron.data.corpus.PIECE_CHARACTERS", 500)
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
    "empty": (lambda folder: _written(folder / "empty.txt", ""), "is empty"),
    "blank": (lambda folder: _written(folder / "blank.txt", "\n\n  \n"), "is empty"),
    "binary": (lambda folder: _binary(folder / "b.txt"), "is not text|is not UTF-8"),
    "zero bytes": (lambda folder: _written(folder / "z.txt", "a\0b"), "zero bytes"),
    "not json": (lambda folder: _written(folder / "a.jsonl", "{"), "a.jsonl:1 is not valid JSON"),
    "no text field": (
        lambda folder: _written(folder / "a.jsonl", '{"body": "x"}'),
        "no 'text' field, nor 'messages' with role and content; it has body",
    ),
    "not parquet": (lambda folder: _written(folder / "a.parquet", "x"), "is not a parquet file"),
    "unknown kind": (lambda folder: _written(folder / "a.pdf", "x"), "cannot read '.pdf' files; accepted: .txt"),
    "one of several unknown": (
        lambda folder: _written(folder / "a.txt", "x").with_name("*") if _written(folder / "b.pdf", "x") else folder,
        "b.pdf: cannot read '.pdf' files",
    ),
    "folder": (lambda folder: folder, "is a folder: name its files, such as"),
    "short": (lambda folder: _written(folder / "s.txt", "too short"), "shorter than one block of 64 tokens"),
}


def _written(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_named(tmp_path: Path, case: str) -> None:
    make, message = BAD[case]
    with pytest.raises(UserError, match=message):
        read_blocks(str(make(tmp_path)), Packing(byte_tokenizer(), 258, 64))
