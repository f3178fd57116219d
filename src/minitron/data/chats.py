"""Writes chats by a tokenizer's chat template, and finds the assistant's answers in what it wrote."""

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from textwrap import shorten
from typing import Any

import numpy as np

from minitron.errors import UserError

Array = np.ndarray[Any, Any]
Message = dict[str, Any]
"""A turn: `role` and `content`, and whatever else a template may read, such as `tool_calls`."""

PLACEHOLDER = "\ue000\ue000"
"""Stands in the place of an answer; its character is for private use, so that no answer begins or ends with it."""
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
"""The tag with which a template marks what the assistant generates."""


@dataclass(frozen=True)
class Chat:
    """A conversation, as a chat template takes it."""

    messages: tuple[Message, ...]
    tools: tuple[Any, ...] | None = None
    """The tools that the assistant may call, each with a JSON schema of its arguments."""
    options: Message = field(default_factory=dict)
    """Further variables of the template, such as `enable_thinking`."""
    in_parts: bool = False
    """Hand contents to the template as parts, which templates of models for images expect."""
    between: str | None = field(default=None, compare=False)
    """What stands between question and answer where a tokenizer has no chat template; None: such a chat needs one."""
    where: str = field(default="", compare=False)
    """File and line, or data set and row, for error messages."""

    def __len__(self) -> int:
        return sum(len(message.get("content") or "") for message in self.messages)


@dataclass(frozen=True)
class Transcript:
    """A chat as text, with the spans of the assistant's turns as character offsets (start, end)."""

    text: str
    spans: list[tuple[int, int]]

    def is_learnt(self, ends: Array) -> Array:
        """Return whether each token, given by the offset at which it ends, belongs to the assistant."""
        inside = np.zeros(len(ends), dtype=bool)
        for start, end in self.spans:
            inside |= (ends > start) & (ends <= end)
        return inside


class RefusedError(Exception):
    """A chat template raised an error, or left out what matters; the message states the reason."""


def transcript(chat: Chat, tokenizer: Any) -> Transcript:
    """Write a chat and find the assistant's turns in it, each with the tokens that end the turn.

    The turns are those between `generation` marks where the template has them, and otherwise what the template adds
    when a turn is added to the chat. Where the template writes a turn otherwise once another one follows (Qwen3 drops
    its thinking), the turn is what changes in the whole chat when the answer is replaced by a placeholder. A system
    turn that the template refuses becomes the beginning of the user's next turn. Without a template, a question and its
    answer follow each other as plain text.

    Raises:
        UserError: the tokenizer has no chat template and the chat needs one, or the template refuses the chat.
    """
    if not tokenizer.chat_template and chat.between is not None:
        return _plain(chat, tokenizer)
    if not tokenizer.chat_template:
        raise UserError(
            f"data {chat.where} is a chat, but the tokenizer has no chat template: use texts, or another model"
        )
    refusals: list[RefusedError] = []
    for form in _forms(chat):
        try:
            return _Writer(form, tokenizer).transcript()
        except RefusedError as error:
            refusals.append(error)
    roles = ", ".join([message["role"] for message in chat.messages[:6]] + ["…"] * (len(chat.messages) > 6))
    *_, reason, _ = refusals
    raise UserError(f"data {chat.where}: the chat template cannot write a chat of turns {roles}: {reason}") from reason


def plain_question(chat: Chat, tokenizer: Any) -> str:
    """Return a question as text up to its answer, with the token that begins a document, if the tokenizer adds one."""
    begins = tokenizer.bos_token if tokenizer.bos_token_id in tokenizer("").input_ids else ""
    return str(begins) + "\n\n".join(message["content"] for message in chat.messages) + str(chat.between)


def _plain(chat: Chat, tokenizer: Any) -> Transcript:
    """Write a question and its answer as text, with the tokens that begin and end a document, for base models."""
    answer = chat.messages[-1]["content"]
    before = plain_question(replace(chat, messages=chat.messages[:-1]), tokenizer)
    text = f"{before}{answer}{tokenizer.eos_token or ''}"
    return Transcript(text, [(len(before), len(text))])


def written(tokenizer: Any, messages: list[Message], *, adds_prompt: bool = False, **options: Any) -> str:
    """Return messages as the tokenizer's chat template writes them, with `adds_prompt` up to the next answer.

    Raises:
        RefusedError: the template raises an error, for instance about a system turn.
    """
    with _refusals():
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=adds_prompt, **options)
        )


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a template is a program, which can raise anything
        raise RefusedError(shorten(str(error) or type(error).__name__, 300, placeholder=" …")) from error


def _forms(chat: Chat) -> Iterator[Chat]:
    """Yield a chat as it is, and then as other templates take it; the last but one asks for the fewest features."""
    yield chat
    complete = [{"content": "", **message} for message in chat.messages]
    yield replace(chat, messages=tuple(complete))
    yield replace(chat, messages=tuple(_with_arguments(message, json.dumps) for message in complete))
    folded = replace(chat, messages=tuple(_folded(complete)))
    yield folded
    yield replace(folded, in_parts=True)


def _folded(messages: list[Message]) -> Iterator[Message]:
    """Yield messages with every system turn put before the content of the user's turn that follows it."""
    system: Message | None = None
    for message in messages:
        if system and message["role"] == "user":
            message = {**message, "content": f"{system['content']}\n\n{message['content']}"}
        elif system:
            yield system
        system = message if message["role"] == "system" else None
        if not system:
            yield message
    if system:
        yield system


def _with_arguments(message: Message, write: Callable[[Any], Any]) -> Message:
    """Return a turn with `write` applied to the arguments of each tool call."""
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**function, "arguments": write(function.get("arguments"))}}
        for call, function in _calls(message)
    ]
    return {**message, "tool_calls": calls}


def _calls(message: Message) -> list[tuple[Message, Message]]:
    """Return the tool calls of a turn, each with the function that it names."""
    return [(call, call.get("function", call)) for call in message.get("tool_calls", [])]


@dataclass(frozen=True)
class _Writer:
    """One chat and the template that writes it."""

    chat: Chat
    tokenizer: Any

    def transcript(self) -> Transcript:
        with _refusals():
            template = self.tokenizer.get_chat_template(tools=self._tools)
        if GENERATION.search(template) and (marked := self._marked(template)).spans:
            self._require_answers(marked.text)
            return marked
        messages = list(self.chat.messages)
        text, spans, position = self._written(messages), [], 0
        self._require_answers(text)
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                start, end = self._span(text, messages, i)
                start = max(start, position)
                if start < end:  # else the template leaves this turn out
                    spans.append((start, end))
                    position = end
        return Transcript(text, spans)

    def _require_answers(self, text: str) -> None:
        """Check that answers and tool calls are written, so that a template which reads other keys is noticed."""
        answers = [message for message in self.chat.messages if message["role"] == "assistant"]
        ends = [words[-1] for message in answers if (words := message.get("content", "").split())]
        names = [str(function.get("name")) for message in answers for _, function in _calls(message)]
        for what, words in (("what the assistant answers", ends), ("the tools that the assistant calls", names)):
            if words and not any(word in text for word in words):
                raise RefusedError(f"it leaves out {what}")

    @property
    def _tools(self) -> list[Any] | None:
        return list(self.chat.tools) if self.chat.tools else None

    def _written(self, messages: list[Message], *, adds_prompt: bool = False) -> str:
        options = {"tools": self._tools, **self.chat.options}
        return written(self.tokenizer, self._given(messages), adds_prompt=adds_prompt, **options)

    def _given(self, messages: list[Message]) -> list[Message]:
        if not self.chat.in_parts:
            return messages
        return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]

    def _marked(self, template: str) -> Transcript:
        """Return the chat with the spans that the template marks as generated."""
        from transformers.utils.chat_template_utils import render_jinja_template

        messages = self._given(list(self.chat.messages))
        variables = {**self.tokenizer.special_tokens_map, **self.chat.options}
        with _refusals():
            [text], [spans] = render_jinja_template(
                [messages], self._tools, chat_template=template, return_assistant_tokens_mask=True, **variables
            )
        return Transcript(text, [(start, end) for start, end in spans if start < end])

    def _span(self, text: str, messages: list[Message], number: int) -> tuple[int, int]:
        """Return where turn `number` begins and ends in the whole text; an empty span if it is left out."""
        start = self._length_if_prefix(text, messages[:number], adds_prompt=True)
        end = self._length_if_prefix(text, messages[: number + 1])
        if start is not None and end is not None:
            return start, end
        first, last = self._changed(text, messages, number)
        if first >= last:
            return first, first
        return first if start is None else start, last + self._closing(text[last:], messages[: number + 1])

    def _length_if_prefix(self, text: str, messages: list[Message], *, adds_prompt: bool = False) -> int | None:
        try:
            part = self._written(messages, adds_prompt=adds_prompt)
        except RefusedError:  # a part of a chat may be refused where the whole is not
            return None
        return len(part) if text.startswith(part) else None

    def _changed(self, text: str, messages: list[Message], number: int) -> tuple[int, int]:
        """Return the span of the text that changes when the answer of turn `number` is replaced."""
        other = self._written_without(messages, number)
        if other == text:
            return 0, 0
        first = _common(text, other)
        shortest = min(len(text), len(other)) - first
        return first, len(text) - min(shortest, _common(text[::-1], other[::-1]))

    def _written_without(self, messages: list[Message], number: int) -> str:
        """Return the chat with a placeholder for an answer and all that belongs to it; its tool calls may stay."""
        answer = messages[number]
        plain = {"role": "assistant", "content": PLACEHOLDER}
        before, after = messages[:number], messages[number + 1 :]
        try:
            return self._written([*before, plain, *after])
        except RefusedError:  # the template may refuse the output of a tool that was not called
            return self._written([*before, _with_placeholders(answer), *after])

    def _closing(self, rest: str, messages: list[Message]) -> int:
        """Return how many characters of `rest`, which follows an answer, end the turn: mostly one special token.

        They are what the template writes after the answer where the chat ends there. If it writes another token there
        (gpt-oss: `<|return|>` for `<|end|>`), they are the special token with which `rest` begins.
        """
        with suppress(RefusedError):
            alone, other = self._written(messages), self._written_without(messages, len(messages) - 1)
            closing = alone[len(alone) - _common(alone[::-1], other[::-1]) :]
            for ending in (closing, closing.rstrip()):
                if rest.startswith(ending):
                    return len(ending)
        special = (str(token) for token in self.tokenizer.added_tokens_decoder.values())
        return max((len(token) for token in special if rest.startswith(token)), default=0)


def _with_placeholders(answer: Message) -> Message:
    """Return an answer that calls the same tools, with placeholders for its content and the tools' arguments."""
    content = {"content": PLACEHOLDER} if "content" in answer else {}
    return _with_arguments(
        {**answer, **content},
        lambda given: dict.fromkeys(given, PLACEHOLDER) if isinstance(given, dict) else PLACEHOLDER,
    )


def _common(one: str, other: str) -> int:
    """Return the number of characters with which both texts begin."""
    differing = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))
