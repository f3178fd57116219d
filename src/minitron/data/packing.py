"""Packs tokens into fixed-length blocks and splits them into train, held-out and evaluation."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minitron.data.blocks import Blocks, Whole
from minitron.data.chats import Array
from minitron.data.corpus import read_documents
from minitron.data.rows import Document
from minitron.data.spelling import TokenStream, align
from minitron.data.tokens import TokenisedDocument, padding_token, tokenise
from minitron.errors import UserError
from minitron.progress import Progress
from minitron.recipe import Data, Documents, data_in_words

HELDOUT_PART = 16
"""Held-out text is a sixteenth of the data that a model is tuned on, or less."""
BATCH_DOCUMENTS = 64
"""The number of documents that are tokenised in one call of the tokenizer."""


@dataclass(frozen=True)
class Packing:
    """How documents become blocks."""

    tokenizer: Any
    vocab_size: int
    """The number of tokens that the model has embeddings for."""
    context: int
    """The number of tokens in a block."""
    seed: int = 0
    """Decides the order of the documents."""
    documents: Documents = "joined"
    """How documents share a block, see `distill.documents`."""
    can_share: bool = True
    """Whether several documents that are kept whole may share a block; where attention would cross them, none do."""
    whole_tokenizer: Any = None
    """The tokenizer of a teacher that has more tokens, with which the text is written as well (`Blocks.whole`)."""

    @property
    def keeps_apart(self) -> bool:
        """Whether blocks mark where documents begin."""
        return self.documents == "apart" or (self.documents == "whole" and self.can_share)

    def gap(self, num_tokens: int, length: int) -> int:
        """Return the tokens of padding between `num_tokens` tokens and a document of `length` tokens after them."""
        left = -num_tokens % self.context
        return left if self.documents == "whole" and (length > left or not self.can_share) else 0


@dataclass(frozen=True)
class SplitTokens:
    """The number of tokens to read for each split."""

    evaluation: int
    heldout: int
    train: int
    skipped: int = 0
    """Training tokens to pass over; at the end of the text, training begins again at its first training block."""


@dataclass(frozen=True)
class Splits:
    """Blocks by purpose, in the order of the corpus; no block is in two splits."""

    evaluation: Blocks
    """Used by the final evaluation alone."""
    heldout: Blocks
    """Ranks candidates and measures progress during distillation."""
    train: Blocks
    """Used by calibration, which takes the first blocks, and by distillation."""

    def fingerprint(self) -> str:
        """Return the SHA-256 of the blocks of all splits, in their order."""
        parts = (self.evaluation, self.heldout, self.train)
        return sha256(" ".join(part.fingerprint() for part in parts).encode()).hexdigest()


def read_blocks(data: Data, packing: Packing, max_tokens: int | None = None) -> Blocks:
    """Read, tokenise and pack the documents of `data`, up to `max_tokens` tokens of them.

    Raises:
        UserError: see `read_documents`, `pack` and `require_targets`; also when the text is shorter than one block.
    """
    max_blocks = None if max_tokens is None else max(1, max_tokens // packing.context)
    total = None if max_blocks is None else max_blocks * packing.context
    with Progress("tokenise", total) as progress:
        blocks = pack(read_documents(data, packing.seed), packing, max_blocks, progress)
    if not len(blocks):
        raise UserError(
            f"data '{data_in_words(data)}' is shorter than one block of {packing.context} tokens: lower --context"
        )
    blocks.require_targets(f"data '{data_in_words(data)}'")
    return blocks


def pack(
    documents: Iterable[Document], packing: Packing, max_blocks: int | None = None, progress: Progress | None = None
) -> Blocks:
    """Join the tokens of documents and cut them into at most `max_blocks` blocks; an incomplete last block is dropped.

    Documents that are kept whole begin a new block where the last one lacks the room; what is left there is padding,
    of which nothing is learnt, as at the end of the last block.

    A text gets the special tokens that the tokenizer adds, or an EOS token at its end if the tokenizer adds none. A
    chat is written by the tokenizer's chat template, and only the assistant's turns are learnt.

    Raises:
        UserError: the tokenizer returns a token that the model does not have; or there are chats, and the tokenizer
            has no chat template or one that refuses a chat.
    """
    context = packing.context
    parts: list[TokenisedDocument] = []
    whole_parts: list[TokenisedDocument] = []
    num_tokens, limit = 0, None if max_blocks is None else max_blocks * context
    iterator = iter(documents)
    while (limit is None or num_tokens < limit) and (batch := list(islice(iterator, BATCH_DOCUMENTS))):
        before = num_tokens
        for part in tokenise(batch, packing.tokenizer):
            if (highest := int(part.ids.max(initial=0))) >= packing.vocab_size:
                raise UserError(
                    f"tokenizer and model do not fit together: the tokenizer returns token {highest}, the model has "
                    f"only {packing.vocab_size} tokens"
                )
            if gap := packing.gap(num_tokens, len(part.ids)):
                parts.append(_padding(gap, packing))
            parts.append(part)
            num_tokens += gap + len(part.ids)
        if packing.whole_tokenizer is not None:
            whole_parts.extend(tokenise(batch, packing.whole_tokenizer))
        if progress:
            progress.advance(min(num_tokens, limit or num_tokens) - before)
    if packing.documents == "whole" and (rest := -num_tokens % context):
        parts.append(_padding(rest, packing))
        num_tokens += rest
    num_blocks = num_tokens // context if max_blocks is None else min(max_blocks, num_tokens // context)
    if not num_blocks:
        return Blocks(torch.zeros(0, context, dtype=torch.int64), torch.zeros(0, context, dtype=torch.int32))
    stream = _stream(parts, packing.tokenizer)

    def blocks_of(array: Array) -> Tensor:
        return torch.from_numpy(array[: num_blocks * context].copy()).view(num_blocks, context)

    is_learnt = blocks_of(stream.is_learnt)
    whole = _whole(stream, _stream(whole_parts, packing.whole_tokenizer), packing, num_blocks) if whole_parts else None
    return Blocks(
        blocks_of(stream.ids),
        blocks_of(stream.num_bytes),
        None if is_learnt.all() else is_learnt,
        blocks_of(stream.is_first) if packing.keeps_apart else None,
        whole,
    )


def _padding(length: int, packing: Packing) -> TokenisedDocument:
    token = padding_token(packing.tokenizer, packing.vocab_size)
    return TokenisedDocument(
        np.full(length, token, dtype=np.int64), np.zeros(length, dtype=np.int32), np.zeros(length, dtype=bool)
    )


def _stream(parts: list[TokenisedDocument], tokenizer: Any) -> TokenStream:
    """Join the tokens of documents."""
    ids, num_bytes, is_learnt = (
        np.concatenate([getattr(part, name) for part in parts]) for name in ("ids", "num_bytes", "is_learnt")
    )
    # Special tokens that a tokenizer adds stand for no text; one byte each keeps their places apart.
    is_special = np.isin(ids, tokenizer.all_special_ids) & (num_bytes == 0)
    is_first = np.concatenate([np.arange(len(part.ids)) == 0 for part in parts])
    return TokenStream(ids, np.cumsum(num_bytes + is_special, dtype=np.int64), is_learnt, num_bytes, is_first)


def _whole(student: TokenStream, teacher: TokenStream, packing: Packing, num_blocks: int) -> Whole:
    """Return the text of blocks in the tokens of the teacher; padding repeats a token, and nothing is learnt of it."""
    context = packing.context
    first, stop, places = align(student, teacher, context, num_blocks)
    positions = first[:, None] + np.arange(context)
    is_text = positions < stop[:, None]
    positions = np.where(is_text, positions, 0)

    def rows(array: Array, padding: int | bool) -> Tensor:
        return torch.from_numpy(np.where(is_text, array[positions], np.array(padding, dtype=array.dtype)))

    blocks = Blocks(
        rows(teacher.ids, 0),
        rows(teacher.num_bytes, 0),
        rows(teacher.is_learnt, False),
        rows(teacher.is_first, False) if packing.keeps_apart else None,
    )
    following = np.append(student.ids[1:], student.ids[-1])[: num_blocks * context].reshape(num_blocks, context)
    return Whole(blocks, torch.from_numpy(places), torch.from_numpy(following.copy()))


def read_repeatedly(data: Data, packing: Packing) -> Blocks:
    """Read all documents of `data`, as often as it takes to fill a block.

    Raises:
        UserError: see `read_documents` and `pack`.
    """
    documents = list(read_documents(data, packing.seed))
    num_tokens = sum(len(part.ids) for part in tokenise(documents, packing.tokenizer))
    return pack(documents * math.ceil(packing.context / max(1, num_tokens)), packing)


def read_examples(data: Data, packing: Packing, heldout_tokens: int) -> Splits:
    """Read all of `data` to learn from, without an evaluation split; held-out text gets at most a sixteenth of it.

    Raises:
        UserError: see `read_blocks`; also when there are fewer than two blocks, or when the blocks of a split hold no
            token to predict.
    """
    blocks = read_blocks(data, packing)
    if len(blocks) < 2:
        raise UserError(
            f"data '{data_in_words(data)}' has one block of {packing.context} tokens; training and held-out text need "
            "at least one each: add data or lower --context"
        )
    num_heldout = max(1, min(heldout_tokens // packing.context, len(blocks) // HELDOUT_PART))
    splits = Splits(blocks[:0], blocks[:num_heldout], blocks[num_heldout:])
    for name in ("heldout", "train"):
        getattr(splits, name).require_targets(f"data '{data_in_words(data)}', split {name}")
    return splits


def read_splits(data: Data, packing: Packing, tokens: SplitTokens) -> Splits:
    """Read as much of `data` as all splits need; evaluation gets the first blocks, then held-out, then train.

    If the corpus is too short for all of them, evaluation and held-out get at most a fifth of it each. With
    `packing.keeps_apart`, only the training blocks mark where documents begin; attention crosses documents in the
    others.

    Raises:
        UserError: see `read_blocks`; also when there are fewer than three blocks, one for each split, or when the
            blocks of a split hold no token to predict.
    """
    context = packing.context
    skipped = tokens.skipped // context
    wanted = [max(1, count // context) for count in (tokens.evaluation, tokens.heldout, tokens.train)]
    wanted[-1] += skipped
    blocks = read_blocks(data, packing, sum(wanted) * context)
    if len(blocks) < 3:
        raise UserError(
            f"data '{data_in_words(data)}' has {len(blocks)} block(s) of {context} tokens; training, held-out and "
            "evaluation need at least one each: add text or lower --context"
        )
    most = len(blocks) if len(blocks) == sum(wanted) else max(1, len(blocks) // 5)
    num_evaluation, num_heldout = min(wanted[0], most), min(wanted[1], most)
    first_train = num_evaluation + num_heldout
    measured = replace(blocks[:first_train], starts=None)
    train = blocks[first_train:]
    if skipped:
        order = torch.arange(len(train)).roll(-skipped)
        train = train[order[: wanted[-1] - skipped]]
    splits = Splits(measured[:num_evaluation], measured[num_evaluation:], train)
    for name in ("evaluation", "heldout", "train"):
        getattr(splits, name).require_targets(f"data '{data_in_words(data)}', split {name}")
    return splits
