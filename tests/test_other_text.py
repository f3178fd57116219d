"""Other text for the moment of the stream: what a model writes, by its own distribution, and random tokens."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from minitron.data.blocks import Blocks
from minitron.errors import UserError
from minitron.model.checkpoint import Checkpoint
from minitron.model.language_model import load_model
from minitron.pruning.other_text import other_text, random_ids, require_memory_to_write, written
from minitron.recipe import CalibrationRecipe
from minitron.runtime import Runtime
from tests.conftest import MECHANISMS

CPU = torch.device("cpu")
RUNTIME = Runtime(CPU, torch.float32)
FIRST = torch.tensor([[3], [5], [7]])


@pytest.fixture
def blocks() -> Blocks:
    ids = torch.randint(0, 256, (9, 12), generator=torch.Generator().manual_seed(0))
    return Blocks(ids, torch.ones_like(ids, dtype=torch.int32))


@pytest.mark.parametrize("teacher", MECHANISMS, indirect=True)
def test_every_family_writes_blocks_of_full_length(teacher: Checkpoint, blocks: Blocks) -> None:
    found = other_text(teacher, blocks, recipe=CalibrationRecipe(), runtime=RUNTIME)
    vocab_size = teacher.arch.axis_size("vocab")
    assert found.ids.shape == (4, blocks.context)
    assert int(found.ids.min()) >= 0
    assert int(found.ids.max()) < vocab_size
    drawn = random_ids(2, blocks.context, vocab_size, RUNTIME.seed)
    assert torch.equal(found.ids[:2, 0], drawn.flatten()[:2])
    assert torch.equal(found.ids[2:], drawn)
    assert not torch.equal(found.ids[:2], drawn)
    again = other_text(teacher, blocks, recipe=CalibrationRecipe(), runtime=RUNTIME)
    assert torch.equal(found.ids, again.ids)
    other = other_text(teacher, blocks, recipe=CalibrationRecipe(), runtime=replace(RUNTIME, seed=1))
    assert not torch.equal(found.ids, other.ids)


def test_tokens_are_drawn_by_the_models_distribution(teachers: Callable[[str], Checkpoint]) -> None:
    model = load_model(teachers("llama"), CPU, torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(40)  # far from a uniform distribution
        logits = model(input_ids=FIRST[:1]).logits[0, -1]
    expected = logits.softmax(dim=-1)
    drawn = written(model, FIRST[:1].expand(4_000, 1), 2, seed=0)[:, 1]
    found = drawn.bincount(minlength=len(expected)) / len(drawn)
    assert (found - expected).abs().sum() / 2 < 0.1
    assert (torch.full_like(expected, 1 / len(expected)) - expected).abs().sum() / 2 > 0.3


def test_what_a_checkpoint_says_of_generation_changes_nothing(teachers: Callable[[str], Checkpoint]) -> None:
    model = load_model(teachers("llama"), CPU, torch.float32)
    before = torch.random.get_rng_state()
    plain = written(model, FIRST, 12, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    model.generation_config.update(repetition_penalty=9.0, top_k=1, max_length=4, eos_token_id=int(plain[0, 3]))
    assert torch.equal(written(model, FIRST, 12, seed=0), plain)
    assert not torch.equal(written(model, FIRST, 12, seed=1), plain)


def test_random_tokens_need_no_model_in_memory(
    teachers: Callable[[str], Checkpoint], blocks: Blocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, random = teachers("llama"), CalibrationRecipe(other_text="random")
    vocab_size = teacher.arch.axis_size("vocab")
    monkeypatch.setattr(Runtime, "free_memory", 1_000)
    with pytest.raises(UserError, match=r"1\.0 kB are free; --set calibration\.other_text=random needs one layer at a"):
        require_memory_to_write(teacher, CalibrationRecipe(), RUNTIME)
    require_memory_to_write(teacher, random, RUNTIME)
    monkeypatch.setattr("minitron.pruning.other_text.load_model", lambda *_: pytest.fail("a model was loaded"))
    found = other_text(teacher, blocks, recipe=random, runtime=RUNTIME)
    assert torch.equal(found.ids, random_ids(2, blocks.context, vocab_size, RUNTIME.seed))
    assert not torch.equal(found.ids, random_ids(2, blocks.context, vocab_size, 1))


def test_blocks_hold_several_texts_that_the_model_writes(
    teachers: Callable[[str], Checkpoint], blocks: Blocks, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, lengths = teachers("llama"), []

    def written(_: object, first: torch.Tensor, length: int, seed: int) -> torch.Tensor:
        lengths.append(length)
        return first + torch.arange(length)

    monkeypatch.setattr("minitron.pruning.other_text.LENGTH", 5)
    monkeypatch.setattr("minitron.pruning.other_text.written", written)
    found = other_text(teacher, blocks, recipe=CalibrationRecipe(), runtime=RUNTIME).ids
    assert lengths == [5]
    assert found.shape == (4, 12)
    texts = found[:2].flatten()
    starts = texts[::5]
    assert torch.equal(texts, (starts[:, None] + torch.arange(5)).flatten()[:24])
    assert torch.equal(starts, found[2:].flatten()[:5])
