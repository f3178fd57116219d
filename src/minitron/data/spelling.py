"""How a student with fewer tokens writes the tokens of its teacher, and where both stand in one text.

The teacher reads text with its own tokens. Its probability of a token that the student lacks belongs to the first piece
that the student writes the token with: so its distribution over its next token is one over the student's next token,
wherever a token of both ends. Inside a token of the teacher, the student learns the piece that follows in the text.
"""

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from minitron.data.chats import Array
from minitron.errors import UserError

LEAST = 1e-30
"""What a probability that is too small for float32 counts as."""


@dataclass(frozen=True)
class Pieces:
    """The tokens that teacher and student share, and how the student begins to write the others."""

    kept: Tensor  # (student's tokens,): the teacher's number of each token
    first: Tensor  # (teacher's tokens,): the student's token with which it begins to write each token
    lost: Tensor  # (n,): the teacher's tokens that the student cannot write, and rows that are padding

    @classmethod
    def between(cls, teacher: Any, student: Any, num_rows: tuple[int, int]) -> "Pieces | None":
        """Return how a student's tokenizer writes the tokens of its teacher's; None: both have the same tokens.

        `num_rows` are the numbers of tokens that the models have embeddings for; either may have more, as padding.

        Raises:
            UserError: the student has tokens that the teacher lacks, or one of the models lacks rows for its tokens.
        """
        tokens, own = teacher.get_vocab(), student.get_vocab()
        for vocabulary, rows in zip((tokens, own), num_rows, strict=True):
            if own == tokens and (highest := max(vocabulary.values(), default=0)) >= min(num_rows):
                raise UserError(f"the tokenizer has token {highest}, one of the models only {rows} tokens")
        if own == tokens:
            return None
        tokens = {token: number for token, number in tokens.items() if number < num_rows[0]}
        own = {token: number for token, number in own.items() if number < num_rows[1]}
        in_order = sorted(own, key=lambda token: own[token])
        if not own.keys() <= tokens.keys() or [own[token] for token in in_order] != list(range(num_rows[1])):
            differing = len(tokens.items() ^ own.items())
            raise UserError(f"teacher and student have different tokenizers: {differing} tokens differ")
        begins = _first_pieces(student, sorted(tokens.keys() - own.keys(), key=lambda token: tokens[token]))
        kept, first = torch.tensor([tokens[token] for token in in_order]), torch.full((num_rows[0],), -1)
        first[kept] = torch.arange(len(kept))
        for token, piece in begins.items():
            first[tokens[token]] = piece
        return cls(kept, first.clamp_min(0), (first < 0).nonzero().flatten())

    def to(self, device: torch.device) -> "Pieces":
        """Return the same on a device."""
        return Pieces(self.kept.to(device), self.first.to(device), self.lost.to(device))

    def merged_(self, logits: Tensor) -> Tensor:
        """Turn the teacher's logits (n, teacher's tokens) into logits (n, student's tokens); overwrite the former.

        The probability of a token that the student lacks is added to that of its first piece.
        """
        most = logits.amax(dim=-1, keepdim=True)
        shares = logits.sub_(most).exp_()
        if len(self.lost):
            shares.index_fill_(-1, self.lost, 0.0)
        merged = shares.new_zeros(*shares.shape[:-1], len(self.kept))
        merged.scatter_add_(-1, self.first.expand_as(shares), shares)
        return merged.clamp_min_(LEAST).log_().add_(most)


def _first_pieces(student: Any, tokens: list[str]) -> dict[str, int]:
    """Return the student's number of the first piece of each token, of those that it can write."""
    content = json.loads(student.backend_tokenizer.to_str())
    vocab = student.get_vocab()
    if content["model"]["type"] == "WordPiece":
        longest = {
            token: next((token[:size] for size in range(len(token), 0, -1) if token[:size] in vocab), "")
            for token in tokens
        }
        return {token: vocab[prefix] for token, prefix in longest.items() if prefix}
    bare: dict[str, Any] = {"normalizer": None, "pre_tokenizer": None, "post_processor": None, "added_tokens": []}
    tokenizer = Tokenizer.from_str(json.dumps(content | bare))
    written = tokenizer.encode_batch(tokens, add_special_tokens=False)
    return {token: each.ids[0] for token, each in zip(tokens, written, strict=True) if each.ids}


@dataclass(frozen=True)
class TokenStream:
    """The tokens of documents, one after the other."""

    ids: Array  # (n,), int64
    ends: Array  # (n,), int64: where each token ends, in bytes of text; special tokens count as one byte
    is_learnt: Array  # (n,), bool
    num_bytes: Array  # (n,), int32
    is_first: Array  # (n,), bool: the first token of its document


def align(student: TokenStream, teacher: TokenStream, context: int, num_blocks: int) -> tuple[Array, Array, Array]:
    """Return where the teacher's tokens of each block of a student stand.

    These are the positions in the teacher's stream of the first token and after the last one, (num_blocks,) each: of
    the tokens that lie in the block's text as a whole, at most `context`. And places, (num_blocks, context): for each
    of the student's tokens, the number of the teacher's token that ends where it ends, counted from that first one;
    −1 where none does.
    """
    ends = student.ends[: num_blocks * context]
    following = np.append(student.ends[1 : num_blocks * context + 1], np.iinfo(np.int64).max)[: len(ends)]
    last = np.searchsorted(teacher.ends, ends, side="right") - 1  # of several tokens that end there, the last one
    is_shared = (last >= 0) & (teacher.ends[np.maximum(last, 0)] == ends) & (following > ends)
    begins = np.concatenate([[0], ends[context - 1 :: context][:-1]])
    first = np.searchsorted(teacher.ends, begins, side="right")
    is_cut = (begins > 0) & (teacher.ends[np.maximum(first - 1, 0)] != begins)  # the token began in the block before
    after_cut = np.searchsorted(teacher.ends, teacher.ends[np.minimum(first, len(teacher.ends) - 1)], side="right")
    first = np.where(is_cut, after_cut, first)
    stop = np.minimum(np.searchsorted(teacher.ends, ends[context - 1 :: context], side="right"), first + context)
    places = last.reshape(num_blocks, context) - first[:, None]
    is_within = (places >= 0) & (places < (stop - first)[:, None])
    return first, stop, np.where(is_shared.reshape(num_blocks, context) & is_within, places, -1)
