"""A teacher trained on the text itself: all of it, its norms, or adapters that are gone in the end."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from minitron import cli
from minitron.data.blocks import Blocks
from minitron.distillation.correction import recipe_of_correction
from minitron.distillation.intermediate import compare_on_the_way
from minitron.distillation.objective import Objective
from minitron.distillation.optimizers import learning_rate, make_optimizer, take_step
from minitron.distillation.teacher import Learning, Live
from minitron.distillation.trainer import Trainer, batch_indices
from minitron.errors import UserError
from minitron.evaluation.perplexity import measure_perplexity
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.model.language_model import Headless, load_model
from minitron.recipe import CorrectionRecipe, DistillRecipe, IntermediateRecipe
from minitron.runtime import Runtime, World
from tests.conftest import MECHANISMS, VARIANTS, make_model

CPU = torch.device("cpu")
RUNTIME = Runtime(CPU, torch.float32)


def blocks_of(teacher: Checkpoint) -> Blocks:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, teacher.arch.axis_size("vocab"), (6, 24), generator=generator)
    return Blocks(ids, torch.ones(6, 24, dtype=torch.int32))


def corrected(teacher: Checkpoint, folder: Path, recipe: DistillRecipe, world: World | None = None) -> Checkpoint:
    blocks, work = blocks_of(teacher), folder / "work"
    work.mkdir(parents=True)
    runtime = Runtime(CPU, torch.float32, world=world or World())
    Trainer(None, recipe, blocks, runtime, work, blocks[:2]).distill(teacher, folder / "out")
    return open_checkpoint(folder / "out")


@pytest.mark.parametrize(
    ("teacher", "trains"),
    [*((variant, "norms") for variant in VARIANTS), *((variant, "lora") for variant in MECHANISMS)],
    indirect=["teacher"],
)
def test_every_family_comes_out_stock(teacher: Checkpoint, tmp_path: Path, trains: str) -> None:
    recipe = DistillRecipe(tokens=24 * 4, batch_size=2, learning_rate=3e-3, trains=trains, lora_rank=4)  # type: ignore[arg-type]
    student = corrected(teacher, tmp_path, recipe)
    assert set(student.tensors) == set(teacher.tensors)
    changed = {name for name in teacher.tensors if not torch.equal(teacher.tensor(name), student.tensor(name))}
    norms = {name for name in teacher.tensors for norm in teacher.arch.family.norms
             if name.startswith(tuple(norm.name.replace("{i}", str(i)) + "." for i in range(9)))}  # fmt: skip
    assert changed
    assert changed == norms if trains == "norms" else not changed & norms
    blocks = blocks_of(teacher)
    before, after = (measure_perplexity(load_model(c, CPU, torch.float32), blocks) for c in (teacher, student))
    assert after.perplexity < before.perplexity


def test_adapters_continue_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher = open_checkpoint(make_model(tmp_path / "teacher", "llama-tied"))
    recipe = DistillRecipe(tokens=24 * 12, batch_size=2, trains="lora", lora_rank=4, checkpoint_seconds=0)
    expected = corrected(teacher, tmp_path / "through", recipe)
    with monkeypatch.context() as patch:
        patch.setattr(
            "minitron.distillation.trainer.write_trained", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            corrected(teacher, tmp_path / "killed", recipe)
    (tmp_path / "killed" / "work").rename(tmp_path / "work")
    rows = (tmp_path / "work" / "checkpoint" / "state.json").read_text()
    assert '"step": 5' in rows
    blocks = blocks_of(teacher)
    Trainer(None, recipe, blocks, RUNTIME, tmp_path / "work", blocks[:2]).distill(teacher, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], expected.tensor(name)) for name in found)
    assert any(not torch.equal(found[name], teacher.tensor(name)) for name in found)


def test_adapters_over_processes_are_refused(tmp_path: Path) -> None:
    teacher = open_checkpoint(make_model(tmp_path / "teacher", "llama-tied"))
    with pytest.raises(UserError, match="trains lora runs in one process; accepted under torchrun: full, norms"):
        corrected(teacher, tmp_path / "out", DistillRecipe(trains="lora", batch_size=2), World(0, 2))


def taught(folder: Path, teacher: Checkpoint, pruned: Checkpoint, recipe: DistillRecipe) -> Checkpoint:
    blocks, work = blocks_of(teacher), folder / "work"
    work.mkdir(parents=True, exist_ok=True)
    model = load_model(teacher, CPU, torch.float32)
    learns = recipe.correction.trains != "nothing"
    said = Learning(model, recipe.correction, 0) if learns else Live(model)
    Trainer(said, recipe, blocks, RUNTIME, work, blocks[:2]).distill(pruned, folder / "out")
    return open_checkpoint(folder / "out")


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Checkpoint, Checkpoint]:
    return tuple(open_checkpoint(make_model(tmp_path / str(n), "llama-tied", seed=n)) for n in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("trains", ["full", "norms", "lora"])
def test_a_teacher_that_learns_is_one_that_learnt_before_from_the_same_steps(
    pair: tuple[Checkpoint, Checkpoint], trains: Any
) -> None:
    """What it says at a step is what it would say after training alone up to there."""
    recipe = DistillRecipe(tokens=24 * 12, batch_size=2, correction=CorrectionRecipe(trains=trains, lora_rank=4))
    rows = []
    for part in (recipe.correction, None):
        model = load_model(pair[0], CPU, torch.float32)
        said = Learning(model, recipe.correction, 0)
        alone = Headless(model) if part is None else None
        optimizer = make_optimizer(said.headless, recipe)
        student = alone or Headless(load_model(pair[1], CPU, torch.float32))
        for step in range(4):
            numbers = batch_indices(step, 2, 6, 0)
            blocks = blocks_of(pair[0])[numbers]
            sums = Objective(None if alone else said, recipe, RUNTIME).accumulate(student, blocks, numbers)
            rows.append(float(sums[0 if alone else 3]))
            take_step(said.headless, optimizer, 1e-3, 1.0, 1.0)
            student.zero_grad()
    assert rows[:4] == pytest.approx(rows[4:], rel=1e-6)
    assert rows[0] > rows[3]


@pytest.mark.parametrize("of", [(), ("embedding", "block_output", "mlp_input", "attention")])
def test_a_student_teaches_its_teacher_nothing(pair: tuple[Checkpoint, Checkpoint], of: Any) -> None:
    """Whatever the student is held against, the teacher's gradient is that of its own cross-entropy."""
    recipe = DistillRecipe(batch_size=2, correction=CorrectionRecipe(trains="full"))
    said = Learning(load_model(pair[0], CPU, torch.float32), recipe.correction, 0)
    student, alone = (Headless(load_model(checkpoint, CPU, torch.float32)) for checkpoint in (pair[1], pair[0]))
    between = None
    if of:
        arches = pair[0].arch, pair[1].arch
        between = compare_on_the_way(said.headless.model, arches[0], student, arches[1], IntermediateRecipe(of=of), CPU)
    blocks = blocks_of(pair[0])[:2]
    Objective(said, recipe, RUNTIME, between).accumulate(student, blocks, torch.arange(2))
    Objective(None, recipe, RUNTIME).accumulate(alone, blocks, torch.arange(2))
    for found, expected in zip(said.headless.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad)
    assert any(parameter.grad.any() for parameter in student.parameters() if parameter.grad is not None)


def test_a_student_of_a_learning_teacher_continues_after_a_kill(
    pair: tuple[Checkpoint, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = DistillRecipe(
        tokens=24 * 12, batch_size=2, checkpoint_seconds=0, correction=CorrectionRecipe(trains="full")
    )
    expected = taught(tmp_path / "through", *pair, recipe)
    with monkeypatch.context() as patch:
        patch.setattr(
            "minitron.distillation.trainer.write_trained", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            taught(tmp_path / "killed", *pair, recipe)
    found = taught(tmp_path / "killed", *pair, recipe)
    assert all(torch.equal(found.tensor(name), expected.tensor(name)) for name in found.tensors)
    other = taught(tmp_path / "other", *pair, DistillRecipe(tokens=24 * 12, batch_size=2))
    assert any(not torch.equal(other.tensor(name), expected.tensor(name)) for name in other.tensors)
    rows = [json.loads(row) for row in (tmp_path / "killed" / "work" / "metrics.jsonl").read_text().splitlines()]
    assert all("teacher_loss" in row for row in rows[1:])


def test_by_the_command_line_alongside(tmp_path: Path, text_file: Path) -> None:
    teacher, student = (make_model(tmp_path / name, "llama-tied") for name in ("teacher", "student"))
    before = (teacher / "model.safetensors").read_bytes()
    (tmp_path / "recipe.yaml").write_text("distill: {correction: {trains: norms}}")
    given = [str(teacher), str(student), str(tmp_path / "out"), "--data", str(text_file), "--context", "32",
             "--tokens", "512", "--recipe", str(tmp_path / "recipe.yaml")]  # fmt: skip
    cli.app(["distill", *given], standalone_mode=False)
    assert "teacher_loss" in (tmp_path / "out" / "metrics.jsonl").read_text()
    assert (teacher / "model.safetensors").read_bytes() == before
    with pytest.raises(UserError, match="correction trains the teacher; teacher_states holds"):
        cli.app(["distill", *given, "--overwrite", "--teacher-states", str(tmp_path / "st")], standalone_mode=False)


def test_by_the_command_line(tmp_path: Path, text_file: Path) -> None:
    teacher = make_model(tmp_path / "teacher", "llama-tied")
    given = [str(teacher), str(tmp_path / "out"), "--data", str(text_file), "--context", "32", "--tokens", "512"]
    cli.app(["correct", *given], standalone_mode=False)
    before, after = (load_file(folder / "model.safetensors") for folder in (teacher, tmp_path / "out"))
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "out" / "metrics.jsonl").exists()
    assert not list(tmp_path.glob(".*"))


def test_the_settings_are_the_papers() -> None:
    """120 warm-up steps, a fifth of the peak, the least rate and the schedule of the teacher's own training."""
    original = {"learning_rate": 3e-4, "min_learning_rate": 3e-5, "schedule": "wsd"}
    given = DistillRecipe(learning_rate=7e-4, correction={"original": original})  # type: ignore[arg-type]
    found = recipe_of_correction(given, 15_000)
    rates = [learning_rate(step, 15_000, found) for step in range(15_000)]
    assert rates[119] == pytest.approx(3e-4 / 5)
    assert rates[119:12_001] == pytest.approx([max(rates)] * 11_882)
    assert rates[118] < rates[119]
    assert rates[-1] == pytest.approx(3e-5, rel=1e-3)
    # Short trainings warm up in proportion; what is given stays.
    assert [recipe_of_correction(given, steps).warmup_steps for steps in (40, 2_400, 9_000)] == [2, 120, 120]
    plain = DistillRecipe(learning_rate=7e-4, warmup_ratio=0.1)
    assert recipe_of_correction(plain, 100) == plain
    # The control: a distillation with these settings has none of this.
    assert max(learning_rate(step, 15_000, given) for step in range(15_000)) == 7e-4
    assert learning_rate(119, 15_000, given) < 7e-4


@pytest.mark.parametrize(
    ("given", "rate"),
    [({}, 1e-4), ({"learning_rate": 2e-4}, 2e-4), ({"original": {"learning_rate": 3e-4}}, 3e-4 / 5)],
)
def test_a_teacher_that_learns_while_it_teaches_has_a_rate(
    pair: tuple[Checkpoint, Checkpoint], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: Any, rate: float
) -> None:
    rates = []

    def noted(model: Headless, optimizer: Any, rate: float, *rest: Any) -> float:
        rates.append(rate)
        return take_step(model, optimizer, rate, *rest)

    monkeypatch.setattr("minitron.distillation.trainer.take_step", noted)
    correction = CorrectionRecipe(trains="norms", **given)
    taught(tmp_path, *pair, DistillRecipe(tokens=24 * 4, batch_size=2, correction=correction))
    assert max(rates[1::2]) == pytest.approx(rate)
    assert max(rates[::2]) == pytest.approx(5e-4)


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ("correction: {learning_rate: 1.0e-4, original: {learning_rate: 3.0e-4}}", "a fifth of which is the rate, not"),
        ("correction: {original: {learning_rate: 1.0e-4, min_learning_rate: 5.0e-5}}", "5e-05 is above the peak"),
        ("warmup_steps: 16", r"warmup_steps 16 takes all 16 steps of the training; accepted: fewer"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_any_work(
    tmp_path: Path, text_file: Path, given: str, complaint: str
) -> None:
    teacher = make_model(tmp_path / "teacher", "llama-tied")
    (tmp_path / "recipe.yaml").write_text(f"distill: {{{given}}}")
    options = [
        "--data",
        str(text_file),
        "--context",
        "32",
        "--tokens",
        "512",
        "--recipe",
        str(tmp_path / "recipe.yaml"),
    ]
    with pytest.raises(UserError, match=complaint):
        cli.app(["correct", str(teacher), str(tmp_path / "out"), *options], standalone_mode=False)
    assert not (tmp_path / "out").exists()
