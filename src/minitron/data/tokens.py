"""Loads tokenizers; tokenises texts and chats, counts the bytes of text per token and marks tokens that are learnt."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from minitron.data.chats import Array, transcript
from minitron.data.rows import Document
from minitron.errors import UserError
from minitron.model.weights import is_pointer


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


def padding_token(tokenizer: Any, vocab_size: int) -> int:
    """Return a token of the model for what is not text: that for padding, that which ends a text, or the first one."""
    tokens = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in tokens if token is not None and token < vocab_size), 0)


def load_tokenizer(folder: Path) -> Any:
    """Load the tokenizer of a model folder; code that the folder holds is never run.

    Raises:
        UserError: the folder has no tokenizer, one that needs code of its own, or one that cannot be converted to a
            tokenizer.json, without which it cannot return the offsets of its tokens in the text.
    """
    from transformers import AutoTokenizer

    for path in sorted(folder.glob("tokenizer*")):
        if is_pointer(path):
            raise UserError(f"{path} is a Git LFS pointer, not the file itself: run git lfs pull there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises plain Exceptions
        reason = " ".join(str(error).split())
        if "trust_remote_code" in reason:
            raise UserError(
                f"{folder}: the tokenizer needs Python code of its own, which is never run here: if tokenizer.json "
                "holds all of it, remove auto_map from tokenizer_config.json and set tokenizer_class to "
                "PreTrainedTokenizerFast; otherwise convert it once where you trust that code"
            ) from error
        raise UserError(f"{folder} holds no tokenizer that can be loaded: {reason[:200]}") from error
    if not tokenizer.is_fast:
        raise UserError(f"{folder}: the tokenizer has no tokenizer.json; save it with a recent transformers first")
    tokenizer.model_max_length = int(1e30)  # documents may be longer than a context; blocks are cut afterwards
    return tokenizer
