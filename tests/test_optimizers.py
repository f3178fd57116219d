"""Which parameters an optimizer moves, and how the learning rate goes."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from minitron.distill.optimizers import learning_rate, make_optimizers, make_state, take_step
from minitron.model.causal import Headless, load_model
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.recipe import DistillRecipe
from tests.conftest import make_model

CPU = torch.device("cpu")


def test_muon_moves_the_matrices_of_the_layers_and_adamw_the_rest(teacher: Checkpoint) -> None:
    student = Headless(load_model(teacher, CPU, torch.float32))
    muon, adamw = make_optimizers(student, teacher.arch, DistillRecipe(optimizer="muon"))
    assert isinstance(muon, torch.optim.Muon)
    moved = [{id(p) for group in optimizer.param_groups for p in group["params"]} for optimizer in (muon, adamw)]
    assert not moved[0] & moved[1]
    for name, parameter in student.named_parameters():
        is_matrix = parameter.ndim == 2 and any(part.isdigit() for part in name.split("."))
        assert id(parameter) in moved[0 if is_matrix else 1], name


def test_state_is_made_without_moving_anything(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path, "llama-tied"))
    for kind in ("adamw", "muon"):
        student = Headless(load_model(checkpoint, CPU, torch.float32))
        optimizers = make_optimizers(student, checkpoint.arch, DistillRecipe(optimizer=kind, weight_decay=0.1))  # type: ignore[arg-type]
        before = [parameter.detach().clone() for parameter in student.parameters()]
        make_state(optimizers)
        assert all(torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True))
        assert all(any(parameter in optimizer.state for optimizer in optimizers) for parameter in student.parameters())


@pytest.mark.parametrize("loss", [1.0, float("inf")])
def test_a_step_is_taken_only_where_all_is_finite(tmp_path: Path, loss: float) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path, "llama-tied"))
    student = Headless(load_model(checkpoint, CPU, torch.float32))
    optimizers = make_optimizers(student, checkpoint.arch, DistillRecipe())
    before = [parameter.detach().clone() for parameter in student.parameters()]
    for parameter in student.parameters():
        parameter.grad = torch.ones_like(parameter)
    num_parameters = sum(parameter.numel() for parameter in student.parameters())
    assert take_step(student, optimizers, 1e-3, 1.0, loss) == pytest.approx(num_parameters**0.5)
    moved = [not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True)]
    assert all(moved) if loss == 1.0 else not any(moved)
    assert all(parameter.grad is None for parameter in student.parameters())


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
