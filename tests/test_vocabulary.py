"""A tokenizer that is cut writes text whose tokens all stay as before, and any other text so that it can be decoded."""

import json
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from minitron.data.vocabulary import Vocabulary
from minitron.errors import UserError
from tests.small_tokenizers import KINDS, TEXTS, tokenizer_of

WORDS = sorted({word for text in TEXTS for word in text.split()})
texts = st.lists(st.sampled_from(WORDS) | st.text(max_size=8), max_size=12).map(" ".join)
QUICK = settings(max_examples=60, deadline=None)


def vocabulary_of(kind: str) -> Vocabulary:
    return Vocabulary.of(tokenizer_of(kind), len(tokenizer_of(kind)))


def cut_of(kind: str, wanted: list[int], size: int) -> tuple[Any, Tokenizer, dict[int, int]]:
    """Return a tokenizer, that tokenizer cut, and the new numbers of the tokens that stay."""
    whole = tokenizer_of(kind)
    vocabulary = vocabulary_of(kind)
    kept = vocabulary.closed(wanted, size)
    assert len(kept) == min(size, len(vocabulary.numbers))
    cut = Tokenizer.from_str(json.dumps(vocabulary.cut(kept)))
    return whole.backend_tokenizer, cut, {old: number for number, old in enumerate(kept)}


@pytest.mark.parametrize("kind", KINDS)
@QUICK
@given(text=texts, other=texts, extra=st.integers(0, 200), data=st.data())
def test_text_whose_tokens_stay_keeps_them_and_any_text_is_decoded(
    kind: str, text: str, other: str, extra: int, data: st.DataObject
) -> None:
    whole = tokenizer_of(kind).backend_tokenizer
    vocabulary = vocabulary_of(kind)
    wanted = list(dict.fromkeys(whole.encode(text).ids))
    rest = data.draw(st.permutations(range(whole.get_vocab_size())))
    size = min(len(vocabulary.numbers), len(vocabulary.closure([*wanted])) + extra)
    whole, cut, new = cut_of(kind, [*wanted, *rest], size)
    assert set(wanted) <= new.keys()
    assert cut.encode(text).ids == [new[number] for number in whole.encode(text).ids]
    for each in (text, other):
        before, after = whole.encode(each).ids, cut.encode(each).ids
        assert cut.decode(after) == whole.decode(before)
        if all(number in new for number in before):
            assert after == [new[number] for number in before]


@pytest.mark.parametrize("kind", ["byte_level", "byte_fallback"])
def test_without_a_part_a_token_is_not_reached(kind: str) -> None:
    whole = tokenizer_of(kind).backend_tokenizer
    vocabulary = vocabulary_of(kind)
    names = {number: name for name, number in vocabulary.numbers.items()}
    closed = vocabulary.closure(())
    for text in WORDS:
        ids = whole.encode(text).ids
        missing = vocabulary.closure(ids) - closed - set(ids)
        if missing:
            kept = sorted(vocabulary.closure(ids) - {min(missing)})
            cut = Tokenizer.from_str(json.dumps(vocabulary.cut(kept)))
            assert [names[kept[number]] for number in cut.encode(text).ids] != [names[number] for number in ids]
            return
    raise AssertionError("no word has a token with a part that is not required")


def test_every_split_of_a_token_is_a_merge_and_only_the_path_is_kept() -> None:
    vocabulary = vocabulary_of("byte_fallback")
    token = max((name for name in vocabulary.model["vocab"] if name.isalpha()), key=len)
    pieces = {token[i:j] for i in range(len(token)) for j in range(i + 1, len(token) + 1)}
    reached = {part for pair in vocabulary.ranks for part in pair if "".join(pair) in pieces}
    assert set(vocabulary.parts(token)) < reached
    assert max(Counter(map("".join, vocabulary.ranks)).values()) > 2


def test_the_lowest_score_stays_since_unknown_characters_cost_more_than_it() -> None:
    vocabulary = vocabulary_of("unigram")
    scores = [score for _, score in vocabulary.model["vocab"]]
    assert scores.index(min(scores)) in vocabulary.required


def test_special_tokens_and_template_follow() -> None:
    whole = tokenizer_of("byte_fallback")
    vocabulary = vocabulary_of("byte_fallback")
    kept = vocabulary.closed((), len(vocabulary.required))
    content = vocabulary.cut(kept)
    cut = Tokenizer.from_str(json.dumps(content))
    for text in ("<|turn|>", "</s>1", ""):
        assert [kept[number] for number in cut.encode(text).ids] == whole.backend_tokenizer.encode(text).ids


@pytest.mark.parametrize("size", [3, 10**6])
def test_a_size_that_no_choice_has_is_an_error(size: int) -> None:
    with pytest.raises(UserError, match=f"vocab_size {size} must be from"):
        vocabulary_of("byte_level").closed((), size)
