"""Chats that the teacher answers, mixed into the training text of a run."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron import cli
from minitron.conversations import teacher_nats, write_chats
from minitron.data.blocks import Blocks
from minitron.data.prompts import built_in_prompts
from minitron.errors import UserError
from minitron.files import read_json, read_jsonl
from minitron.recipe import Recipe
from minitron.session import Session
from minitron.stages import stores_states
from tests.conftest import Verb, byte_tokenizer, make_model


def blocks(first: int, count: int, **marks: Any) -> Blocks:
    ids = torch.arange(first, first + count)[:, None].expand(-1, 4).clone()
    return Blocks(ids, torch.ones_like(ids, dtype=torch.int32), **marks)


@pytest.mark.parametrize(("share", "expected"), [(0.25, [100, 1, 2, 3, 4, 5, 6, 101]), (0.5, None), (0.01, None)])
def test_a_share_of_blocks_is_replaced(share: float, expected: list[int] | None) -> None:
    is_learnt = torch.zeros(3, 4, dtype=torch.bool)
    found = blocks(0, 8).mixed(blocks(100, 3, is_learnt=is_learnt), share)
    firsts = found.ids[:, 0].tolist()
    replaced = [first for first in firsts if first >= 100]
    assert firsts[0] == 100
    assert len(replaced) == max(1, round(8 * share))
    assert replaced == [100 + i % 3 for i in range(len(replaced))]
    assert [first for first in firsts if first < 100] == sorted(first for first in firsts if first < 100)
    assert expected is None or firsts == expected
    assert found.is_learnt is not None
    assert [bool(row.all()) for row in found.is_learnt] == [first < 100 for first in firsts]


def test_prompts_are_kept_for_measuring() -> None:
    trained, kept = built_in_prompts()
    assert len(trained) == 61
    assert len(kept) == 3
    asked = [chat.messages[0]["content"] for chat in (*trained, *kept)]
    assert len(set(asked)) == 64


def test_compress(tmp_path: Path, chatty: Path, text_file: Path, verb: Verb) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "shape: {intermediate_size: 48}\nchats: {max_new_tokens: 8}\nevaluation: {tokens: 256}\n"
        "calibration: {tokens: 256}\ndistill: {batch_size: 2}\n"
    )
    given: list[str | Path] = [
        "--recipe",
        recipe,
        "--data",
        text_file,
        "--context",
        "64",
        "--tokens",
        "2048",
        "--dtype",
        "float32",
    ]
    verb("compress", chatty, tmp_path / "run", *given, "--chats", "0.25")
    chats = read_jsonl(tmp_path / "run" / "chats.jsonl")
    assert [row["messages"][0]["content"] for row in chats[:2]] == [
        chat.messages[0]["content"] for chat in built_in_prompts()[0][:2]
    ]
    figures = read_json(tmp_path / "run" / "eval.json")
    assert {len(figures[name]["answers"]) for name in ("teacher", "pruned", "student")} == {3}
    assert all(figures[name]["answers_teacher_nats"] > 0 for name in ("teacher", "pruned", "student"))
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Greedy answers of at most 64 tokens" in page
    step = read_json(tmp_path / "run" / "student" / "minitron.json")["steps"][-1]
    assert step["chats"] == 0.25
    assert "25% of the blocks are chats" in (tmp_path / "run" / "student" / "README.md").read_text()
    session = Session(Recipe.model_validate(read_json(tmp_path / "run" / "run.json")["recipe"]))
    before = session.splits
    session.mix_in(tmp_path / "run" / "chats.jsonl")
    assert torch.equal(before.evaluation.ids, session.splits.evaluation.ids)
    assert torch.equal(before.heldout.ids, session.splits.heldout.ids)
    changed = (before.train.ids != session.splits.train.ids).any(dim=1)
    assert int(changed.sum()) == round(0.25 * len(before.train))
    # A run directory stands for its student.
    verb("tune", tmp_path / "run", tmp_path / "tuned", "--data", tmp_path / "run" / "chats.jsonl", "--context", "128",
         "--epochs", "1", "--set", "distill.batch_size=1")  # fmt: skip
    steps = [step["step"] for step in read_json(tmp_path / "tuned" / "minitron.json")["steps"]]
    assert steps == ["prune", "distill", "tune"]
    # Without chats the student is another one, and nothing is asked.
    verb("compress", chatty, tmp_path / "plain", *given)
    assert not (tmp_path / "plain" / "chats.jsonl").exists()
    assert "answers" not in read_json(tmp_path / "plain" / "eval.json")["student"]
    weights = [(tmp_path / name / "student" / "model.safetensors").read_bytes() for name in ("run", "plain")]
    assert weights[0] != weights[1]


def test_the_likelihood_is_that_of_the_answers(tmp_path: Path, chatty: Path) -> None:
    session = Session(Recipe(teacher=str(chatty), dtype="float32"))
    answers = [{"prompt": "<user>a</s><assistant>", "answer": "bcd"}, {"prompt": "<user>", "answer": ""}]
    found = teacher_nats(session, answers)
    tokenizer = byte_tokenizer()
    prompt, answer = (tokenizer(answers[0][name]).input_ids for name in ("prompt", "answer"))
    with session.teacher_model() as model, torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
    expected = -sum(float(logits[len(prompt) - 1 + i, token]) for i, token in enumerate(answer)) / 3
    assert found == pytest.approx(expected, rel=1e-4)
    assert teacher_nats(session, answers[1:]) is None


def test_how_many_chats(tmp_path: Path, chatty: Path) -> None:
    (tmp_path / "questions.txt").write_text("\n".join(f"What is {i}?" for i in range(20)))
    values = {"teacher": str(chatty), "context": 64, "dtype": "float32", "distill": {"tokens": 12_000}}
    chats = {"share": 0.1, "max_new_tokens": 2, "prompts": str(tmp_path / "questions.txt")}
    write_chats(Session(Recipe.model_validate(values | {"chats": chats})), tmp_path / "chats.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "chats.jsonl").read_text().splitlines()]
    assert len(rows) == 13  # a tenth of 12,000 tokens, 96 each
    # Fewer tokens than a block has are read again.
    longer = Session(Recipe.model_validate(values | {"chats": chats, "context": 256, "data": "wiki"}))
    longer.mix_in(tmp_path / "short.jsonl")
    (tmp_path / "short.jsonl").write_text(json.dumps(rows[0]))
    assert longer.splits.train.is_learnt is not None
    assert int((~longer.splits.train.is_learnt).any(dim=1).sum()) == max(1, round(0.1 * len(longer.splits.train)))
    assert not stores_states(Recipe.model_validate(values | {"chats": chats}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--chats", "0.1"], "chats.share: the teacher has no chat template"),
        (["--chats", "1"], "chats.share"),
        (["--prompts", "x.txt"], "prompts are answered for chats.share, which is 0"),
    ],
)
def test_what_is_refused(tmp_path: Path, text_file: Path, options: list[str], message: str) -> None:
    base = make_model(tmp_path / "base", "llama-tied")
    with pytest.raises(UserError, match=message):
        cli.app(["compress", str(base), str(tmp_path / "out"), "--target-params", "0.7", "--data", str(text_file),
                 "--context", "64", "--tokens", "2048", *options], standalone_mode=False)  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_prompts_that_are_missing(tmp_path: Path, chatty: Path, text_file: Path) -> None:
    with pytest.raises(UserError, match=r"prompts '.*missing.txt' does not exist"):
        cli.app(["compress", str(chatty), str(tmp_path / "out"), "--target-params", "0.7", "--data", str(text_file),
                 "--context", "64", "--tokens", "2048", "--chats", "0.1", "--prompts", str(tmp_path / "missing.txt")],
                standalone_mode=False)  # fmt: skip
    assert not (tmp_path / "out").exists()
