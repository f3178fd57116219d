"""A teacher with more tokens than its student: where both stand in a text, and what the teacher expects next."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from minitron.data.blocks import Blocks
from minitron.data.narrowing import cut_tokenizer
from minitron.data.packing import Packing, pack
from minitron.data.spelling import Pieces
from minitron.data.vocabulary import Vocabulary
from minitron.distillation.fused import LossOptions, States, logit_loss
from minitron.distillation.losses import forward_kl_
from minitron.distillation.spelled import SpelledStates, spelled_states
from minitron.distillation.teacher import SpelledLive
from minitron.errors import UserError
from minitron.model.language_model import Head
from tests.small_tokenizers import KINDS, TEXTS, tokenizer_of
from tests.test_vocabulary import QUICK, texts

FAITHFUL = [kind for kind in KINDS if kind != "word_piece"]
"""The kinds of which tokens decode to the text that they stand for."""


def cut_to(kind: str, size: int) -> Any:
    whole = tokenizer_of(kind)
    vocabulary = Vocabulary.of(whole, len(whole))
    counts = np.bincount(np.concatenate([whole(text)["input_ids"] for text in TEXTS[:5]]), minlength=len(whole))
    kept = vocabulary.closed((-counts).argsort(kind="stable").tolist(), size)
    return cut_tokenizer(whole, vocabulary.cut(kept))


def packed(kind: str, documents: list[str], context: int, student: Any) -> Blocks:
    return pack(documents, Packing(student, len(student), context, whole_tokenizer=tokenizer_of(kind)))


@pytest.mark.parametrize("kind", FAITHFUL)
@QUICK
@given(documents=st.lists(texts, min_size=2, max_size=6), context=st.integers(3, 9))
def test_places_are_where_both_have_written_one_text(kind: str, documents: list[str], context: int) -> None:
    student = cut_to(kind, 560)
    blocks = packed(kind, documents, context, student)
    if not len(blocks):
        return
    assert blocks.whole is not None
    teacher = blocks.whole.blocks
    num_shared = 0
    for number in range(len(blocks)):
        own, others = (each.num_bytes[number].cumsum(0).tolist() for each in (blocks, teacher))
        text = teacher.ids[number][teacher.is_learnt[number]] if teacher.is_learnt is not None else teacher.ids[number]
        places = blocks.whole.places[number].tolist()
        shared = [place for place in places if place >= 0]
        assert shared == sorted(set(shared))
        assert all(place < len(text) for place in shared)
        for (i, place), (j, after) in pairwise([(i, place) for i, place in enumerate(places) if place >= 0]):
            assert own[j] - own[i] == others[after] - others[place]
        num_shared += len(shared)
    following = blocks.ids.flatten()[1:]
    assert torch.equal(blocks.whole.following.flatten()[: len(following)], following)
    assert num_shared


def test_with_all_tokens_every_place_is_its_own() -> None:
    whole = tokenizer_of("byte_level")
    blocks = packed("byte_level", TEXTS[:2], 16, whole)
    assert blocks.whole is not None
    splits_a_character = blocks.num_bytes.roll(-1) == 0  # of its tokens, only the last one is a place
    splits_a_character &= blocks.ids.roll(-1) != whole.eos_token_id
    places = torch.arange(16).expand(len(blocks), 16)
    assert torch.equal(blocks.whole.places, places.where(~splits_a_character, -1))
    assert torch.equal(blocks.whole.blocks.ids, blocks.ids)
    assert Pieces.between(whole, whole, (904, 904)) is None


def test_first_pieces_begin_the_tokens() -> None:
    for kind in KINDS:
        whole, student = tokenizer_of(kind), cut_to(kind, 560)
        pieces = Pieces.between(whole, student, (len(whole), len(student)))
        assert pieces is not None
        assert not len(pieces.lost)
        assert torch.equal(pieces.first[pieces.kept], torch.arange(len(student)))
        for number, first in enumerate(pieces.first.tolist()):
            token, piece = whole.convert_ids_to_tokens(number), student.convert_ids_to_tokens(first)
            assert token.startswith(piece) or piece.startswith("<0x")


def test_a_student_with_other_tokens_is_refused() -> None:
    with pytest.raises(UserError, match="teacher and student have different tokenizers"):
        Pieces.between(tokenizer_of("unigram"), tokenizer_of("byte_level"), (2000, 2000))


PIECES = Pieces(torch.tensor([1, 3, 4]), torch.tensor([2, 0, 0, 1, 2, 2]), torch.tensor([], dtype=torch.int64))


def expected(logits: Tensor) -> Tensor:
    p = logits.softmax(dim=-1)
    return torch.stack([p[..., 1] + p[..., 2], p[..., 3], p[..., 4] + p[..., 0] + p[..., 5]], dim=-1)


def test_a_token_that_is_missing_counts_for_its_first_piece() -> None:
    logits = torch.randn(7, 6, dtype=torch.float64) * 4
    torch.testing.assert_close(PIECES.merged_(logits.clone()).softmax(dim=-1), expected(logits))
    lacking = replace(PIECES, lost=torch.tensor([5]))
    p = lacking.merged_(logits.clone()).softmax(dim=-1)
    torch.testing.assert_close(p, expected(logits.index_fill(-1, torch.tensor([5]), -torch.inf)))


@pytest.mark.parametrize("chunk_tokens", [2, 64])
def test_loss_and_gradients_are_those_of_the_distribution_over_pieces(chunk_tokens: int) -> None:
    torch.manual_seed(0)
    states = States(torch.randn(9, 5, dtype=torch.float64), Head(torch.randn(6, 5, dtype=torch.float64)))
    decided = torch.tensor([-1, 2, -1, -1, 0, -1, 1, -1, -1])
    hidden = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    teacher = SpelledStates(states.hidden, states.head, PIECES, decided)
    options = LossOptions(chunk_tokens=chunk_tokens)
    loss = logit_loss(hidden, Head(weight), teacher, forward_kl_, 9, options)
    loss.backward()
    p = expected(states.head.logits(states.hidden))
    p = torch.where((decided >= 0)[:, None], torch.nn.functional.one_hot(decided.clamp_min(0), 3), p)
    others = [each.detach().clone().requires_grad_() for each in (hidden, weight)]
    log_q = (others[0] @ others[1].T).log_softmax(dim=-1)
    direct = (torch.xlogy(p, p) - p * log_q).sum() / 9
    direct.backward()
    torch.testing.assert_close(loss, direct)
    for ours, wanted in zip((hidden, weight), others, strict=True):
        torch.testing.assert_close(ours.grad, wanted.grad)


def test_stored_and_running_teachers_agree(tmp_path: Path, wordy: Path, text: Path) -> None:
    from minitron.distillation import stored_teacher
    from minitron.pruning.vocabulary import over_vocabulary
    from minitron.recipe import recipe_from
    from minitron.session import Session

    recipe = recipe_from(
        None, teacher=str(wordy), data=str(text), context=32, vocabulary={"least_coverage": 0.5},
        distill={"stored_dtype": "float32"}, dtype="float32",
    )  # fmt: skip
    session = over_vocabulary(Session(recipe), 640)
    train, numbers = session.splits.train, torch.tensor([3, 0])
    kept = stored_teacher(session, tmp_path / "states", train[:5], session.recipe.distill)(train.ids, numbers, None)
    with session.teacher_model() as model:
        assert session.pieces is not None
        live = SpelledLive(model, train, session.pieces)(train.ids[numbers], numbers)
    assert isinstance(kept, SpelledStates)
    assert torch.equal(kept.decided, live.decided)
    shared = live.decided < 0
    torch.testing.assert_close(kept.hidden[shared], live.hidden[shared])
    assert (live.decided >= 0).any()
    rows: Callable[[slice], Any] = live.prepared(640, torch.float32, torch.float32).rows(slice(0, 64), 1.0)
    assert rows(slice(0, 64)).shape == (64, 640)


def test_positions_inside_a_token_take_the_text(wordy: Path) -> None:
    student = cut_to("byte_level", 560)
    blocks = packed("byte_level", TEXTS[:1], 32, student)[:2]
    pieces = Pieces.between(tokenizer_of("byte_level"), student, (904, len(student)))
    assert blocks.whole is not None
    assert pieces is not None
    found = spelled_states(States(torch.zeros(2, 32, 4), Head(torch.zeros(904, 4))), blocks.whole, pieces)
    inside = blocks.whole.places < 0
    assert inside.any()
    assert torch.equal(found.decided[inside], blocks.whole.following[inside])
    assert (found.decided[~inside] == -1).all()
