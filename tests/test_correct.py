"""A teacher trained on the text itself: all of it, its norms, or adapters that are gone in the end."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minitron import cli
from minitron.data.blocks import Blocks
from minitron.distill.distributed import World
from minitron.distill.train import distill
from minitron.errors import UserError
from minitron.measure.perplexity import measure_perplexity
from minitron.model.causal import load_model
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.recipe import DistillRecipe
from tests.conftest import make_model

CPU = torch.device("cpu")


def blocks_of(teacher: Checkpoint) -> Blocks:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, teacher.arch.axis_size("vocab"), (6, 24), generator=generator)
    return Blocks(ids, torch.ones(6, 24, dtype=torch.int32))


def corrected(teacher: Checkpoint, folder: Path, recipe: DistillRecipe, world: World | None = None) -> Checkpoint:
    blocks, work = blocks_of(teacher), folder / "work"
    work.mkdir(parents=True)
    distill(None, teacher, blocks, blocks[:2], recipe, folder / "out", work, 0, CPU, torch.float32, world or World())
    return open_checkpoint(folder / "out")


@pytest.mark.parametrize("trains", ["norms", "lora"])
def test_every_family_comes_out_stock(teacher: Checkpoint, tmp_path: Path, trains: str) -> None:
    recipe = DistillRecipe(tokens=24 * 12, batch_size=2, learning_rate=3e-3, trains=trains, lora_rank=4)  # type: ignore[arg-type]
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
        patch.setattr("minitron.distill.train._write_student", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            corrected(teacher, tmp_path / "killed", recipe)
    (tmp_path / "killed" / "work").rename(tmp_path / "work")
    rows = (tmp_path / "work" / "checkpoint" / "state.json").read_text()
    assert '"step": 5' in rows
    distill(None, teacher, blocks_of(teacher), blocks_of(teacher)[:2], recipe, tmp_path / "out", tmp_path / "work", 0,
            CPU, torch.float32, World())  # fmt: skip
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], expected.tensor(name)) for name in found)
    assert any(not torch.equal(found[name], teacher.tensor(name)) for name in found)


def test_adapters_over_processes_are_refused(tmp_path: Path) -> None:
    teacher = open_checkpoint(make_model(tmp_path / "teacher", "llama-tied"))
    with pytest.raises(UserError, match="trains lora runs in one process; accepted under torchrun: full, norms"):
        corrected(teacher, tmp_path / "out", DistillRecipe(trains="lora", batch_size=2), World(0, 2))


def test_by_the_command_line(tmp_path: Path, text_file: Path) -> None:
    teacher = make_model(tmp_path / "teacher", "llama-tied")
    given = [str(teacher), str(tmp_path / "out"), "--data", str(text_file), "--context", "32", "--tokens", "512"]
    cli.app(["correct", *given], standalone_mode=False)
    before, after = (load_file(folder / "model.safetensors") for folder in (teacher, tmp_path / "out"))
    assert all(not torch.equal(before[name], after[name]) for name in before)
    assert (tmp_path / "out" / "metrics.jsonl").exists()
    assert not list(tmp_path.glob(".*"))
