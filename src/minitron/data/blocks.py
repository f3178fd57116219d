"""Packs tokens into fixed-length blocks and splits them into train, held-out and evaluation."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minitron.data.chats import Array
from minitron.data.corpus import read_documents
from minitron.data.rows import Document
from minitron.data.tokens import TokenisedDocument, tokenise
from minitron.errors import UserError
from minitron.model.weights import is_pointer
from minitron.progress import Progress
from minitron.recipe import Data, data_in_words

BATCH_DOCUMENTS = 64
"""The number of documents that are tokenised in one call of the tokenizer."""


@dataclass(frozen=True)
class Blocks:
    """Packed text: the token ids of N blocks, and the number of bytes of text that each token stands for."""

    ids: Tensor  # (N, context), int64
    num_bytes: Tensor  # (N, context), int32
    is_learnt: Tensor | None = None
    """(N, context), bool: the tokens that a model learns to predict, in chats those of the assistant; None: all."""
    starts: Tensor | None = None
    """(N, context), bool: the first tokens of documents that are kept apart; None: attention crosses documents."""

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, part: slice | Tensor) -> "Blocks":
        is_learnt, starts = (None if marks is None else marks[part] for marks in (self.is_learnt, self.starts))
        return Blocks(self.ids[part], self.num_bytes[part], is_learnt, starts)

    def split(self, size: int) -> "list[Blocks]":
        """Cut into parts of `size` blocks; the last part may be smaller."""
        return [self[start : start + size] for start in range(0, len(self), size)]

    def sliding(self, stride: int) -> "Blocks":
        """Return overlapping windows of one block's length, `stride` tokens apart, that count only their last tokens.

        The first window counts all of its tokens and each later one its last `stride`. Every token of the text is
        therefore counted once, after at least context − stride tokens in its window; a rest shorter than a stride is
        dropped.
        """
        starts = torch.arange(0, self.num_tokens - self.context + 1, stride)
        places = starts[:, None] + torch.arange(self.context)  # (windows, context)
        is_counted = (torch.arange(self.context) >= self.context - stride).expand_as(places).clone()
        is_counted[0] = True
        if self.is_learnt is not None:
            is_counted &= self.is_learnt.flatten()[places]
        return Blocks(self.ids.flatten()[places], self.num_bytes.flatten()[places], is_counted)

    @property
    def targets(self) -> Tensor:
        """(N, context): the next token of each position; −100 at the end of a block and where it is not learnt."""
        following = self.ids[:, 1:] if self.is_learnt is None else self.ids[:, 1:].where(self.is_learnt[:, 1:], -100)
        return torch.nn.functional.pad(following, (0, 1), value=-100)

    @property
    def teaches(self) -> Tensor:
        """(N, context), bool: the positions whose distribution over the next token is learnt.

        The last position of a block has no next token in the block; it counts if the last token is learnt.
        """
        if self.is_learnt is None:
            return torch.ones_like(self.ids, dtype=torch.bool)
        return torch.cat([self.is_learnt[:, 1:], self.is_learnt[:, -1:]], dim=1)

    @property
    def positions(self) -> Tensor | None:
        """(N, context): each token's position in its document; None where documents are joined.

        A document that began in an earlier block is counted from the start of this block.
        """
        if self.starts is None:
            return None
        places = torch.arange(self.context).expand_as(self.ids)
        return places - places.where(self.starts, 0).cummax(dim=1).values

    @property
    def context(self) -> int:
        """The number of tokens in a block."""
        return self.ids.shape[1]

    @property
    def num_tokens(self) -> int:
        """The number of tokens in all blocks."""
        return self.ids.numel()

    def require_targets(self, purpose: str) -> None:
        """Check that there is a token to predict; in chats, only those of answers are.

        `purpose` names the blocks in the message.

        Raises:
            UserError: there is none.
        """
        if not (self.targets >= 0).any():
            raise UserError(
                f"{purpose}: {len(self)} block(s) of {self.context} tokens hold nothing that the assistant answers, so "
                "there is nothing to learn or to measure; accepted: texts, or chats with turns of the role assistant"
            )

    def fingerprint(self) -> str:
        """Return the SHA-256 of the tokens, of the marks of learnt tokens, and of the marks of documents' starts."""
        digest = sha256(self.ids.numpy().tobytes())
        for name, marks in (("", self.is_learnt), ("starts", self.starts)):
            if marks is not None:
                digest.update(name.encode() + marks.numpy().tobytes())
        return digest.hexdigest()


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
    keeps_apart: bool = False
    """Mark where documents begin, so that attention does not cross them."""


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

    A text gets the special tokens that the tokenizer adds, or an EOS token at its end if the tokenizer adds none. A
    chat is written by the tokenizer's chat template, and only the assistant's turns are learnt.

    Raises:
        UserError: the tokenizer returns a token that the model does not have; or there are chats, and the tokenizer
            has no chat template or one that refuses a chat.
    """
    context = packing.context
    parts: list[TokenisedDocument] = []
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
            parts.append(part)
            num_tokens += len(part.ids)
        if progress:
            progress.advance(min(num_tokens, limit or num_tokens) - before)
    num_blocks = num_tokens // context if max_blocks is None else min(max_blocks, num_tokens // context)
    if not num_blocks:
        return Blocks(torch.zeros(0, context, dtype=torch.int64), torch.zeros(0, context, dtype=torch.int32))

    def joined(arrays: list[Array]) -> Tensor:
        return torch.from_numpy(np.concatenate(arrays)[: num_blocks * context]).view(num_blocks, context)

    is_learnt = joined([part.is_learnt for part in parts])
    return Blocks(
        joined([part.ids for part in parts]),
        joined([part.num_bytes for part in parts]),
        None if is_learnt.all() else is_learnt,
        joined([np.arange(len(part.ids)) == 0 for part in parts]) if packing.keeps_apart else None,
    )


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
