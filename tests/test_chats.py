"""Chats are written by the tokenizer's template, and only the assistant's tokens are learnt."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch

from minitron.data.blocks import Blocks
from minitron.data.chats import Chat, transcript
from minitron.data.corpus import read_documents
from minitron.data.packing import Packing, SplitTokens, pack, read_blocks, read_splits
from minitron.data.rows import document
from minitron.data.tokens import tokenise
from minitron.distillation.objective import Objective
from minitron.distillation.teacher import Live
from minitron.errors import UserError
from minitron.evaluation.generation import TextGenerator
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


TOOL_TURNS: list[dict[str, Any]] = [
    {"role": "user", "content": "Time?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": {"name": "clock", "arguments": '{"zone": "UTC"}'}}],
    },
    {"role": "tool", "content": "noon"},
    {"role": "assistant", "content": "It is noon."},
]
SYSTEM_TURNS = [{"role": "system", "content": "Be brief."}, *MESSAGES[:2]]
THOUGHTS = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "<think>Hm</think>Hello."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "<think>Oh</think> Good bye. "},
]
AS_PARTS: list[dict[str, Any]] = [
    {"role": role, "content": [{"type": "text", "text": content[:3]}, {"type": "text", "text": content[3:]}]}
    for role, content in TURNS
]

# What templates on the hub do, each in a few words of its own.
LAST_ONE_THINKS = (  # as Qwen3: an empty block of thinking, but only in the last answer
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' and loop.last %}(){% endif %}"
    "{{ m.content }}|{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
OPENS_THINKING = (  # as DeepSeek-R1: the prompt opens a block, and answers are stripped of what is before its end
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1] | trim }}"
    "{% else %}{{ m.content }}{% endif %}|{% endfor %}{% if add_generation_prompt %}<assistant><think>{% endif %}"
)
ENDS_OTHERWISE = (  # as gpt-oss: the last answer ends with a token of its own
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if loop.last %}</s>{% else %}<s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED = (  # as SmolLM3
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content }}|"
    "{% endgeneration %}{% else %}{{ m.content }}|{% endif %}!{% endfor %}"
)
NUMBERED = "{{ messages | length }}{% for m in messages %}<{{ m.role }}>{{ m.content }}|{% endfor %}"
STRICT = (  # as Gemma 2: no system turn, and turns alternate
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "<{{ m.role }}>{{ m.content | trim }}|{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALLS = (  # as Qwen2.5 and Llama 3.1: arguments are a mapping
    "{% for t in tools or [] %}[{{ t.name }}]{% endfor %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.function.name }}({{ c.function.arguments.zone }}){% endfor %}|{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CALLS_IN_JSON = (  # as DeepSeek-V3: arguments are text, a content is required, and tools answer calls alone
    "{% for m in messages %}{% if m.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}"
    "{{ raise_exception('no call') }}{% endif %}<{{ m.role }}>{% if loop.last %}!{% endif %}{{ m['content'] + '' }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name + '=' + c.function.arguments }}{% endfor %}"
    "|{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
ONLY_PARTS = (  # as SmolVLM
    "{% for m in messages %}<{{ m.role }}>{% for p in m.content %}{{ p.text }}{% endfor %}|{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)

LEARNT: dict[str, tuple[str, list[dict[str, Any]], list[str]]] = {
    "parts": (TEMPLATE, AS_PARTS, ["Très bien.|", "And you?|"]),
    "the last answer thinks": (LAST_ONE_THINKS, MESSAGES, ["Très bien.|", "()And you?|"]),
    "the prompt opens thinking": (OPENS_THINKING, THOUGHTS, ["Hello.|", "Good bye.|"]),
    "the last answer ends otherwise": (ENDS_OTHERWISE, MESSAGES, ["Très bien.<s>", "And you?</s>"]),
    "generation marks": (MARKED, MESSAGES, ["Très bien.|", "And you?|"]),
    "no answer with generation marks": (MARKED, MESSAGES[:1], []),
    "every length rewrites the beginning": (NUMBERED, MESSAGES, ["Très bien.|", "And you?|"]),
    "contents are stripped": (STRICT, THOUGHTS, ["<think>Hm</think>Hello.|", "<think>Oh</think> Good bye.|"]),
    "a system turn is folded": (STRICT, SYSTEM_TURNS, ["Très bien.|"]),
    "the assistant begins": (TEMPLATE, MESSAGES[1:], ["Très bien.|", "And you?|"]),
    "tool calls": (CALLS, TOOL_TURNS, ["clock(UTC)|", "It is noon.|"]),
    "tool calls in JSON": (CALLS_IN_JSON, TOOL_TURNS, ['clock={"zone": "UTC"}|', "It is noon.|"]),
    "a template of parts": (ONLY_PARTS, MESSAGES, ["Très bien.|", "And you?|"]),
}


def spans_of(template: str, messages: list[dict[str, Any]]) -> list[str]:
    """Return the texts that are learnt."""
    chat = document({"messages": messages}, "chats.jsonl:1")
    assert isinstance(chat, Chat)
    found = transcript(chat, tokenizer_with(template))
    return [found.text[start:end] for start, end in found.spans]


@pytest.mark.parametrize("case", LEARNT)
def test_answers_are_found_in_whatever_a_template_writes(case: str) -> None:
    template, messages, learnt = LEARNT[case]
    assert spans_of(template, messages) == learnt


def turn_by_turn(template: str) -> list[tuple[int, int]]:
    """Return the span of each answer as the lengths of the chat before and after it."""
    tokenizer = tokenizer_with(template)

    def length(count: int, adds_prompt: bool) -> int:
        return len(tokenizer.apply_chat_template(MESSAGES[:count], tokenize=False, add_generation_prompt=adds_prompt))

    return [(length(i, True), length(i + 1, False)) for i in (1, 3)]


@pytest.mark.parametrize("template", [TEMPLATE, CALLS, STRICT, TEMPLATE.replace("|", "|\n")])
def test_templates_that_append_are_read_turn_by_turn(template: str) -> None:
    assert transcript(Chat(tuple(MESSAGES)), tokenizer_with(template)).spans == turn_by_turn(template)
    others = LAST_ONE_THINKS, OPENS_THINKING
    assert all(transcript(Chat(tuple(MESSAGES)), tokenizer_with(t)).spans != turn_by_turn(t) for t in others)


def test_a_folded_system_turn_is_written() -> None:
    chat = Chat(tuple(SYSTEM_TURNS))
    text = transcript(chat, tokenizer_with(STRICT)).text
    assert text == "<user>Be brief.\n\nWie geht’s?|<assistant>Très bien.|"
    assert "<system>Be brief.|" in transcript(chat, tokenizer_with(TEMPLATE)).text


@pytest.mark.parametrize("as_text", [False, True])
def test_tools_and_options_reach_the_template(as_text: bool) -> None:
    template = CALLS + "{% if loud %}!{% endif %}"
    row = {"tools": [{"name": "clock"}], "chat_template_kwargs": {"loud": True}, "messages": MESSAGES}
    given = {key: json.dumps(value) for key, value in row.items()} if as_text else row
    chat = document(given, "x")
    assert isinstance(chat, Chat)
    text = transcript(chat, tokenizer_with(template)).text
    assert text.startswith("[clock]<user>")
    assert text.endswith("!")


IMAGE = [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]
REFUSED: dict[str, tuple[str | None, list[dict[str, Any]], str]] = {
    "no template": (None, MESSAGES, "a.jsonl:1 is a chat, but the tokenizer has no chat template"),
    "the assistant begins": (STRICT, MESSAGES[1:], "a.jsonl:1: .* turns assistant, user, assistant: roles must alter"),
    "a system turn and no user": (STRICT, [SYSTEM_TURNS[0], MESSAGES[1]], "turns system, assistant: System role not"),
    "tool calls left out": (TEMPLATE, TOOL_TURNS, "a.jsonl:1: .*: it leaves out the tools that the assistant calls"),
    "answers left out": ("{% for m in messages %}{{ m.text }}{% endfor %}", MESSAGES, "leaves out what the assistant"),
    "an image": (TEMPLATE, IMAGE, "a.jsonl:1, turn 1 .user. holds a part of type 'image_url'; accepted: text"),
    "no content": (TEMPLATE, [MESSAGES[0], {"role": "assistant"}], "a.jsonl:1, turn 2 .assistant. has neither content"),
    "no role": (TEMPLATE, [{"content": "x"}], "a.jsonl:1, turn 1 has no role; it has content"),
    "a number": (TEMPLATE, [{"role": "user", "content": 3}], "turn 1 .user. has a number as content"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_chat_that_cannot_be_written_is_named(tmp_path: Path, case: str) -> None:
    template, messages, message = REFUSED[case]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": messages}))
    with pytest.raises(UserError, match=message):
        list(tokenise(list(read_documents(str(tmp_path / "a.jsonl"), 0)), tokenizer_with(template)))


SHAREGPT = [{"from": {"user": "human", "assistant": "gpt"}[role], "value": content} for role, content in TURNS]
TWO_TURNS = MESSAGES[:2]
ROWS: dict[str, tuple[Any, list[dict[str, Any]]]] = {
    "ShareGPT": ({"id": "1", "conversations": SHAREGPT}, MESSAGES),
    "ShareGPT with a system column": ({"system": "Be brief.", "conversations": SHAREGPT[:2]}, SYSTEM_TURNS),
    "Alpaca": (
        {"instruction": "Add.", "input": "1 1", "output": "2"},
        [{"role": "user", "content": "Add.\n\n1 1"}, {"role": "assistant", "content": "2"}],
    ),
    "Alpaca without input": ({"instruction": "Wie geht’s?", "input": "", "output": "Très bien."}, TWO_TURNS),
    "prompt and completion": ({"prompt": "Wie geht’s?", "completion": "Très bien."}, TWO_TURNS),
    "turns of prompt and completion": ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:2]}, TWO_TURNS),
    "question and answer": ({"question": "Wie geht’s?", "answer": "Très bien."}, TWO_TURNS),
    "OpenOrca": ({"system_prompt": "Be brief.", "question": TURNS[0][1], "response": TURNS[1][1]}, SYSTEM_TURNS),
    "turns alone": (MESSAGES, MESSAGES),
    "null text beside a chat": ({"text": None, "messages": MESSAGES}, MESSAGES),
}


@pytest.mark.parametrize("case", ROWS)
def test_rows_of_other_forms_are_chats(case: str) -> None:
    row, messages = ROWS[case]
    assert document(row, "x") == Chat(tuple(messages))


def test_tool_calls_are_read_alike_from_every_format(tmp_path: Path) -> None:
    rows = [{"messages": TOOL_TURNS}, {"messages": MESSAGES}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    one, other = (list(read_documents(str(tmp_path / name), 0)) for name in ("a.jsonl", "a.parquet"))
    assert one == other
    assert one != list(reversed(other))


def test_nothing_is_measured_or_learnt_without_an_answer(tmp_path: Path) -> None:
    packing, path = Packing(tokenizer_with(TEMPLATE), 258, 16), tmp_path / "chats.jsonl"
    asked, answered = {"messages": MESSAGES[:1]}, {"messages": MESSAGES}
    path.write_text("\n".join([json.dumps(asked)] * 40))
    with pytest.raises(UserError, match=r"chats\.jsonl': 10 block.* hold nothing that the assistant answers"):
        read_blocks(str(path), packing, 160)
    path.write_text("\n".join([json.dumps(asked)] * 39 + [json.dumps(answered)]))
    with pytest.raises(
        UserError, match=r"split (evaluation|heldout|train): \d+ block.* hold nothing that the assistan"
    ):
        read_splits(str(path), packing, SplitTokens(64, 64, 10_000))
    path.write_text("\n".join([json.dumps(answered)] * 40))
    splits = read_splits(str(path), packing, SplitTokens(64, 64, 10_000))
    assert all((part.targets >= 0).any() for part in (splits.evaluation, splits.heldout, splits.train))


def test_a_figure_of_no_tokens_is_an_error(chats: Blocks, tmp_path: Path) -> None:
    model = load_model(open_checkpoint(make_model(tmp_path, "llama-tied")), CPU, torch.float32)
    unanswered = Blocks(chats.ids, chats.num_bytes, torch.zeros_like(chats.ids, dtype=torch.bool))
    for blocks in (unanswered, unanswered.sliding(4)):
        with pytest.raises(UserError, match=r"perplexity: .* hold nothing that the assistant answers"):
            measure_perplexity(model, blocks)
    assert measure_perplexity(model, chats.sliding(4)).num_tokens > 0


def test_a_chat_with_a_model_names_what_its_template_refuses() -> None:
    generator = TextGenerator(None, tokenizer_with(STRICT))
    assert generator.prompt(MESSAGES[:1]).numel()
    with pytest.raises(UserError, match="the chat template refuses this chat: roles must alternate"):
        generator.prompt(MESSAGES[1:2])


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
