"""Documents to tokens to packed blocks of equal length, and which stage sees which blocks."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from minitron.data.corpus import documents
from minitron.errors import UserError
from minitron.progress import Progress
from minitron.recipe import Data, data_in_words

DOCUMENTS_AT_ONCE = 64


@dataclass(frozen=True)
class Blocks:
    """Packed text: token ids (N, context) and how many bytes of the text each token stands for."""

    ids: Tensor  # (N, context), int64
    num_bytes: Tensor  # (N, context), int32

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, part: slice) -> "Blocks":
        return Blocks(self.ids[part], self.num_bytes[part])

    @property
    def context(self) -> int:
        """Tokens in a block."""
        return self.ids.shape[1]

    @property
    def num_tokens(self) -> int:
        """Tokens in all blocks."""
        return self.ids.numel()

    def fingerprint(self) -> str:
        """SHA-256 of the tokens."""
        return sha256(self.ids.numpy().tobytes()).hexdigest()


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
    source: Data, tokenizer: Any, vocab_size: int, context: int, seed: int, max_tokens: int | None = None
) -> Blocks:
    """Tokenise and pack `source`, at most `max_tokens` of it, in the order that `seed` gives.

    Raises:
        UserError: see `documents`; also when the text is shorter than one block, or gives a token that a model
            of `vocab_size` does not have.
    """
    wanted = None if max_tokens is None else max(1, max_tokens // context)
    with Progress("tokenise", total=None if wanted is None else wanted * context) as progress:
        blocks = pack(documents(source, seed), tokenizer, context, wanted, progress)
    if not len(blocks):
        raise UserError(
            f"data '{data_in_words(source)}' is shorter than one block of {context} tokens: lower --context"
        )
    if (highest := int(blocks.ids.max())) >= vocab_size:
        raise UserError(f"the tokenizer gives token {highest}, the model knows {vocab_size}: they do not fit together")
    return blocks


def pack(
    texts: Iterable[str], tokenizer: Any, context: int, max_blocks: int | None, progress: Progress | None = None
) -> Blocks:
    """Join the tokens of the texts and cut them into blocks; a rest shorter than a block is dropped.

    Each text carries the marks that the tokenizer itself adds, or is closed by EOS when it adds none.
    """
    ids: list[np.ndarray[Any, Any]] = []
    sizes: list[np.ndarray[Any, Any]] = []
    num_tokens, limit = 0, None if max_blocks is None else max_blocks * context
    iterator = iter(texts)
    while (limit is None or num_tokens < limit) and (batch := list(islice(iterator, DOCUMENTS_AT_ONCE))):
        before = num_tokens
        for text_ids, text_bytes in _tokenise(batch, tokenizer):
            ids.append(text_ids)
            sizes.append(text_bytes)
            num_tokens += len(text_ids)
        if progress:
            progress.advance(min(num_tokens, limit or num_tokens) - before)
    num_blocks = num_tokens // context if max_blocks is None else min(max_blocks, num_tokens // context)
    if not num_blocks:
        return Blocks(torch.zeros(0, context, dtype=torch.int64), torch.zeros(0, context, dtype=torch.int32))
    end = num_blocks * context
    flat_ids = torch.from_numpy(np.concatenate(ids)[:end]).view(num_blocks, context)
    return Blocks(flat_ids, torch.from_numpy(np.concatenate(sizes)[:end]).view(num_blocks, context))


def read_splits(
    source: Data,
    tokenizer: Any,
    vocab_size: int,
    context: int,
    seed: int,
    evaluation_tokens: int,
    heldout_tokens: int,
    train_tokens: int,
) -> Splits:
    """Read as much of `source` as all purposes need and deal the blocks out: evaluation, held-out, training.

    Of a corpus that is too short for that, evaluation and held-out get at most a fifth each.

    Raises:
        UserError: see `read_blocks`; also when there are fewer than three blocks, one for each purpose.
    """
    wanted = [max(1, tokens // context) for tokens in (evaluation_tokens, heldout_tokens, train_tokens)]
    blocks = read_blocks(source, tokenizer, vocab_size, context, seed, sum(wanted) * context)
    if len(blocks) < 3:
        raise UserError(
            f"data '{data_in_words(source)}' gives {len(blocks)} block(s) of {context} tokens; at least 3 are needed, "
            "to train, to compare and to evaluate on: add text or lower --context"
        )
    most = len(blocks) if len(blocks) == sum(wanted) else max(1, len(blocks) // 5)
    num_evaluation, num_heldout = min(wanted[0], most), min(wanted[1], most)
    first_train = num_evaluation + num_heldout
    return Splits(blocks[:num_evaluation], blocks[num_evaluation:first_train], blocks[first_train:])


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


def _tokenise(texts: list[str], tokenizer: Any) -> Iterator[tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]:
    encodings = tokenizer(texts, return_offsets_mapping=True, return_attention_mask=False)
    has_marks = tokenizer.num_special_tokens_to_add() > 0
    for text, ids, offsets in zip(texts, encodings["input_ids"], encodings["offset_mapping"], strict=True):
        num_bytes = _bytes_per_token(text, np.array(offsets, dtype=np.int64).reshape(-1, 2)[:, 1])
        if not has_marks and tokenizer.eos_token_id is not None:
            ids, num_bytes = [*ids, tokenizer.eos_token_id], np.append(num_bytes, np.int32(0))
        yield np.array(ids, dtype=np.int64), num_bytes


def _bytes_per_token(text: str, ends: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
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
