"""Answers to prompts as data, and models merged linearly."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron import cli
from minitron.data.chats import Chat, transcript
from minitron.data.corpus import read_documents
from minitron.data.prompts import read_prompts
from minitron.errors import UserError
from minitron.evaluation import answering
from minitron.evaluation.generation import Sampling
from minitron.history import history_of
from minitron.model.checkpoint import open_checkpoint
from minitron.model.language_model import load_model
from tests.conftest import CHAT, Verb, byte_tokenizer, make_model

CPU = torch.device("cpu")
QUESTIONS = ["What is a river?", "Name a prime.", "Say nothing at all, please.", "Why?", "How many?"]


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "What is a river?\n\nName a prime.\n"),
        ("a.jsonl", '{"prompt": "What is a river?"}\n{"prompt": "Name a prime."}\n'),
        ("a.jsonl", '{"question": "What is a river?"}\n{"question": "Name a prime.", "answer": "7"}\n'),
        ("a.json", '[{"text": "What is a river?"}, "Name a prime."]'),
        ("a.json", '{"type": "text2text", "instances": [{"input": "What is a river?"}, {"input": "Name a prime."}]}'),
        ("a.jsonl", "\n".join(json.dumps({"messages": [{"role": "user", "content": text}, *more]})
                              for text, more in (("What is a river?", []), ("Name a prime.",
                                                 [{"role": "assistant", "content": "7"}])))),
        ("a.csv", "instruction\nWhat is a river?\nName a prime.\n"),
    ],
)  # fmt: skip
def test_prompts(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    chats = read_prompts(tmp_path / name)
    assert [[message["role"] for message in chat.messages] for chat in chats] == [["user"], ["user"]]
    assert [chat.messages[-1]["content"] for chat in chats] == QUESTIONS[:2]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"prompt": "a"}\n{"promt": "b"}', "a.jsonl:2 has no column that is read"),
        ("a.jsonl", '{"messages": [{"role": "assistant", "content": "b"}]}', "a.jsonl:1 holds nothing to answer"),
        ("a.jsonl", "", "is empty"),
        ("a.bin", "x", "cannot read '.bin' files"),
    ],
)
def test_prompts_that_do_not_fit(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=re.escape(message)):
        read_prompts(tmp_path / name)
    with pytest.raises(UserError, match="does not exist"):
        read_prompts(tmp_path / "missing.jsonl")


def test_prompts_in_parquet(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist([{"question": text, "number": 1} for text in QUESTIONS])
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [chat.messages[0]["content"] for chat in read_prompts(tmp_path / "a.parquet")] == QUESTIONS


def test_an_answer_ends_where_the_tokenizer_ends_a_text(chatty: Path) -> None:
    """Also where the generation config of the model names no such token."""
    model, tokenizer = load_model(open_checkpoint(chatty), CPU, torch.float32), byte_tokenizer()
    tokenizer.chat_template = CHAT
    answerer = answering.Answerer(model, tokenizer, Sampling(max_new_tokens=6))
    [(whole, is_finished)] = answerer.answers(["<user>a</s><assistant>"], 0)
    assert not is_finished
    first = tokenizer(whole).input_ids[1]
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(first)
    model.generation_config.eos_token_id = None
    [(answer, is_finished)] = answerer.answers(["<user>a</s><assistant>"], 0)
    assert is_finished
    assert len(answer) <= 1


def test_batches_answer_like_single_prompts(chatty: Path) -> None:
    model, tokenizer = load_model(open_checkpoint(chatty), CPU, torch.float32), byte_tokenizer()
    tokenizer.chat_template = CHAT
    answerer = answering.Answerer(model, tokenizer, Sampling(max_new_tokens=12))
    prompts = [f"<user>{text}</s><assistant>" for text in QUESTIONS]
    together = answerer.answers(prompts, 0)
    assert together == [answerer.answers([prompt], 0)[0] for prompt in prompts]
    assert len({answer for answer, _ in together}) > 1


@pytest.mark.parametrize("temperature", ["0", "1.5"])
def test_generate(tmp_path: Path, chatty: Path, verb: Verb, monkeypatch: pytest.MonkeyPatch, temperature: str) -> None:
    (tmp_path / "questions.txt").write_text("\n".join(QUESTIONS))
    given: list[str | Path] = ["--prompts", tmp_path / "questions.txt", "--max-new-tokens", "8", "--batch-size", "2",
                               "--temperature", temperature, "--dtype", "float32"]  # fmt: skip
    result = verb("generate", chatty, tmp_path / "through.jsonl", *given)
    assert result["answers"] == 5
    rows = rows_of(tmp_path / "through.jsonl")
    assert [row["messages"][0]["content"] for row in rows] == QUESTIONS
    assert result["finished"] == sum(row["finished"] for row in rows)
    calls: list[int] = []
    answers = answering.Answerer.answers

    def killed(self: answering.Answerer, prompts: list[str], number: int) -> Any:
        if len(calls) == 2:
            raise RuntimeError
        calls.append(number)
        return answers(self, prompts, number)

    with monkeypatch.context() as patch:
        patch.setattr(answering.Answerer, "answers", killed)
        with pytest.raises(RuntimeError):
            cli.app(["generate", str(chatty), str(tmp_path / "killed.jsonl"), *map(str, given)], standalone_mode=False)
    assert calls == [0, 2]
    assert not (tmp_path / "killed.jsonl").exists()
    calls.clear()

    def counted(self: answering.Answerer, prompts: list[str], number: int) -> Any:
        calls.append(number)
        return answers(self, prompts, number)

    monkeypatch.setattr(answering.Answerer, "answers", counted)
    verb("generate", chatty, tmp_path / "killed.jsonl", *given)
    assert calls == [4]
    assert rows_of(tmp_path / "killed.jsonl") == rows
    assert [path.name for path in tmp_path.glob(".*")] == []
    calls.clear()
    verb("generate", chatty, tmp_path / "killed.jsonl", *given, "--overwrite", "--seed", "1")
    assert calls == [0, 2, 4]
    # What is written is data.
    assert len(list(read_documents(str(tmp_path / "through.jsonl"), 0))) == 5
    with pytest.raises(UserError, match="exists: choose another file or pass --overwrite"):
        cli.app(["generate", str(chatty), str(tmp_path / "killed.jsonl"), *map(str, given)], standalone_mode=False)


def test_a_base_model_continues(tmp_path: Path, verb: Verb) -> None:
    base = make_model(tmp_path / "base", "llama-tied")
    (tmp_path / "questions.txt").write_text("\n".join(QUESTIONS[:2]))
    verb("generate", base, tmp_path / "a.jsonl", "--prompts", tmp_path / "questions.txt", "--max-new-tokens", "4")
    assert [row["prompt"] for row in rows_of(tmp_path / "a.jsonl")] == QUESTIONS[:2]
    (tmp_path / "rows.jsonl").write_text('{"question": "Why?"}')
    verb("generate", base, tmp_path / "c.jsonl", "--prompts", tmp_path / "rows.jsonl", "--max-new-tokens", "4")
    [row] = rows_of(tmp_path / "c.jsonl")
    # When it is read as data, the answer follows what the model has seen.
    assert row["prompt"] == "Why?\n\n"
    [found] = list(read_documents(str(tmp_path / "c.jsonl"), 0))
    assert isinstance(found, Chat)
    assert transcript(found, byte_tokenizer()).text == f"{row['prompt']}{row['completion']}</s>"
    (tmp_path / "chats.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}')
    with pytest.raises(UserError, match=r"chats.jsonl:1 is a chat, but the tokenizer has no chat template"):
        cli.app(["generate", str(base), str(tmp_path / "b.jsonl"), "--prompts", str(tmp_path / "chats.jsonl")],
                standalone_mode=False)  # fmt: skip
    with pytest.raises(UserError, match="above the 256 that the model was made for"):
        cli.app(["generate", str(base), str(tmp_path / "b.jsonl"), "--prompts", str(tmp_path / "questions.txt"),
                 "--max-new-tokens", "250"], standalone_mode=False)  # fmt: skip


def test_merge(tmp_path: Path, verb: Verb) -> None:
    one, other = (make_model(tmp_path / name, "llama-tied", seed=seed) for name, seed in (("one", 0), ("other", 1)))
    for weight in (0.0, 0.25, 1.0):
        verb("merge", one, other, tmp_path / f"{weight}", "--weight", weight)
        models = [open_checkpoint(folder) for folder in (one, other, tmp_path / f"{weight}")]
        for name in models[0].tensors:
            a, b, merged = (model.tensor(name) for model in models)
            torch.testing.assert_close(merged, (1 - weight) * a + weight * b, atol=1e-6, rtol=1e-6)
    assert not torch.equal(a, b)
    assert history_of(tmp_path / "0.25").steps[-1]["weight"] == 0.25
    assert "0.75 of one, 0.25 of other" in (tmp_path / "0.25" / "README.md").read_text()
    load_model(open_checkpoint(tmp_path / "0.25"), CPU, torch.float32)


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("llama-tied", {"intermediate_size": 48}, "only models of one shape can be merged"),
        ("llama", {}, "only one of them has lm_head.weight"),
        ("qwen3-tied", {}, "is a qwen3 model"),
    ],
)
def test_models_that_differ_are_not_merged(tmp_path: Path, variant: str, changes: dict[str, Any], message: str) -> None:
    one, other = make_model(tmp_path / "one", "llama-tied"), make_model(tmp_path / "other", variant, **changes)
    with pytest.raises(UserError, match=message):
        cli.app(["merge", str(one), str(other), str(tmp_path / "out")], standalone_mode=False)
    with pytest.raises(UserError, match="--weight 2: accepted"):
        cli.app(["merge", str(one), str(one), str(tmp_path / "out"), "--weight", "2"], standalone_mode=False)
    assert not (tmp_path / "out").exists()
