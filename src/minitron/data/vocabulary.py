"""Cuts a tokenizer down to some of its tokens, so that text whose tokens all stay is tokenised as before.

Everything works on the content of `tokenizer.json`, which every fast tokenizer has. A tokenizer that is cut has two
properties: a text whose tokens all stay gets these tokens under their new numbers, and any other text is written with
other tokens that stay, from which the text can be decoded.
"""

import json
from collections.abc import Collection, Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

from minitron.errors import UserError

BYTES = tuple(f"<0x{value:02X}>" for value in range(256))
"""The tokens with which a tokenizer with byte fallback writes characters that it has no token for."""
MODELS = ("BPE", "Unigram", "WordPiece", "WordLevel")
"""The kinds of models in the tokenizers library, all of which can be cut."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of a tokenizer by number, and how they depend on each other."""

    content: dict[str, Any]
    """What `tokenizer.json` holds."""
    num_rows: int
    """The number of tokens that the model has embeddings for; tokens beyond are left out."""

    @classmethod
    def of(cls, tokenizer: Any, num_rows: int) -> "Vocabulary":
        """Return the vocabulary of a fast tokenizer of transformers, for a model with a number of embeddings.

        Raises:
            UserError: the tokenizer marks parts of words by affixes other than WordPiece's, or is of an unknown kind.
        """
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        model = content["model"]
        if (kind := model.get("type")) not in MODELS:
            raise UserError(f"the vocabulary of a {kind} tokenizer cannot be cut; accepted: {', '.join(MODELS)}")
        if kind == "BPE" and (model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")):
            raise UserError("the vocabulary of a BPE tokenizer that marks parts of words by affixes cannot be cut")
        return cls(content, num_rows)

    @property
    def model(self) -> dict[str, Any]:
        """The part of the content that holds the tokens."""
        model: dict[str, Any] = self.content["model"]
        return model

    @cached_property
    def numbers(self) -> dict[str, int]:
        """The number of every token, added tokens included."""
        vocab = self.model["vocab"]
        own = {piece: number for number, (piece, _) in enumerate(vocab)} if self.is_unigram else dict(vocab)
        own |= {token["content"]: token["id"] for token in self.content["added_tokens"]}
        return {token: number for token, number in own.items() if number < self.num_rows}

    @property
    def is_unigram(self) -> bool:
        """Whether tokens have scores, and text becomes the tokens of the highest sum."""
        return bool(self.model["type"] == "Unigram")

    @cached_property
    def required(self) -> frozenset[int]:
        """The numbers of the tokens that always stay.

        They are the added tokens, the unknown token, and those that any other text is written with: bytes, or in
        a tokenizer without byte fallback every token of one character. Digits and the space always stay.
        """
        numbers, model = self.numbers, self.model
        names = {token["content"] for token in self.content["added_tokens"]} | set("0123456789") | {"▁", "Ġ"}
        names |= set(_special_tokens(self.content.get("post_processor")))
        if isinstance(unknown := model.get("unk_token"), str):
            names.add(unknown)
        prefix = model.get("continuing_subword_prefix") or ""
        if model.get("byte_fallback"):
            names |= set(BYTES)
        else:
            names |= {name for name in numbers if len(name.removeprefix(prefix)) == 1}
        found = {numbers[name] for name in names if name in numbers}
        if self.is_unigram and model["vocab"]:
            # The score of a character without a token is derived from the lowest of all scores.
            found.add(min(range(len(model["vocab"])), key=lambda number: model["vocab"][number][1]))
            if model.get("unk_id") is not None:
                found.add(model["unk_id"])
        return frozenset(found)

    @cached_property
    def ranks(self) -> dict[tuple[str, str], int]:
        """The order of the merges of a BPE tokenizer, by the two parts; empty for other kinds."""
        return {(left, right): rank for rank, (left, right) in enumerate(self._merges())}

    def parts(self, token: str) -> list[str]:
        """Return the tokens that a token is made of on the way to it: characters and the results of merges.

        Wherever a token occurs as a whole, it has come about by the merges that make it out of its own characters, in
        the order in which they make it of a text that holds nothing else: a merge across its border could not be
        undone. A token that merges never produce has no parts: it occurs only where it is looked up as a whole.
        """
        if self.model["type"] != "BPE" or len(token) == 1:
            return []
        symbols, made = list(self._symbols(token)), set[str]()
        made.update(symbols)
        while len(symbols) > 1:
            pairs = [(self.ranks.get(pair), at) for at, pair in enumerate(pairwise(symbols))]
            found = [(rank, at) for rank, at in pairs if rank is not None]
            if not found:
                return []
            _, at = min(found)
            symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
            made.add(symbols[at])
        return sorted(made - {token})

    def closed(self, wanted: Iterable[int], size: int) -> list[int]:
        """Return the numbers of `size` tokens: those that are required, and the first of `wanted` with their parts.

        A token whose parts do not fit any more is passed over. The numbers are in ascending order.

        Raises:
            UserError: the size is below the number of tokens that are required, or above that of all tokens.
        """
        kept, total = self.closure(()), len(self.numbers)
        if not len(kept) <= size <= total:
            raise UserError(
                f"vocab_size {size} must be from {len(kept)}, the bytes, characters, special and added tokens that "
                f"always stay, to {total}, all tokens of the tokenizer"
            )
        for number in wanted:
            if len(kept) == size:
                break
            if number in self._names and len(kept) + len(new := self._with_parts(number) - kept) <= size:
                kept |= new
        return sorted(kept)

    def closure(self, wanted: Iterable[int]) -> set[int]:
        """Return the numbers of the tokens that are required or wanted, and of their parts."""
        return set().union(*(self._with_parts(number) for number in {*self.required, *wanted}))

    def cut(self, kept: Collection[int]) -> dict[str, Any]:
        """Return the content of a tokenizer that has only the tokens `kept`, numbered by their order in `kept`."""
        content, new = deepcopy(self.content), {old: number for number, old in enumerate(kept)}
        model, own = content["model"], {self._names[number]: number for number in kept}
        if self.is_unigram:
            model["vocab"] = [self.model["vocab"][number] for number in kept if number < len(self.model["vocab"])]
            if model.get("unk_id") is not None:
                model["unk_id"] = new[model["unk_id"]]
        else:
            model["vocab"] = {name: new[number] for name, number in own.items() if name in self.model["vocab"]}
        if model["type"] == "BPE":
            model["merges"] = [
                [left, right] for left, right in self._merges() if left in own and right in own and left + right in own
            ]
        content["added_tokens"] = [
            {**token, "id": new[token["id"]]} for token in content["added_tokens"] if token["id"] in new
        ]
        _renumber(content.get("post_processor"), new)
        if padding := content.get("padding"):
            padding["pad_id"] = new[padding["pad_id"]]
        return content

    def _with_parts(self, number: int) -> set[int]:
        name = self._names[number]
        return {number} | {self.numbers[part] for part in self.parts(name) if part in self.numbers}

    @cached_property
    def _names(self) -> dict[int, str]:
        """The token of every number."""
        return {number: name for name, number in self.numbers.items()}

    def _symbols(self, token: str) -> Iterator[str]:
        """Yield what merges start from: characters, or their bytes where a character has no token."""
        for character in token:
            if character in self.model["vocab"] or not self.model.get("byte_fallback"):
                yield character
            else:
                yield from (BYTES[value] for value in character.encode())

    def _merges(self) -> Iterator[tuple[str, str]]:
        for merge in self.model.get("merges", ()):
            left, right = merge.split(" ") if isinstance(merge, str) else merge
            yield left, right


def _special_tokens(processor: Any) -> Iterator[str]:
    """Yield the tokens that a post-processor adds to texts."""
    for part in _processors(processor):
        yield from part.get("special_tokens", ())
        yield from (part[name][0] for name in ("sep", "cls") if name in part)


def _renumber(processor: Any, new: dict[int, int]) -> None:
    """Give the tokens that a post-processor adds their new numbers."""
    for part in _processors(processor):
        for token in part.get("special_tokens", {}).values() if isinstance(part.get("special_tokens"), dict) else ():
            token["ids"] = [new[number] for number in token["ids"]]
        for name in ("sep", "cls"):
            if name in part:
                part[name] = [part[name][0], new[part[name][1]]]


def _processors(processor: Any) -> Iterator[dict[str, Any]]:
    """Yield a post-processor, or the parts of a sequence of them."""
    if processor:
        yield from processor["processors"] if processor["type"] == "Sequence" else [processor]
