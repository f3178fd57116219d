"""A model narrowed to some tokens predicts them as the whole model does among these; verbs work across the cut."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from minitron.data.narrowing import RowMeans, renumbered, stated_tokens, write_narrowed
from minitron.data.tokens import load_tokenizer
from minitron.errors import UserError
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.model.language_model import load_model
from minitron.pruning.vocabulary import TokenChoice
from minitron.recipe import recipe_from
from minitron.session import Session
from tests.conftest import make_model
from tests.small_tokenizers import LINES

CPU = torch.device("cpu")


def logits(checkpoint: Checkpoint, ids: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = load_model(checkpoint, CPU, torch.float32)(ids).logits
        return output


def some_tokens(count: int, of: int, *always: int) -> list[int]:
    others = [number for number in range(of) if number not in always]
    return sorted([*random.Random(0).sample(others, count - len(always)), *always])


def test_every_family_predicts_the_tokens_that_stay_as_the_whole_model_does(
    teacher: Checkpoint, tmp_path: Path
) -> None:
    kept = some_tokens(192, 258, 0, 1, 256, 257)
    write_narrowed(teacher, kept, tmp_path / "narrow")
    narrow = open_checkpoint(tmp_path / "narrow")
    assert narrow.arch.sizes == {**teacher.arch.sizes, "vocab_size": 192}
    ids = torch.randint(192, (2, 40), generator=torch.Generator().manual_seed(0))
    whole = logits(teacher, torch.tensor(kept)[ids])
    torch.testing.assert_close(logits(narrow, ids), whole[..., kept], rtol=1e-5, atol=1e-5)
    shifted = [number + 1 for number in kept[:-1]]  # a wrong row for every token
    assert not torch.allclose(logits(narrow, ids)[..., :-1], whole[..., shifted], atol=1e-3)


@pytest.mark.parametrize("variant", ["llama-tied", "llama"])
def test_rows_beyond_the_tokens_leave(variant: str, tmp_path: Path) -> None:
    padded = open_checkpoint(make_model(tmp_path / "padded", variant, vocab_size=320))
    kept = some_tokens(192, 258, 256, 257)
    write_narrowed(padded, kept, tmp_path / "narrow")
    narrow = open_checkpoint(tmp_path / "narrow")
    ids = torch.arange(40)[None]
    torch.testing.assert_close(logits(narrow, ids), logits(padded, torch.tensor(kept)[ids])[..., kept])


def test_pieces_take_up_the_rows_of_tokens_that_leave(tmp_path: Path) -> None:
    whole = open_checkpoint(make_model(tmp_path / "whole", "gpt_neox"))
    kept = [0, 1, *range(3, 258)]
    first = torch.tensor([0, 1, 0, *range(2, 257)])  # token 2 begins with token 0
    weights = torch.ones(258).index_fill(0, torch.tensor([2]), 3.0)
    write_narrowed(whole, kept, tmp_path / "narrow", means=RowMeans(first, weights))
    narrow = open_checkpoint(tmp_path / "narrow")
    for name in (whole.arch.embedding.name, whole.arch.output.name):
        before, after = whole.tensor(name), narrow.tensor(name)
        torch.testing.assert_close(after[0], (before[0] + 3 * before[2]) / 4)
        assert torch.equal(after[1:], before[kept[1:]])


def test_configs_name_tokens_by_their_new_numbers(tmp_path: Path) -> None:
    values = {"eos_token_id": [7, 9], "bos_token_id": 9, "pad_token_id": None, "hidden_size": 9, "suppress_tokens": [7]}
    assert renumbered(values, {7: 0, 9: 1}) == {
        "eos_token_id": [0, 1], "bos_token_id": 1, "pad_token_id": None, "hidden_size": 9, "suppress_tokens": [0],
    }  # fmt: skip
    whole = open_checkpoint(make_model(tmp_path / "whole", "gpt2"))
    assert set(stated_tokens(whole)) == {256, 257}
    write_narrowed(whole, some_tokens(192, 258, 256, 257), tmp_path / "narrow")
    narrow = open_checkpoint(tmp_path / "narrow")
    assert (narrow.config.bos_token_id, narrow.config.eos_token_id) == (190, 191)
    assert load_tokenizer(tmp_path / "narrow").eos_token_id == 191


def test_prune_distil_and_evaluate_across_the_cut(
    verb: Callable[..., dict[str, Any]], wordy: Path, text: Path, tmp_path: Path
) -> None:
    shared = ("--data", text, "--context", 64, "--dtype", "float32", "--set", "calibration.tokens=2k")
    small = tmp_path / "small"
    made = verb("prune", wordy, small, "--vocab-size", 864, "--hidden-size", 24, *shared)
    assert made["arch"]["vocab_size"] == 864
    pruned, tokenizer = open_checkpoint(small), load_tokenizer(small)
    assert pruned.arch.axis_size("vocab") == len(tokenizer) == 864
    for each in (LINES[:500], "東京 naïve", "<|turn|>user\nHi</s>"):
        assert tokenizer.decode(tokenizer(each)["input_ids"]) == each
    steps = [step["step"] for step in json.loads((small / "minitron.json").read_text())["steps"]]
    assert steps == ["narrow", "prune"]
    verb("distill", wordy, small, tmp_path / "student", "--tokens", 8192, *shared, "--set", "distill.batch_size=2")
    before, after = (
        verb("evaluate", folder, "--against", wordy, "--max-tokens", 1024, *shared)
        for folder in (small, tmp_path / "student")
    )
    assert after["kl"] < before["kl"]
    assert verb("evaluate", small, "--max-tokens", 1024, *shared)["bits_per_byte"] > 0


def test_a_cut_that_leaves_too_little_of_the_text_is_refused_unless_asked_for_twice(
    wordy: Path, text: Path, tmp_path: Path
) -> None:
    from minitron import prune

    settings: dict[str, Any] = {"data": str(text), "context": 64, "vocab_size": 320, "calibration.tokens": 2048}
    with pytest.raises(UserError, match=r"vocab_size 320: the tokens that stay are \d+\.\d% of those of held-out text"):
        prune(wordy, tmp_path / "small", **settings)
    assert not (tmp_path / "small").exists()
    prune(wordy, tmp_path / "small", **settings, vocabulary={"least_coverage": 0.1})
    assert open_checkpoint(tmp_path / "small").arch.axis_size("vocab") == 320


def test_a_session_over_a_narrowed_model_reads_text_with_both_tokenizers(
    wordy: Path, text: Path, tmp_path: Path
) -> None:
    session = Session(recipe_from(None, teacher=str(wordy), data=str(text), context=64))
    assert session.pieces is None
    assert session.splits.train.whole is None
    kept = some_tokens(900, 904, *range(256), *range(900, 904))
    write_narrowed(session.teacher, kept, tmp_path / "narrow")
    over = session.over(open_checkpoint(tmp_path / "narrow"))
    assert over.teacher.folder == session.teacher.folder
    assert over.pieces is not None
    assert over.pieces.kept.tolist() == kept
    assert over.splits.train.whole is not None
    assert len(over.splits.train.whole.blocks) == len(over.splits.train)


SETTINGS = (
    "--context", 64, "--tokens", 2048, "--target-params", 0.7, "--dtype", "float32", "--set", "calibration.tokens=1k",
    "--set", "evaluation.tokens=512", "--set", "distill.batch_size=2", "--set", "vocabulary.least_coverage=0.8",
)  # fmt: skip


def test_a_search_settles_the_vocabulary_and_figures_are_in_the_teachers_unit_too(
    verb: Callable[..., dict[str, Any]], wordy: Path, text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    space = ("--set", "search.space.vocab_size=[704,768]", "--set", "search.probe_tokens=256")
    figures = verb("compress", wordy, out, "--data", text, *SETTINGS, *space)
    found = json.loads((out / "vocabulary.json").read_text())
    assert found["chosen"] in {704, 768}
    sums = {size: found["costs"][size] + found["expected"][size] for size in ("704", "768")}
    assert str(found["chosen"]) == min(sums, key=lambda size: sums[size])
    student = open_checkpoint(out / "student")
    assert student.arch.axis_size("vocab") == found["chosen"] == len(load_tokenizer(student.folder))
    assert student.arch.num_parameters <= 0.7 * open_checkpoint(wordy).arch.num_parameters
    whole = figures["teacher"]
    assert whole["num_parameters"] == open_checkpoint(wordy).arch.num_parameters
    assert "kl" in figures["student"]
    assert whole["perplexity_per_teacher_token"] == pytest.approx(whole["perplexity"])
    share = figures["student"]["bits_per_byte"] / whole["bits_per_byte"]
    assert figures["student"]["perplexity_per_teacher_token"] == pytest.approx(whole["perplexity"] ** share)
    assert "### Cut of the vocabulary" in (student.folder / "README.md").read_text()


def test_trim_vocab_leaves_a_vocabulary_whose_cut_costs_more_than_it_gains(
    verb: Callable[..., dict[str, Any]], wordy: Path, text: Path, tmp_path: Path
) -> None:
    all_sizes = ("--set", "vocabulary.least_coverage=0.3", "--set", "vocabulary.tokens=1k")
    figures = verb("compress", wordy, tmp_path / "run", "--trim-vocab", "--data", text, *SETTINGS, *all_sizes)
    found = json.loads((tmp_path / "run" / "vocabulary.json").read_text())
    assert len(found["costs"]) > 2
    assert found["chosen"] == 960
    assert "perplexity_per_teacher_token" not in figures["student"]


def test_tokens_are_counted_beyond_the_training_text(wordy: Path, text: Path) -> None:
    settings = {"teacher": str(wordy), "data": str(text), "context": 64, "distill.tokens": 512}
    short = {"calibration.tokens": 512, "evaluation.tokens": 512, "search.tokens": 512}
    near, far = (
        Session(recipe_from(None, **settings, **short, **{"vocabulary.tokens": tokens})) for tokens in (256, 8192)
    )
    train = far.splits.train
    assert torch.equal(near.counted_blocks.ids, near.splits.train.ids)
    assert torch.equal(far.counted_blocks[: len(train)].ids, train.ids)
    assert far.counted_blocks.num_tokens == 8192 > train.num_tokens
    measured = {tuple(ids) for split in (far.splits.evaluation, far.splits.heldout) for ids in split.ids.tolist()}
    assert not measured & {tuple(ids) for ids in far.counted_blocks.ids.tolist()}
    assert (TokenChoice.of(far).occurrences > 0).sum() > (TokenChoice.of(near).occurrences > 0).sum()


@pytest.mark.parametrize(("key", "value"), [("intermediate.of", ["embedding"]), ("correction.trains", "full")])
def test_what_needs_equal_tokens_is_refused_before_any_work(
    key: str, value: Any, wordy: Path, text: Path, tmp_path: Path
) -> None:
    from minitron import compress

    settings: dict[str, Any] = {"data": str(text), "context": 64, "target_params": 0.7, f"distill.{key}": value}
    with pytest.raises(UserError, match="at the teacher's own tokens, of which the student lacks some"):
        compress(wordy, tmp_path / "run", **settings, vocabulary={"trim": True})
    with pytest.raises(UserError, match="at the teacher's own tokens, of which the student lacks some"):
        compress(wordy, tmp_path / "run", **settings | {"target_params": None}, shape={"vocab_size": 896})
    assert not (tmp_path / "run").exists()


def test_llama_cpp_writes_text_with_the_tokens_that_stay(
    verb: Callable[..., dict[str, Any]], wordy: Path, text: Path, tmp_path: Path
) -> None:
    shared = ("--data", text, "--context", 64, "--set", "calibration.tokens=2k")
    verb("prune", wordy, tmp_path / "small", "--vocab-size", 864, *shared)
    written = verb("export", tmp_path / "small", tmp_path / "gguf", "--format", "gguf", "--check", "llama.cpp", *shared)
    checked = written["checked"]
    assert checked["texts_with_equal_tokens"] == checked["texts"] > 0
    assert checked["kl"] < 1e-4
