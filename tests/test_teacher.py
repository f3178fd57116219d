"""What is stored of a teacher is what it says: to the bit in float32, over many processes, after a kill."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron import cli
from minitron.data.blocks import Blocks
from minitron.distillation import teacher as module
from minitron.distillation.fused import States, TopTokens
from minitron.distillation.teacher import Live, Source, Teacher, stored
from minitron.distillation.trainer import Trainer
from minitron.errors import UserError
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.model.language_model import load_model, read_head
from minitron.recipe import DistillRecipe
from minitron.runtime import Runtime, World
from tests.conftest import make_model

CPU = torch.device("cpu")
BLOCKS = Blocks(
    torch.randint(0, 258, (7, 24), generator=torch.Generator().manual_seed(0)), torch.ones(7, 24, dtype=torch.int32)
)
Recipe = DistillRecipe


def kept(checkpoint: Checkpoint, folder: Path, recipe: DistillRecipe, world: World | None = None,
         identity: dict[str, str] | None = None, model: Callable[[], Any] | None = None) -> Teacher:  # fmt: skip
    head = read_head(checkpoint, CPU, torch.float32)
    loaded = model or (lambda: nullcontext(load_model(checkpoint, CPU, torch.float32)))
    return stored(folder, Source(identity or {"teacher": "a"}, loaded, head), BLOCKS, recipe, world or World())


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SHARD_BYTES", 10_000)


def no_model() -> Any:
    raise AssertionError("the model is not needed any more")


def test_float32_states_are_the_teachers(teacher: Checkpoint, tmp_path: Path) -> None:
    recipe = Recipe(teacher_states="x", stored_dtype="float32")
    found = kept(teacher, tmp_path / "states", recipe)
    running = Live(load_model(teacher, CPU, torch.float32))
    assert len(list((tmp_path / "states").glob("*.safetensors"))) > 1
    for numbers in (torch.tensor([3]), torch.tensor([6, 0, 3])):
        expected = [running(BLOCKS.ids[number][None], number[None]) for number in numbers]
        said = found(BLOCKS.ids[numbers], numbers, None)
        assert isinstance(said, States)
        for i, one in enumerate(expected):
            assert isinstance(one, States)
            assert torch.equal(said.hidden[i], one.hidden[0])
            assert torch.equal(said.head.weight, one.head.weight)
            assert said.head.softcap == one.head.softcap
        assert all(not torch.equal(said.hidden[0], other) for other in said.hidden[1:])


def student_of(source: Teacher | None, pruned: Checkpoint, folder: Path, recipe: DistillRecipe) -> dict[str, Any]:
    folder.mkdir()
    trainer = Trainer(source, recipe, BLOCKS, Runtime(CPU, torch.float32), folder, BLOCKS[:2])
    trainer.distill(pruned, folder / "out")
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {"loss": rows[-1]["loss"], **load_file(folder / "out" / "model.safetensors")}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_students_of_either_are_alike(dtype: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path / "teacher", "llama-tied"))
    pruned = open_checkpoint(make_model(tmp_path / "student", "llama-tied", seed=1, intermediate_size=40))
    recipe = Recipe(tokens=24 * 20, batch_size=2, stored_dtype=dtype)  # type: ignore[arg-type]
    one = student_of(Live(load_model(checkpoint, CPU, torch.float32)), pruned, tmp_path / "live", recipe)
    other = student_of(kept(checkpoint, tmp_path / "states", recipe), pruned, tmp_path / "stored", recipe)
    same = [bool((one[name] == other[name]).all()) for name in one if name != "loss"]
    assert all(same) == (dtype == "float32")
    assert abs(other["loss"] / one["loss"] - 1) < (1e-12 if dtype == "float32" else 5e-3)


def test_likeliest_tokens_with_a_tail(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path / "teacher", "gemma2"))
    recipe = Recipe(teacher_states="x", stored="top_k", top_k=5, temperature=2.0)
    said = kept(checkpoint, tmp_path / "states", recipe)(BLOCKS.ids[4:5], torch.tensor([4]), None)
    with torch.no_grad():
        logits = load_model(checkpoint, CPU, torch.float32)(BLOCKS.ids[4:5]).logits / 2
    assert isinstance(said, TopTokens)
    p = logits.softmax(dim=-1).gather(-1, said.indices.long())
    torch.testing.assert_close(said.classes.softmax(dim=-1)[..., :-1], p, atol=1e-5, rtol=1e-4)
    assert float((logits.softmax(dim=-1).topk(5).values.sum(-1) - p.sum(-1)).abs().max()) < 1e-5
    pruned = open_checkpoint(make_model(tmp_path / "student", "gemma2", seed=1))
    student = student_of(kept(checkpoint, tmp_path / "states", recipe, model=no_model), pruned, tmp_path / "out",
                         Recipe(tokens=24 * 8, batch_size=2, top_k=5, temperature=2.0))  # fmt: skip
    running = student_of(Live(load_model(checkpoint, CPU, torch.float32)), pruned, tmp_path / "live",
                         Recipe(tokens=24 * 8, batch_size=2, top_k=5, temperature=2.0))  # fmt: skip
    assert abs(student["loss"] / running["loss"] - 1) < 1e-5


def test_by_the_command_line(tmp_path: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher, student = make_model(tmp_path / "teacher", "llama-tied"), make_model(tmp_path / "student", "llama-tied", 1)
    given = [str(teacher), str(student), "--data", str(text_file), "--context", "32", "--tokens", "512"]
    given += ["--dtype", "float32"]  # elsewhere products may round their operands to bfloat16, stored or not
    states = ["--teacher-states", str(tmp_path / "states")]
    for out, more in (("one", states), ("two", states), ("three", [])):
        cli.app(["distill", *given[:2], str(tmp_path / out), *given[2:], *more], standalone_mode=False)
    one, two, three = (load_file(tmp_path / out / "model.safetensors") for out in ("one", "two", "three"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert any(not torch.equal(one[name], three[name]) for name in one)  # bfloat16 is not float32
    assert json.loads((tmp_path / "states" / "states.json").read_text())["dtype"] == "torch.float32"
    capsys.readouterr()
    (tmp_path / "other.txt").write_text(text_file.read_text()[::-1])
    others = ["--data", str(tmp_path / "other.txt"), *given[4:], *states]
    with pytest.raises(UserError, match="holds states of another blocks: name another folder"):
        cli.app(["distill", *given[:2], str(tmp_path / "four"), *others], standalone_mode=False)


def test_what_is_there_is_not_made_again(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path / "teacher", "llama-tied"))
    folder, recipe = tmp_path / "states", Recipe()
    kept(checkpoint, folder, recipe)
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    kept(checkpoint, folder, recipe, model=no_model)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    lost = sorted(folder.glob("*.safetensors"))[1]
    content = lost.read_bytes()
    lost.unlink()
    kept(checkpoint, folder, recipe)
    assert lost.read_bytes() == content


def test_ranks_share_the_work(tmp_path: Path) -> None:
    class Quiet(World):
        def barrier(self) -> None:
            pass

    checkpoint, recipe = open_checkpoint(make_model(tmp_path / "teacher", "llama-tied")), Recipe()
    kept(checkpoint, tmp_path / "one", recipe)
    kept(checkpoint, tmp_path / "two", recipe, Quiet(0, 2))
    halves = set((tmp_path / "two").iterdir())
    kept(checkpoint, tmp_path / "two", recipe, Quiet(1, 2))
    assert 1 < len(halves) < len(list((tmp_path / "two").iterdir()))
    for path in (tmp_path / "one").iterdir():
        assert (tmp_path / "two" / path.name).read_bytes() == path.read_bytes()


def test_others_states_are_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path / "teacher", "llama-tied"))
    folder = tmp_path / "states"
    kept(checkpoint, folder, Recipe())
    with pytest.raises(UserError, match="holds states of another teacher:"):
        kept(checkpoint, folder, Recipe(), identity={"teacher": "b"})
    with pytest.raises(UserError, match="holds states of another stored:"):
        kept(checkpoint, folder, Recipe(stored_dtype="float32"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match=r"exists and holds no states\.json"):
        kept(checkpoint, tmp_path / "other", Recipe())


def test_damaged_states_are_refused(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path / "teacher", "llama-tied"))
    folder = tmp_path / "states"
    kept(checkpoint, folder, Recipe())
    path = folder / "states-00000.safetensors"
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    metadata = {"sha256": module._checksum(tensors)}
    tensors["hidden"][0, 0, 0] += 1
    save_file(tensors, path, metadata=metadata)
    found = kept(checkpoint, folder, Recipe(), model=no_model)
    with pytest.raises(UserError, match=r"states-00000.safetensors is damaged"):
        found(BLOCKS.ids[:1], torch.tensor([0]), None)
    found(BLOCKS.ids[6:], torch.tensor([6]), None)
