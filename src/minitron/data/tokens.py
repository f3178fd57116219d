"""Tokenises texts and chats; counts the bytes of text per token and marks the tokens that are learnt."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from minitron.data.chats import Array, transcript
from minitron.data.rows import Document


@dataclass(frozen=True)
class TokenisedDocument:
    """The tokens of one document; the three arrays have one length."""

    ids: Array  # (T,), int64
    num_bytes: Array  # (T,), int32: bytes of text that the token stands for
    is_learnt: Array  # (T,), bool: in a chat, the tokens of the assistant


def tokenise(batch: list[Document], tokenizer: Any) -> Iterator[TokenisedDocument]:
    """Tokenise documents, in their order.

    Raises:
        UserError: there are chats, and the tokenizer has no chat template or one that refuses a chat.
    """
    items = [document if isinstance(document, str) else transcript(document, tokenizer) for document in batch]
    texts = [item for item in items if isinstance(item, str)]
    encoded = iter(_encoded(texts, tokenizer, adds_special_tokens=True)) if texts else iter(())
    for item in items:
        if isinstance(item, str):
            ids, ends = next(encoded)
            num_bytes = _bytes_per_token(item, ends)
            if tokenizer.num_special_tokens_to_add() == 0 and tokenizer.eos_token_id is not None:
                ids, num_bytes = np.append(ids, tokenizer.eos_token_id), np.append(num_bytes, np.int32(0))
            yield TokenisedDocument(ids, num_bytes, np.ones(len(ids), dtype=bool))
        else:
            [(ids, ends)] = _encoded([item.text], tokenizer, adds_special_tokens=False)
            yield TokenisedDocument(ids, _bytes_per_token(item.text, ends), item.is_learnt(ends))


def _encoded(texts: list[str], tokenizer: Any, adds_special_tokens: bool) -> Iterator[tuple[Array, Array]]:
    """Yield, for each text, the token ids and the character offsets at which the tokens end."""
    encodings = tokenizer(
        texts, return_offsets_mapping=True, return_attention_mask=False, add_special_tokens=adds_special_tokens
    )
    for ids, offsets in zip(encodings["input_ids"], encodings["offset_mapping"], strict=True):
        yield np.array(ids, dtype=np.int64), np.array(offsets, dtype=np.int64).reshape(-1, 2)[:, 1]


def _bytes_per_token(text: str, ends: Array) -> Array:
    # Tokens may share a character or skip white space. Each token gets the bytes between the furthest end of all
    # tokens before it and its own end, so that every byte of the text is counted exactly once.
    furthest = np.maximum.accumulate(ends) if len(ends) else ends
    if text.isascii():
        bytes_up_to = furthest
    else:
        code_points = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
        widths = 1 + (code_points > 0x7F) + (code_points > 0x7FF) + (code_points > 0xFFFF)
        bytes_up_to = np.concatenate([[0], np.cumsum(widths)])[furthest]
    return np.diff(bytes_up_to, prepend=0).astype(np.int32)
