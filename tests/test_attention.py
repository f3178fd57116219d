"""Tests the choice of how transformers computes attention: `attn_implementation`."""

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron.data.blocks import Blocks
from minitron.distillation.teacher import Live
from minitron.distillation.trainer import Trainer
from minitron.errors import UserError
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.model.language_model import load_model, require_attention
from minitron.model.memory import writes_out_attention
from minitron.pruning.calibrate import calibrate
from minitron.recipe import CalibrationRecipe, DistillRecipe, recipe_from
from minitron.runtime import Runtime
from minitron.session import Session
from tests.conftest import make_model, variant_arch

CPU = torch.device("cpu")
SMOLLM2 = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "head_dim": 64,
    "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 2048,
}  # fmt: skip


def runtime_of(attention: str | None) -> Runtime:
    return Runtime(CPU, torch.float32, attention=attention)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> set[str | None]:
    """Return the set of ways in which a Llama computes attention from now on, filled in as models run."""
    from transformers.models.llama import modeling_llama

    ways: set[str | None] = set()
    functions = modeling_llama.ALL_ATTENTION_FUNCTIONS
    chosen = functions.get_interface

    def get_interface(way: str | None, default: Any) -> Any:
        ways.add(way)
        return chosen(way, default)

    monkeypatch.setattr(functions, "get_interface", get_interface)
    return ways


@pytest.mark.parametrize("variant", ["llama", "mistral", "gemma3", "nemotron_h"])
def test_layers_one_by_one_have_the_masks_of_the_chosen_attention(
    teachers: Callable[[str], Checkpoint], variant: str
) -> None:
    teacher = teachers(variant)
    ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))  # longer than the windows
    blocks = Blocks(ids, torch.ones_like(ids, dtype=torch.int32))
    found = {}
    for way in ("eager", "sdpa"):
        statistics = calibrate(teacher, blocks, recipe=CalibrationRecipe(), runtime=runtime_of(way), others=blocks[:1])
        model = load_model(teacher, CPU, torch.float32, way)
        assert model.config._attn_implementation == way
        with torch.no_grad():
            states = model(input_ids=ids, output_hidden_states=True).hidden_states
        cosine = torch.nn.functional.cosine_similarity(states[0], states[1], dim=-1)
        torch.testing.assert_close(statistics["block_influence"][0].float(), 1 - cosine.mean(), rtol=1e-4, atol=1e-5)
        found[way] = statistics
    for key, value in found["eager"].items():
        torch.testing.assert_close(value, found["sdpa"][key], rtol=1e-3, atol=1e-5)


def test_a_choice_is_used_and_leaves_the_teacher_as_it_is(tmp_path: Path, used: set[str | None]) -> None:
    folder = make_model(tmp_path / "model", "llama")
    before = open_checkpoint(folder).identity()
    for way in ("eager", None):
        session = Session(recipe_from(None, teacher=folder, device="cpu", attn_implementation=way))
        session.validate()
        session.require_one_reading()
        used.clear()
        with session.teacher_model() as model, torch.no_grad():
            model(input_ids=torch.zeros(1, 4, dtype=torch.int64))
        assert used == {way or "sdpa"}
        assert session.teacher.identity() == before


@pytest.mark.parametrize(("way", "rounds"), [(None, True), (None, False), ("sdpa", True)])
def test_a_student_in_training_has_attention_written_out_where_products_are_rounded_and_nothing_is_chosen(
    tmp_path: Path, used: set[str | None], way: str | None, rounds: bool, teachers: Callable[[str], Checkpoint]
) -> None:
    """Where its numbers per pair of tokens are few; the teacher, which has no backward pass, stays as it is."""
    expected = "eager" if rounds and way is None else "sdpa"
    teacher, ids = teachers("llama"), torch.zeros(2, 16, dtype=torch.int64)
    live = Live(load_model(teacher, CPU, torch.float32, way))
    recipe, blocks = DistillRecipe(tokens=32, batch_size=2), Blocks(ids, torch.ones_like(ids, dtype=torch.int32))
    used.clear()
    trainer = Trainer(live, recipe, blocks, replace(runtime_of(way), rounds=rounds), tmp_path)
    student = trainer.trained(teacher)
    config: Any = student.headless.model.config
    assert config._attn_implementation == expected
    assert used == {"sdpa", expected}


def test_attention_is_written_out_where_its_pairs_take_little_memory() -> None:
    arch = Arch.from_config({**SMOLLM2, "model_type": "llama"})  # 9 heads, 30 layers
    assert writes_out_attention(arch, 1, 1024, "cpu")
    assert writes_out_attention(arch, 4, 512, "cpu")
    assert not writes_out_attention(arch, 8, 512, "cpu")
    assert not writes_out_attention(arch, 1, 2048, "cpu")
    assert not writes_out_attention(arch, 1, 512, "cuda")
    assert not writes_out_attention(variant_arch("mamba2"), 1, 16, "cpu")


@pytest.mark.parametrize(
    ("way", "complaint"),
    [
        ("flash_attention_2", "attn_implementation flash_attention_2 needs a GPU and bfloat16 or float16, not cpu"),
        ("sdpa", "attn_implementation sdpa: Mamba2ForCausalLM does not support"),
    ],
)
def test_what_cannot_be_computed_is_refused_before_any_work(
    teachers: Callable[[str], Checkpoint], way: str, complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint) as refusal:
        require_attention(teachers("mamba2"), runtime_of(way))
    assert "\n" not in str(refusal.value)
    require_attention(teachers("mamba2"), runtime_of(None))


@pytest.mark.skipif(find_spec("flash_attn") is not None, reason="the package is here")
def test_a_missing_package_is_named(teachers: Callable[[str], Checkpoint]) -> None:
    gpu = Runtime(torch.device("cuda"), torch.bfloat16, attention="flash_attention_2")
    with pytest.raises(UserError, match=r"attn_implementation flash_attention_2: .*FlashAttention2.* installed"):
        require_attention(teachers("llama"), gpu)


def test_an_unknown_choice_is_refused_with_those_that_exist(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="attn_implementation: Input should be 'eager', 'sdpa'"):
        recipe_from(None, teacher="teacher", attn_implementation="fast")
