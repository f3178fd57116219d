"""On-policy steps: how long continuations are, what of them is learnt, and that runs with them continue."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from minitron.data.blocks import Blocks
from minitron.distillation.objective import Objective
from minitron.distillation.on_policy import OnPolicy, continued
from minitron.distillation.optimizers import take_step
from minitron.distillation.teacher import Live
from minitron.distillation.trainer import Trainer, require_trainable
from minitron.errors import UserError
from minitron.files import read_jsonl
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.model.language_model import Headless, load_model
from minitron.recipe import DistillRecipe, Recipe
from minitron.runtime import Runtime
from minitron.stages import stores_states
from tests.conftest import MECHANISMS, make_model

CPU = torch.device("cpu")
RUNTIME = Runtime(CPU, torch.float32)
IDS = torch.randint(0, 250, (6, 32), generator=torch.Generator().manual_seed(0))
BLOCKS = Blocks(IDS, torch.ones_like(IDS, dtype=torch.int32))


def recipe_of(share: float = 0.5, tokens: tuple[int, int] = (4, 16), **changes: Any) -> DistillRecipe:
    values = {"tokens": 32 * 2 * 8, "batch_size": 2, "on_policy": {"share": share, "tokens": tokens}, **changes}
    return DistillRecipe.model_validate(values)


def lengths(recipe: DistillRecipe, num_steps: int, context: int) -> list[int | None]:
    plan = OnPolicy(Objective(None, recipe, RUNTIME), recipe, num_steps)
    return [plan.length(step, context) for step in range(num_steps)]


def test_continuations_double() -> None:
    assert lengths(recipe_of(0.75, (4, 16)), 8, 32) == [None, None, 4, 4, 8, 8, 16, 16]
    assert lengths(recipe_of(0.5, (4, 64)), 4, 32) == [None, None, 4, 8]  # half of a block at most
    assert lengths(recipe_of(1.0, (8, 8)), 3, 64) == [8, 8, 8]
    assert lengths(recipe_of(0.1), 5, 32) == [None] * 4 + [4]
    assert lengths(recipe_of(0.0), 3, 32) == [None] * 3


@pytest.mark.parametrize("teacher", MECHANISMS, indirect=True)
def test_a_student_continues_beginnings(teacher: Checkpoint) -> None:
    model = load_model(teacher, CPU, torch.float32)
    torch.manual_seed(0)
    found = continued(model, BLOCKS[:2], 8)
    assert found.ids.shape == (4, 16)
    pieces = IDS[:2].reshape(4, 16)
    assert torch.equal(found.ids[:, :8], pieces[:, :8])
    assert not torch.equal(found.ids[:, 8:], pieces[:, 8:])
    assert found.is_learnt is not None
    assert found.is_learnt[:, 8:].all()
    assert not found.is_learnt[:, :8].any()
    torch.manual_seed(0)
    assert torch.equal(continued(model, BLOCKS[:2], 8).ids, found.ids)
    torch.manual_seed(1)
    assert not torch.equal(continued(model, BLOCKS[:2], 8).ids, found.ids)


def test_tokens_are_drawn_from_the_student(tmp_path: Path) -> None:
    model = load_model(open_checkpoint(make_model(tmp_path / "model", "llama-tied")), CPU, torch.float32)
    many = Blocks(IDS[:1, :8].repeat(4_000, 1), torch.ones(4_000, 8, dtype=torch.int32))
    torch.manual_seed(0)
    drawn = continued(model, many, 4).ids[:, 4]
    with torch.no_grad():
        expected = model(IDS[:1, :4]).logits[0, -1].softmax(-1)
    found = torch.bincount(drawn, minlength=len(expected)) / len(drawn)
    assert float((found - expected).abs().sum() / 2) < 0.1  # total variation
    assert float((found - expected.roll(1)).abs().sum() / 2) > 0.2


def test_the_loss_is_that_of_the_continuation(tmp_path: Path) -> None:
    teacher, student = (
        load_model(open_checkpoint(make_model(tmp_path / str(seed), "llama-tied", seed=seed)), CPU, torch.float32)
        for seed in (0, 1)
    )
    recipe = recipe_of(1.0, (8, 8), on_policy={"share": 1.0, "tokens": (8, 8), "loss": "reverse_kl"})
    plan = OnPolicy(Objective(Live(teacher), recipe, RUNTIME), recipe, 1)
    blocks = continued(student, BLOCKS[:2], 8)
    objective = plan.objective_of(8, 32)
    assert objective.recipe.micro_batch_size == 2
    loss = float(objective.accumulate(Headless(student), blocks, torch.arange(len(blocks)))[0])
    with torch.no_grad():
        log_p, log_q = (model(blocks.ids).logits.log_softmax(-1) for model in (teacher, student))
        each = (log_q.exp() * (log_q - log_p)).sum(-1)
    counted = each[:, 7:16]  # from the last token of the beginning to the last of all
    assert loss == pytest.approx(float(counted.mean()), rel=1e-4)
    assert loss != pytest.approx(float(each.mean()), rel=1e-3)


def trained(folder: Path, recipe: DistillRecipe, models: tuple[Checkpoint, Checkpoint]) -> dict[str, torch.Tensor]:
    (work := folder / "work").mkdir(parents=True, exist_ok=True)
    teacher = Live(load_model(models[0], CPU, torch.float32))
    Trainer(teacher, recipe, BLOCKS, RUNTIME, work, BLOCKS[:2]).distill(models[1], folder / "out")
    found: dict[str, torch.Tensor] = load_file(folder / "out" / "model.safetensors")
    return found


def test_continues_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = (open_checkpoint(make_model(tmp_path / str(seed), "llama-tied", seed=seed)) for seed in (0, 1))
    recipe = recipe_of(0.5, checkpoint_seconds=0)
    expected = trained(tmp_path / "through", recipe, (one, other))
    rows = read_jsonl(tmp_path / "through" / "work" / "metrics.jsonl")
    assert [row.get("continued_by") for row in rows if "loss" in row] == [None] * 4 + [4, 4, 8, 16]
    plain = trained(tmp_path / "plain", recipe_of(0.0), (one, other))
    assert any(not torch.equal(plain[name], expected[name]) for name in plain)
    calls: list[int] = []

    def killed(*arguments: Any) -> float:
        if len(calls) == 6:
            raise KeyboardInterrupt
        calls.append(1)
        return take_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr("minitron.distillation.trainer.take_step", killed)
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "killed", recipe, (one, other))
    found = trained(tmp_path / "killed", recipe, (one, other))
    assert all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compile": True}, "on_policy generates with the student"),
        ({"correction": {"trains": "full"}}, "on_policy generates with the student"),
        ({"teacher_states": "x"}, "on_policy needs the teacher in memory"),
        ({"documents": "whole"}, "on_policy continues any place of a block"),
        ({"on_policy": {"share": 0.5, "tokens": (8, 4)}}, "continuations grow"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        recipe_of(**changes)


def test_processes_and_series(tmp_path: Path) -> None:
    arch = open_checkpoint(make_model(tmp_path / "model", "llama-tied")).arch
    with pytest.raises(UserError, match=r"distill.on_policy generates with a whole model"):
        require_trainable(recipe_of(), arch, torch.float32, num_ranks=2)
    require_trainable(recipe_of(0.0), arch, torch.float32, num_ranks=2)
    assert stores_states(Recipe(teacher="x"))
    assert not stores_states(Recipe(teacher="x", distill=recipe_of()))
