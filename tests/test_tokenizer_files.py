"""Tokenizers that exist as a SentencePiece model or as tiktoken's ranks alone."""

import base64
import json
from pathlib import Path

import pytest
import sentencepiece

from minitron.data.tokens import load_tokenizer
from tests.conftest import Verb, make_model
from tests.small_tokenizers import LINES, byte_level

TEXT = "The value of an expression is the value of the sum; Grüße, élève 🙂."


def without_tokenizer(folder: Path, config: dict[str, str]) -> Path:
    """Make a model whose folder holds a tokenizer's config and none of its other files."""
    make_model(folder, "llama", vocab_size=1024)
    for path in folder.glob("tokenizer*"):
        path.unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def sentencepiece_only(tmp_path: Path) -> Path:
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    folder = without_tokenizer(tmp_path / "model", config)
    (tmp_path / "lines.txt").write_text(LINES)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "lines.txt"), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=900,
        byte_fallback=True, character_coverage=0.99, minloglevel=2, normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    return folder


@pytest.fixture
def tiktoken_only(tmp_path: Path) -> Path:
    folder = without_tokenizer(tmp_path / "model", {"tokenizer_class": "PreTrainedTokenizerFast"})
    ranks = [bytes([byte]) for byte in range(256)]
    vocab = byte_level().get_vocab()
    words = [token for token in sorted(vocab, key=lambda token: vocab[token]) if token.isascii() and len(token) > 1]
    ranks += [token.encode() for token in words]
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(ranks))
    (folder / "tokenizer.model").write_text("".join(lines))
    return folder


def test_a_sentencepiece_model_alone_is_read_as_sentencepiece_reads_it(sentencepiece_only: Path) -> None:
    own = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_only / "tokenizer.model"))
    tokenizer = load_tokenizer(sentencepiece_only)
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == own.encode(TEXT)
    assert tokenizer.decode(own.encode(TEXT)).strip() == TEXT
    assert own.encode(TEXT) != own.encode(TEXT.upper())


def test_ranks_of_tiktoken_alone_are_read_as_tiktoken_reads_them(tiktoken_only: Path) -> None:
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    tokenizer = load_tokenizer(tiktoken_only)
    pattern = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
    ranks = load_tiktoken_bpe(str(tiktoken_only / "tokenizer.model"))
    own = tiktoken.Encoding("own", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    assert tokenizer(TEXT, add_special_tokens=False)["input_ids"] == own.encode(TEXT)
    assert len(own.encode(TEXT)) < len(TEXT.encode())
    assert tokenizer.decode(own.encode(TEXT)) == TEXT


@pytest.mark.parametrize("kind", ["sentencepiece_only", "tiktoken_only"])
def test_a_student_has_the_tokenizer_of_such_a_teacher(
    tmp_path: Path, verb: Verb, text_file: Path, kind: str, request: pytest.FixtureRequest
) -> None:
    teacher = request.getfixturevalue(kind)
    verb("prune", teacher, tmp_path / "out", "--intermediate-size", "32", "--data", text_file, "--context", "32")
    expected = load_tokenizer(teacher)(TEXT)["input_ids"]
    assert load_tokenizer(tmp_path / "out")(TEXT)["input_ids"] == expected
