"""Blocks of tokens of equal length, and which of their tokens are learnt."""

from dataclasses import dataclass
from hashlib import sha256

import torch
from torch import Tensor

from minitron.errors import UserError


@dataclass(frozen=True)
class Blocks:
    """Packed text: the token ids of N blocks, and the number of bytes of text that each token stands for."""

    ids: Tensor  # (N, context), int64
    num_bytes: Tensor  # (N, context), int32
    is_learnt: Tensor | None = None
    """(N, context), bool: the tokens that a model learns to predict, in chats those of the assistant; None: all."""
    starts: Tensor | None = None
    """(N, context), bool: the first tokens of documents that are kept apart; None: attention crosses documents."""
    whole: "Whole | None" = None
    """The text in the tokens of a teacher that has more of them; None: the teacher has these tokens."""

    def __len__(self) -> int:
        return self.ids.shape[0]

    def __getitem__(self, part: slice | Tensor) -> "Blocks":
        is_learnt, starts = (None if marks is None else marks[part] for marks in (self.is_learnt, self.starts))
        return Blocks(self.ids[part], self.num_bytes[part], is_learnt, starts, self.whole and self.whole[part])

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

    def mixed(self, other: "Blocks", share: float) -> "Blocks":
        """Return these blocks with a share of them, evenly spread, replaced by those of `other`.

        Where `other` has fewer blocks, they are taken again. The first block is one of `other`. Both have equal
        context, and mark the starts of documents or do not.
        """
        places = torch.linspace(0, len(self) - 1, max(1, round(share * len(self)))).round().long()
        order = torch.arange(len(self))
        order[places] = len(self) + torch.arange(len(places)) % len(other)
        return self._followed_by(other)[order]

    def _followed_by(self, other: "Blocks") -> "Blocks":
        learnt = [torch.ones_like(each.ids, dtype=torch.bool) if each.is_learnt is None else each.is_learnt
                  for each in (self, other)]  # fmt: skip
        starts = None if self.starts is None or other.starts is None else torch.cat([self.starts, other.starts])
        whole = None
        if self.whole is not None and other.whole is not None:
            one, two = self.whole, other.whole
            places, following = (
                torch.cat([getattr(each, name) for each in (one, two)]) for name in ("places", "following")
            )
            whole = Whole(one.blocks._followed_by(two.blocks), places, following)
        ids, num_bytes = torch.cat([self.ids, other.ids]), torch.cat([self.num_bytes, other.num_bytes])
        return Blocks(ids, num_bytes, torch.cat(learnt), starts, whole)

    @property
    def leaves_text_unlearnt(self) -> bool:
        """Whether some of the text is not learnt, as the questions of chats are; padding is not text."""
        return self.is_learnt is not None and bool((~self.is_learnt & (self.num_bytes > 0)).any())

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
class Whole:
    """The text of blocks in the tokens of a teacher, of which the student that reads the blocks lacks some."""

    blocks: Blocks
    """Equally long blocks: the tokens that lie in the block's text as a whole, and after them padding."""
    places: Tensor  # (N, context), int64
    """The number, within its block, of the teacher's token that ends where the student's token ends; −1: none does."""
    following: Tensor  # (N, context), int64
    """The student's next token in the text, also after the last one of a block."""

    def __getitem__(self, part: slice | Tensor) -> "Whole":
        return Whole(self.blocks[part], self.places[part], self.following[part])
