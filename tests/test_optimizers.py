"""Which parameters an optimizer moves, and how the learning rate goes."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from minitron.distillation.checkpoint import load_checkpoint, save_checkpoint
from minitron.distillation.optimizers import learning_rate, make_optimizer, make_state, take_step
from minitron.distillation.trainer import require_trainable
from minitron.errors import UserError
from minitron.model.checkpoint import open_checkpoint
from minitron.model.language_model import Headless, load_model
from minitron.recipe import DistillRecipe
from minitron.runtime import World
from tests.conftest import make_model

CPU = torch.device("cpu")


def test_state_is_made_without_moving_anything(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path, "llama-tied"))
    student = Headless(load_model(checkpoint, CPU, torch.float32))
    optimizer = make_optimizer(student, DistillRecipe(weight_decay=0.1))
    before = [parameter.detach().clone() for parameter in student.parameters()]
    make_state(optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
    assert all(parameter in optimizer.state for parameter in student.parameters())


@pytest.mark.parametrize("loss", [1.0, float("inf")])
def test_a_step_is_taken_only_where_all_is_finite(tmp_path: Path, loss: float) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path, "llama-tied"))
    student = Headless(load_model(checkpoint, CPU, torch.float32))
    optimizer = make_optimizer(student, DistillRecipe())
    before = [parameter.detach().clone() for parameter in student.parameters()]
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    num_parameters = sum(parameter.numel() for parameter in student.parameters())
    assert take_step(student, optimizer, 1e-3, 1.0, loss) == pytest.approx(num_parameters**0.5)
    moved = [not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True)]
    assert all(moved) if loss == 1.0 else not any(moved)
    assert all(parameter.grad is None for parameter in student.parameters())


@pytest.mark.parametrize(("eps", "is_held"), [(None, True), (1e-8, False)])
def test_weights_of_tiny_gradients_are_held(tmp_path: Path, eps: float | None, is_held: bool) -> None:
    """Rows of tokens that the text does not hold get gradients of noise, which Adam by itself steps along in full."""
    checkpoint = open_checkpoint(make_model(tmp_path, "llama-tied"))
    student, recipe = Headless(load_model(checkpoint, CPU, torch.float32)), DistillRecipe(eps=eps)
    optimizer = make_optimizer(student, recipe)
    embedding = student.model.get_input_embeddings().weight  # type: ignore[operator]
    before = embedding.detach().clone()
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    embedding.grad[:100] = 1e-4
    take_step(student, optimizer, 1e-3, recipe.max_grad_norm, 1.0)
    moved = (embedding.detach() - before).abs().mean(dim=1)
    assert moved[100:].mean() == pytest.approx(1e-3 / (1 + 0.3 * is_held), rel=0.02)
    assert (moved[:100].max() < 1e-6) == is_held


def test_moments_of_eight_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They move weights nearly as whole ones do, and are the same when read back from a checkpoint."""
    # torchao would compile its step for each shape of a weight, which takes a minute.
    monkeypatch.setattr(torch, "compile", lambda step, **_: step)
    checkpoint = open_checkpoint(make_model(tmp_path / "model", "llama-tied", hidden_size=96))

    def student_after(kind: str, steps: range, folder: Path | None = None) -> tuple[Headless, Any]:
        student = Headless(load_model(checkpoint, CPU, torch.float32))
        optimizer = make_optimizer(student, DistillRecipe(optimizer=kind))  # type: ignore[arg-type]
        if folder:
            assert load_checkpoint(folder, {"student": (student, optimizer)}, World()) == steps.start
        for step in steps:
            generator = torch.Generator().manual_seed(step)
            for parameter in student.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            take_step(student, optimizer, 1e-3, 1.0, 1.0)
        return student, optimizer

    start, _ = student_after("adamw", range(0))
    whole, _ = student_after("adamw", range(6))
    eight, optimizer = student_after("adamw8bit", range(3))
    state = optimizer.state[eight.model.get_submodule("model.layers.0.mlp.down_proj").weight]
    assert {type(state[name]).__name__ for name in ("exp_avg", "exp_avg_sq")} == {"OptimState8bit"}
    save_checkpoint(tmp_path, {"student": (eight, optimizer)}, 3, World())
    resumed, _ = student_after("adamw8bit", range(3, 6), tmp_path)
    through, _ = student_after("adamw8bit", range(6))
    way, error = (
        sum(
            float((a - b).detach().square().sum())
            for a, b in zip(through.parameters(), other.parameters(), strict=True)
        )
        for other in (start, whole)
    )
    assert 0 < error < 0.02 * way
    assert all(torch.equal(a, b) for a, b in zip(through.parameters(), resumed.parameters(), strict=True))


def test_eight_bits_over_processes_are_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path, "llama-tied"))
    recipe = DistillRecipe(optimizer="adamw8bit")
    with pytest.raises(UserError, match="adamw8bit runs in one process; accepted under torchrun: adamw"):
        require_trainable(recipe, checkpoint.arch, torch.float32, num_ranks=2)
    require_trainable(recipe, checkpoint.arch, torch.float32, num_ranks=1)


def test_schedules() -> None:
    recipe = DistillRecipe(learning_rate=1.0, warmup_ratio=0.1, min_learning_rate_ratio=0.1, decay_ratio=0.25)
    cosine = [learning_rate(step, 100, recipe) for step in range(100)]
    stable = [learning_rate(step, 100, recipe.model_copy(update={"schedule": "wsd"})) for step in range(100)]
    assert cosine[:10] == stable[:10] == [(step + 1) / 10 for step in range(10)]
    assert cosine[10] == stable[10] == 1.0
    assert cosine[55] == pytest.approx(0.55)
    assert stable[74] == 1.0
    assert stable[75] == 1.0
    assert stable[80] == pytest.approx(0.82)
    for rates in (cosine, stable):
        assert all(a >= b for a, b in pairwise(rates[10:]))
        assert 0.1 < rates[-1] < 0.14


def test_a_warm_up_is_a_number_of_steps_or_a_share() -> None:
    def rates(num_steps: int, **given: Any) -> list[float]:
        recipe = DistillRecipe(learning_rate=1.0, **given)
        return [learning_rate(step, num_steps, recipe) for step in range(num_steps)]

    for given, warm_up in (({"warmup_steps": 30}, 30), ({"warmup_ratio": 0.2}, 40), ({}, 10), ({"warmup_steps": 0}, 1)):
        found = rates(200, **given)
        assert found[:warm_up] == [(step + 1) / warm_up for step in range(warm_up)]
        assert found[warm_up] == 1.0 > found[warm_up + 1]
    assert rates(200, warmup_steps=30)[:30] == rates(100, warmup_steps=30)[:30]
    assert rates(200, warmup_ratio=0.2)[:20] != rates(100, warmup_ratio=0.2)[:20]
    with pytest.raises(ValueError, match="give warmup_ratio or warmup_steps, not both"):
        rates(200, warmup_steps=30, warmup_ratio=0.05)
