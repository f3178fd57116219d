"""Teacher outputs over the tokens of a student that has fewer: see `data.spelling`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minitron.data.blocks import Whole
from minitron.data.spelling import Pieces
from minitron.distillation.fused import States
from minitron.model.language_model import Head

IMPOSSIBLE = -1e4
"""The logit of every other token where the text decides the next one; finite, since 0 × infinity is not a number."""


@dataclass(frozen=True)
class SpelledStates(States):
    """Teacher outputs at the positions of a student with fewer tokens.

    `hidden` (…, hidden) is the state after the teacher's token that ends where the student's token ends. Where none
    does, `decided` (…) is the student's next token in the text; elsewhere it is −1.
    """

    pieces: Pieces
    decided: Tensor

    @property
    def vocab(self) -> int:
        """The number of tokens of the student."""
        return len(self.pieces.kept)

    def at(self, positions: Tensor) -> "SpelledStates":
        """Select positions by a mask."""
        return SpelledStates(self.hidden[positions], self.head, self.pieces, self.decided[positions])

    def prepared(self, vocab: int, _: torch.dtype, operands: torch.dtype) -> "SpelledStates":
        """Flatten positions into one dimension.

        Raises:
            ValueError: the student has other tokens than those that the teacher's are written with.
        """
        if vocab != self.vocab:
            raise ValueError(f"the student has {vocab} tokens, the teacher's are written with {self.vocab}")
        head = Head(self.head.weight.to(operands), self.head.softcap)
        return SpelledStates(self.hidden.flatten(0, -2), head, self.pieces, self.decided.flatten())

    def rows(self, part: slice, temperature: float, buffer: Tensor | None = None) -> Callable[[slice], Tensor]:
        """Compute the logits of some positions; return a function that yields each (n, vocab) of them once."""
        whole, decided = super().rows(part, temperature, buffer), self.decided[part]

        def spelled(rows: slice) -> Tensor:
            logits, tokens = self.pieces.merged_(whole(rows)), decided[rows]
            is_decided = (tokens >= 0)[:, None]
            logits.masked_fill_(is_decided, IMPOSSIBLE)
            certain = torch.where(is_decided, 0.0, logits.gather(-1, tokens.clamp_min(0)[:, None]))
            return logits.scatter_(-1, tokens.clamp_min(0)[:, None], certain)

        return spelled


def spelled_states(states: States, whole: Whole, pieces: Pieces) -> SpelledStates:
    """Return the outputs of a teacher that has read `whole.blocks`, (N, T, hidden), at the student's positions."""
    device = states.hidden.device
    places = whole.places.to(device)
    index = places.clamp_min(0)[..., None].expand(*places.shape, states.hidden.shape[-1])
    decided = whole.following.to(device).where(places < 0, -1)
    return SpelledStates(states.hidden.gather(1, index), states.head, pieces.to(device), decided)
