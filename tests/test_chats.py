"""Chats are written by the tokenizer's template, and only the assistant's tokens are learnt."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

from minitron.data.blocks import Blocks, Packing, pack
from minitron.data.corpus import Chat, read_documents
from minitron.data.tokens import tokenise
from minitron.distillation.objective import Objective
from minitron.distillation.teacher import Live
from minitron.errors import UserError
from minitron.evaluation.perplexity import measure_perplexity
from minitron.model.checkpoint import open_checkpoint
from minitron.model.language_model import Headless, load_model
from minitron.recipe import DistillRecipe
from minitron.runtime import Runtime
from tests.conftest import byte_tokenizer, make_model

CPU = torch.device("cpu")
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}|{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TURNS = [("user", "Wie geht’s?"), ("assistant", "Très bien."), ("user", "ok"), ("assistant", "And you?")]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]


def tokenizer_with(template: str | None) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def test_the_assistants_tokens_are_learnt() -> None:
    tokenizer = tokenizer_with(TEMPLATE)
    [piece] = tokenise([Chat(tuple(MESSAGES))], tokenizer)
    text = "".join(f"<{role}>{content}|" for role, content in TURNS)
    assert tokenizer.decode(piece.ids) == text
    assert int(piece.num_bytes.sum()) == len(text.encode())
    assert tokenizer.decode(piece.ids[piece.is_learnt]) == "Très bien.|And you?|"


def test_texts_and_chats_can_be_mixed() -> None:
    tokenizer, chat = tokenizer_with(TEMPLATE), Chat(tuple(MESSAGES))
    pieces = list(tokenise(["plain", chat, "words"], tokenizer))
    alone = [piece for document in ("plain", chat, "words") for piece in tokenise([document], tokenizer)]
    for piece, expected in zip(pieces, alone, strict=True):
        assert (piece.ids == expected.ids).all()
        assert (piece.is_learnt == expected.is_learnt).all()
    blocks = pack(["plain", chat, "words"], Packing(tokenizer, 258, 8))
    assert blocks.is_learnt is not None
    assert (
        blocks.is_learnt.flatten().tolist()
        == [bool(x) for piece in alone for x in piece.is_learnt][: blocks.num_tokens]
    )
    assert pack(["plain", "words"], Packing(tokenizer, 258, 4)).is_learnt is None


def test_every_format_gives_the_same_chats(tmp_path: Path) -> None:
    rows = [{"messages": MESSAGES}, {"messages": MESSAGES[:2]}]
    (tmp_path / "chats.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    pyarrow.parquet.write_table(pyarrow.table({"messages": [row["messages"] for row in rows]}), tmp_path / "c.parquet")
    for name in ("chats.jsonl", "c.parquet"):
        found = sorted(read_documents(str(tmp_path / name), 0), key=len)
        assert found == [Chat(tuple(MESSAGES[:2])), Chat(tuple(MESSAGES))]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "the tokenizer has no chat template"),
        ("{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}", "rewrites earlier turns"),
    ],
)
def test_chats_without_a_usable_template_are_refused(template: str | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(tokenise([Chat(tuple(MESSAGES))], tokenizer_with(template)))


def test_rows_without_text_or_chat_are_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(json.dumps({"messages": [{"role": "user"}]}))
    with pytest.raises(UserError, match=r"bad\.jsonl:1 has no 'text' field, nor 'messages' .*; it has messages"):
        list(read_documents(str(tmp_path / "bad.jsonl"), 0))


@pytest.fixture
def chats() -> Blocks:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 258, (4, 24), generator=generator)
    return Blocks(ids, torch.ones(4, 24, dtype=torch.int32), torch.rand(4, 24, generator=generator) < 0.4)


def test_only_the_assistants_tokens_are_measured(chats: Blocks, tmp_path: Path) -> None:
    model = load_model(open_checkpoint(make_model(tmp_path, "llama-tied")), CPU, torch.float32)
    assert chats.is_learnt is not None
    with torch.no_grad():
        logits = model(chats.ids).logits[:, :-1].log_softmax(dim=-1)
    nll = -logits.gather(-1, chats.ids[:, 1:, None]).squeeze(-1)
    figures = measure_perplexity(model, chats)
    learnt = chats.is_learnt[:, 1:]
    assert figures.num_tokens == int(learnt.sum())
    assert figures.perplexity == pytest.approx(float(nll[learnt].mean().exp()), rel=1e-4)
    assert figures.perplexity != pytest.approx(float(nll.mean().exp()), rel=1e-2)


@pytest.mark.parametrize("label_weight", [0.0, 0.5])
def test_only_the_assistants_tokens_are_learnt(chats: Blocks, tmp_path: Path, label_weight: float) -> None:
    teacher = load_model(open_checkpoint(make_model(tmp_path / "teacher", "llama-tied")), CPU, torch.float64)
    student = load_model(open_checkpoint(make_model(tmp_path / "student", "llama-tied", 1)), CPU, torch.float64)
    recipe = DistillRecipe(batch_size=4, micro_batch_size=3, label_weight=label_weight)
    objective = Objective(Live(teacher), recipe, Runtime(torch.device("cpu"), torch.float64))
    loss, *_ = objective.accumulate(Headless(student), chats, torch.arange(4))
    found = {name: parameter.grad for name, parameter in student.named_parameters()}
    student.zero_grad()
    assert chats.is_learnt is not None
    log_q = student(chats.ids).logits.log_softmax(dim=-1)
    log_p = teacher(chats.ids).logits.log_softmax(dim=-1).detach()
    learnt = torch.cat([chats.is_learnt[:, 1:], chats.is_learnt[:, -1:]], dim=1)
    expected = (log_p.exp() * (log_p - log_q)).sum(dim=-1)[learnt].mean()
    nll = -log_q[:, :-1].gather(-1, chats.ids[:, 1:, None]).squeeze(-1)
    expected = expected + label_weight * nll[chats.is_learnt[:, 1:]].mean()
    expected.backward()
    torch.testing.assert_close(loss, expected.detach(), atol=1e-10, rtol=1e-9)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, atol=1e-10, rtol=1e-7)
    everything = Blocks(chats.ids, chats.num_bytes)
    other, *_ = objective.accumulate(Headless(student), everything, torch.arange(4))
    assert abs(float(other - loss)) > 1e-3
