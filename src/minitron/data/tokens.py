"""Texts and chats to tokens, each with the bytes of text that it stands for and whether it is to be learnt."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from minitron.data.corpus import Chat, Document
from minitron.errors import UserError

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Piece:
    """A document's tokens; all three of one length."""

    ids: Array  # int64
    num_bytes: Array  # int32
    is_learnt: Array  # bool


def tokenise(batch: list[Document], tokenizer: Any) -> Iterator[Piece]:
    """The tokens of some documents, in their order.

    Raises:
        UserError: see `blocks.pack`.
    """
    texts = [document if isinstance(document, str) else _in_words(document, tokenizer) for document in batch]
    plain = [text for text in texts if isinstance(text, str)]
    encoded = iter(_encoded(plain, tokenizer, marks=True)) if plain else iter(())
    for text in texts:
        if isinstance(text, str):
            ids, ends = next(encoded)
            num_bytes = _bytes_per_token(text, ends)
            if tokenizer.num_special_tokens_to_add() == 0 and tokenizer.eos_token_id is not None:
                ids, num_bytes = np.append(ids, tokenizer.eos_token_id), np.append(num_bytes, np.int32(0))
            yield Piece(ids, num_bytes, np.ones(len(ids), dtype=bool))
        else:
            [(ids, ends)] = _encoded([text.text], tokenizer, marks=False)
            yield Piece(ids, _bytes_per_token(text.text, ends), text.is_learnt(ends))


@dataclass(frozen=True)
class _Transcript:
    """A chat in words, and where in them the assistant speaks, as pairs of characters."""

    text: str
    spans: list[tuple[int, int]]

    def is_learnt(self, ends: Array) -> Array:
        """Of tokens that end at these characters, those of the assistant."""
        found = np.zeros(len(ends), dtype=bool)
        for start, end in self.spans:
            found |= (ends > start) & (ends <= end)
        return found


def _in_words(chat: Chat, tokenizer: Any) -> _Transcript:
    if not tokenizer.chat_template:
        raise UserError("the data holds chats, but the tokenizer has no chat template: give texts, or another model")
    messages = list(chat.messages)

    def written(count: int, prompts: bool) -> str:
        return str(tokenizer.apply_chat_template(messages[:count], tokenize=False, add_generation_prompt=prompts))

    text, spans = written(len(messages), False), []
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before, through = written(i, True), written(i + 1, False)
            if not (text.startswith(before) and text.startswith(through)):
                raise UserError("the chat template rewrites earlier turns, so what the assistant says cannot be told")
            spans.append((len(before), len(through)))
    return _Transcript(text, spans)


def _encoded(texts: list[str], tokenizer: Any, marks: bool) -> Iterator[tuple[Array, Array]]:
    """Ids, and the character at which each token ends."""
    encodings = tokenizer(texts, return_offsets_mapping=True, return_attention_mask=False, add_special_tokens=marks)
    for ids, offsets in zip(encodings["input_ids"], encodings["offset_mapping"], strict=True):
        yield np.array(ids, dtype=np.int64), np.array(offsets, dtype=np.int64).reshape(-1, 2)[:, 1]


def _bytes_per_token(text: str, ends: Array) -> Array:
    # Tokens may share a character or skip white space; the bytes up to the furthest end so far, less those
    # before, deal every byte of the text to exactly one token.
    furthest = np.maximum.accumulate(ends) if len(ends) else ends
    if text.isascii():
        bytes_up_to = furthest
    else:
        code_points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        widths = 1 + (code_points > 0x7F) + (code_points > 0x7FF) + (code_points > 0xFFFF)
        bytes_up_to = np.concatenate([[0], np.cumsum(widths)])[furthest]
    return np.diff(bytes_up_to, prepend=0).astype(np.int32)
