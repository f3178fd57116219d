"""Chooses the tokens that a student keeps: those that the text of its training needs most."""

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from minitron.data.blocks import Blocks
from minitron.data.narrowing import RowMeans, cut_tokenizer, narrowed, stated_tokens
from minitron.data.spelling import Pieces
from minitron.data.tokens import load_tokenizer
from minitron.data.vocabulary import Vocabulary
from minitron.errors import UserError
from minitron.session import Session

MULTIPLE = 64
"""Sizes that are derived from the text are a multiple of this, as matrix units require."""
SAMPLES = 8
"""Tokens of each script that are shown of those that leave."""
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class TokenChoice:
    """The tokens of a model in the order in which a text needs them."""

    vocabulary: Vocabulary
    order: list[int]
    """The numbers of all tokens that may leave or stay, the most needed first."""
    occurrences: Tensor  # (vocab,), int64

    @classmethod
    def of(cls, session: Session) -> "TokenChoice":
        """Return the tokens of a session's model in the order in which its text needs them.

        Tokens that the configs and the chat template name come first. The others are ordered by the number of blocks of
        `Session.counted_blocks` that they occur in, so that one odd document counts little; then by the number of
        their occurrences; then by the norm of their rows in the output matrix, which is small where a token was hardly
        trained.

        Raises:
            UserError: the tokenizer cannot be cut.
        """
        source = session.source
        tokenizer = load_tokenizer(source.folder)
        in_blocks, occurrences = usage(session.counted_blocks, source.arch.axis_size("vocab"))
        norms = source.tensor(source.arch.output.name).float().norm(dim=-1)
        needs = torch.stack([in_blocks.double(), occurrences.double(), norms.double()], dim=1).tolist()
        order = sorted(range(len(needs)), key=needs.__getitem__, reverse=True)
        named = [*stated_tokens(source), *template_tokens(tokenizer)]
        return cls(Vocabulary.of(tokenizer, len(norms)), [*named, *order], occurrences)

    def kept(self, size: int) -> list[int]:
        """Return the numbers of the `size` most needed tokens, ascending; some always stay.

        Raises:
            UserError: see `Vocabulary.closed`.
        """
        return self.vocabulary.closed(self.order, size)

    def size_covering(self, share: float) -> int:
        """Return about how many tokens cover a share of all occurrences, as a multiple of `MULTIPLE`."""
        always = self.vocabulary.closure(())
        order = [*always, *(number for number in dict.fromkeys(self.order) if number not in always)]
        covered = self.occurrences[torch.tensor(order)].cumsum(0) / self.occurrences.sum()
        count = max(len(always), int((covered < share).sum()) + 1)
        return math.ceil(count / MULTIPLE) * MULTIPLE


def over_vocabulary(session: Session, size: int) -> Session:
    """Return a session that prunes its model narrowed to the `size` tokens that the training text needs most.

    Raises:
        UserError: the tokens that stay cover less of the held-out text than `vocabulary.least_coverage`; or see
            `TokenChoice` and `narrowing.narrowed`.
    """
    if size == session.source.arch.axis_size("vocab"):
        return session
    choice = TokenChoice.of(session)
    kept = choice.kept(size)
    described, least = describe_cut(session, kept), session.recipe.vocabulary.least_coverage
    if (covered := described["coverage"]) < least:
        raise UserError(
            f"vocab_size {size}: the tokens that stay are {covered:.1%} of those of held-out text, below "
            f"vocabulary.least_coverage {least:.1%}; accepted: more tokens, more text to choose them by, or a lower "
            "limit"
        )
    means = _row_means(session, choice, kept) if session.recipe.vocabulary.merge_rows else None
    return session.over(narrowed(session.source, kept, described | {"merges_rows": means is not None}, means))


def _row_means(session: Session, choice: TokenChoice, kept: Sequence[int]) -> RowMeans | None:
    """Return means of rows in which each token that leaves counts, by its occurrences, for the piece it begins with.

    A token that stays counts once more than it occurs, so that it keeps its row where no token that begins with it
    occurs either.
    """
    num_rows = len(choice.occurrences)
    tokenizer = load_tokenizer(session.source.folder)
    cut = cut_tokenizer(tokenizer, choice.vocabulary.cut(kept))
    if (pieces := Pieces.between(tokenizer, cut, (num_rows, len(kept)))) is None:
        return None
    weights = choice.occurrences.float()
    weights[pieces.kept] += 1.0
    weights[pieces.lost] = 0.0
    return RowMeans(pieces.first, weights)


def describe_cut(session: Session, kept: Sequence[int]) -> dict[str, Any]:
    """Return what a cut to the tokens `kept` means for held-out text, and for each script which tokens leave.

    `coverage` is the share of the tokens of `heldout_tokens` that stay; `bytes_per_token` is given before and after the
    cut; `left` has the number of tokens that leave by script, and samples.
    """
    source, blocks = session.source, session.splits.heldout
    tokenizer = load_tokenizer(source.folder)
    vocabulary = Vocabulary.of(tokenizer, source.arch.axis_size("vocab"))
    cut = cut_tokenizer(tokenizer, vocabulary.cut(kept))
    texts = tokenizer.batch_decode(blocks.ids.tolist())
    num_bytes = sum(len(text.encode()) for text in texts)
    counts = [sum(map(len, each(texts, add_special_tokens=False)["input_ids"])) for each in (tokenizer, cut)]
    left = sorted({*vocabulary.numbers.values()} - {*kept})
    by_script: dict[str, list[str]] = {}
    for text in tokenizer.batch_decode([[number] for number in left]):
        by_script.setdefault(script(text), []).append(text)
    return {
        "coverage": coverage(blocks, kept),
        "heldout_tokens": blocks.num_tokens,
        "bytes_per_token": [num_bytes / max(1, count) for count in counts],
        "left": {
            name: {"tokens": len(tokens), "samples": tokens[:: max(1, len(tokens) // SAMPLES)][:SAMPLES]}
            for name, tokens in sorted(by_script.items(), key=lambda item: -len(item[1]))
        },
    }


def script(text: str) -> str:
    """Return the script of the first letter of a text, as Unicode names it; `other` for a text without letters."""
    letter = next((character for character in text if character.isalpha()), None)
    return "other" if letter is None else unicodedata.name(letter, "other").split()[0].lower()


def usage(blocks: Blocks, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Return for every token the number of blocks that it occurs in, and the number of its occurrences."""
    in_blocks = torch.zeros(vocab_size, dtype=torch.int64)
    for ids in blocks.ids:
        in_blocks[ids.unique()] += 1
    return in_blocks, blocks.ids.flatten().bincount(minlength=vocab_size)


def coverage(blocks: Blocks, kept: Sequence[int]) -> float:
    """Return the share of the tokens of a text that are among those that stay."""
    return float(torch.isin(blocks.ids, torch.tensor(kept)).float().mean())


def template_tokens(tokenizer: Any) -> list[int]:
    """Return the numbers of the tokens that the chat template writes around messages."""
    if not tokenizer.chat_template:
        return []
    for roles in (ROLES, ROLES[1:]):
        messages = [{"role": role, "content": "."} for role in roles]
        try:
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception:  # a template may refuse a role, or need entries that it alone knows
            continue
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    return list(tokenizer(str(tokenizer.chat_template), add_special_tokens=False)["input_ids"])
