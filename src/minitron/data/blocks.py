"""Documents to tokens to packed blocks of equal length, and which stage sees which blocks."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minitron.data.corpus import Document, documents
from minitron.data.tokens import Array, Piece, tokenise
from minitron.errors import UserError
from minitron.progress import Progress
from minitron.recipe import Data, data_in_words

DOCUMENTS_AT_ONCE = 64


@dataclass(frozen=True)
class Blocks:
    """Packed text: token ids (N, context) and how many bytes of the text each token stands for."""

    ids: Tensor  # (N, context), int64
    num_bytes: Tensor  # (N, context), int32
    is_learnt: Tensor | None = None
    """(N, context), bool: tokens that a model is to predict, in chats those of the assistant; None: all."""
    starts: Tensor | None = None
    """(N, context), bool: first tokens of documents, where these are kept apart; None: attention runs on."""

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, part: slice | Tensor) -> "Blocks":
        is_learnt, starts = (None if marks is None else marks[part] for marks in (self.is_learnt, self.starts))
        return Blocks(self.ids[part], self.num_bytes[part], is_learnt, starts)

    def split(self, size: int) -> "list[Blocks]":
        """Parts of so many blocks, the last one of fewer."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def sliding(self, stride: int) -> "Blocks":
        """Windows of a block's length over the same text, each `stride` tokens on, whose last `stride` are counted.

        Of the first window all are: so every token is counted once, but for a rest shorter than a stride, with at least
        context − stride tokens in front of it.
        """
        starts = torch.arange(0, self.num_tokens - self.context + 1, stride)
        places = starts[:, None] + torch.arange(self.context)
        is_counted = (torch.arange(self.context) >= self.context - stride).expand_as(places).clone()
        is_counted[0] = True
        if self.is_learnt is not None:
            is_counted &= self.is_learnt.flatten()[places]
        return Blocks(self.ids.flatten()[places], self.num_bytes.flatten()[places], is_counted)

    @property
    def targets(self) -> Tensor:
        """(N, context): each position's next token, −100 at the end of a block and where that is not to be learnt."""
        following = self.ids[:, 1:] if self.is_learnt is None else self.ids[:, 1:].where(self.is_learnt[:, 1:], -100)
        return torch.nn.functional.pad(following, (0, 1), value=-100)

    @property
    def teaches(self) -> Tensor:
        """(N, context), bool: positions whose distribution over the next token is to be learnt.

        The next token of a block's last position is not known; it counts if the last token does.
        """
        if self.is_learnt is None:
            return torch.ones_like(self.ids, dtype=torch.bool)
        return torch.cat([self.is_learnt[:, 1:], self.is_learnt[:, -1:]], dim=1)

    @property
    def positions(self) -> Tensor | None:
        """(N, context): each token's place in its document, or in what of it the block holds; None: in the block."""
        if self.starts is None:
            return None
        places = torch.arange(self.context).expand_as(self.ids)
        return places - places.where(self.starts, 0).cummax(dim=1).values

    @property
    def context(self) -> int:
        """Tokens in a block."""
        return self.ids.shape[1]

    @property
    def num_tokens(self) -> int:
        """Tokens in all blocks."""
        return self.ids.numel()

    def fingerprint(self) -> str:
        """SHA-256 of the tokens, of which are to be learnt, and of where documents begin if they are kept apart."""
        digest = sha256(self.ids.numpy().tobytes())
        for name, marks in (("", self.is_learnt), ("starts", self.starts)):
            if marks is not None:
                digest.update(name.encode() + marks.numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Splits:
    """Blocks by purpose; no block is in two. `evaluation` comes first in the corpus order."""

    evaluation: Blocks
    """Seen by no stage but the final evaluation."""
    heldout: Blocks
    """Ranks candidates and follows the distillation."""
    train: Blocks
    """Calibration (its beginning) and distillation."""

    def fingerprint(self) -> str:
        """SHA-256 of all the tokens and of how they are dealt out."""
        parts = (self.evaluation, self.heldout, self.train)
        return sha256(" ".join(part.fingerprint() for part in parts).encode()).hexdigest()


def read_blocks(
    source: Data,
    tokenizer: Any,
    vocab_size: int,
    context: int,
    seed: int,
    max_tokens: int | None = None,
    keeps_apart: bool = False,
) -> Blocks:
    """Tokenise and pack `source`, at most `max_tokens` of it, in the order that `seed` gives.

    Raises:
        UserError: see `documents`; also when the text is shorter than one block, or gives a token that a model
            of `vocab_size` does not have.
    """
    wanted = None if max_tokens is None else max(1, max_tokens // context)
    with Progress("tokenise", total=None if wanted is None else wanted * context) as progress:
        blocks = pack(documents(source, seed), tokenizer, context, wanted, progress, keeps_apart)
    if not len(blocks):
        raise UserError(
            f"data '{data_in_words(source)}' is shorter than one block of {context} tokens: lower --context"
        )
    if (highest := int(blocks.ids.max())) >= vocab_size:
        raise UserError(f"the tokenizer gives token {highest}, the model knows {vocab_size}: they do not fit together")
    return blocks


def pack(
    texts: Iterable[Document],
    tokenizer: Any,
    context: int,
    max_blocks: int | None,
    progress: Progress | None = None,
    keeps_apart: bool = False,
) -> Blocks:
    """Join the tokens of the texts and cut them into blocks; a rest shorter than a block is dropped.

    With `keeps_apart` the blocks know where documents begin.

    Each text carries the marks that the tokenizer itself adds, or is closed by EOS when it adds none; a chat is put
    into words by the tokenizer's template, and only what the assistant says is to be learnt.

    Raises:
        UserError: there are chats, and the tokenizer has no template for them or one that rewrites earlier turns.
    """
    pieces: list[Piece] = []
    num_tokens, limit = 0, None if max_blocks is None else max_blocks * context
    iterator = iter(texts)
    while (limit is None or num_tokens < limit) and (batch := list(islice(iterator, DOCUMENTS_AT_ONCE))):
        before = num_tokens
        for piece in tokenise(batch, tokenizer):
            pieces.append(piece)
            num_tokens += len(piece.ids)
        if progress:
            progress.advance(min(num_tokens, limit or num_tokens) - before)
    num_blocks = num_tokens // context if max_blocks is None else min(max_blocks, num_tokens // context)
    if not num_blocks:
        return Blocks(torch.zeros(0, context, dtype=torch.int64), torch.zeros(0, context, dtype=torch.int32))

    def joined(parts: list[Array]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts)[: num_blocks * context]).view(num_blocks, context)

    is_learnt = joined([piece.is_learnt for piece in pieces])
    return Blocks(
        joined([piece.ids for piece in pieces]),
        joined([piece.num_bytes for piece in pieces]),
        None if is_learnt.all() else is_learnt,
        joined([np.arange(len(piece.ids)) == 0 for piece in pieces]) if keeps_apart else None,
    )


def read_splits(
    source: Data,
    tokenizer: Any,
    vocab_size: int,
    context: int,
    seed: int,
    evaluation_tokens: int,
    heldout_tokens: int,
    train_tokens: int,
    keeps_apart: bool = False,
) -> Splits:
    """Read as much of `source` as all purposes need and deal the blocks out: evaluation, held-out, training.

    Of a corpus that is too short for that, evaluation and held-out get at most a fifth each. With `keeps_apart` the
    training blocks know where documents begin; in the others one runs on into the next.

    Raises:
        UserError: see `read_blocks`; also when there are fewer than three blocks, one for each purpose.
    """
    wanted = [max(1, tokens // context) for tokens in (evaluation_tokens, heldout_tokens, train_tokens)]
    blocks = read_blocks(source, tokenizer, vocab_size, context, seed, sum(wanted) * context, keeps_apart)
    if len(blocks) < 3:
        raise UserError(
            f"data '{data_in_words(source)}' gives {len(blocks)} block(s) of {context} tokens; at least 3 are needed, "
            "to train, to compare and to evaluate on: add text or lower --context"
        )
    most = len(blocks) if len(blocks) == sum(wanted) else max(1, len(blocks) // 5)
    num_evaluation, num_heldout = min(wanted[0], most), min(wanted[1], most)
    first_train = num_evaluation + num_heldout
    measured = replace(blocks[:first_train], starts=None)
    return Splits(measured[:num_evaluation], measured[num_evaluation:], blocks[first_train:])


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder.

    Raises:
        UserError: there is none, or it cannot say where its tokens lie in the text.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library raises plain Exceptions
        raise UserError(
            f"{folder} holds no tokenizer that can be loaded: {' '.join(str(error).split())[:200]}"
        ) from error
    if not tokenizer.is_fast:
        raise UserError(f"{folder}: the tokenizer has no tokenizer.json; save it with a recent transformers first")
    tokenizer.model_max_length = int(1e30)  # documents are longer than a context; blocks are cut afterwards
    return tokenizer
