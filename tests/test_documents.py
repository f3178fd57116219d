"""Documents of a block kept apart: each is seen as if it stood alone."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from minitron import cli
from minitron.data.blocks import Blocks
from minitron.data.packing import Packing, SplitTokens, pack, read_splits
from minitron.distillation.fused import States
from minitron.distillation.teacher import Source, stored
from minitron.errors import UserError
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.model.language_model import Headless, load_model, read_head
from minitron.recipe import DistillRecipe, Recipe
from minitron.runtime import World
from minitron.session import Session
from tests.conftest import byte_tokenizer, make_model

CPU = torch.device("cpu")
LENGTHS = (7, 1, 22, 10)
IDS = torch.randint(0, 250, (2, 40), generator=torch.Generator().manual_seed(0))
STARTS = torch.zeros(2, 40, dtype=torch.bool)
STARTS[0, [0, 7, 8, 30]] = True
STARTS[1, [3]] = True
BLOCKS = Blocks(IDS, torch.ones_like(IDS), starts=STARTS)


@torch.no_grad()
def states(model: Headless, ids: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    found: States = model(ids, States, positions)
    return found.hidden


def test_positions() -> None:
    assert BLOCKS.positions is not None
    assert BLOCKS.positions[0].tolist() == [i for length in LENGTHS for i in range(length)]
    assert BLOCKS.positions[1].tolist() == [*range(3), *range(37)]
    assert Blocks(IDS, torch.ones_like(IDS)).positions is None
    assert BLOCKS.fingerprint() != Blocks(IDS, torch.ones_like(IDS)).fingerprint()


def test_each_document_is_seen_alone(teacher: Checkpoint) -> None:
    model = Headless(load_model(teacher, CPU, torch.float32))
    together = states(model, IDS[:1], BLOCKS[:1].positions)
    alone = torch.cat([states(model, part) for part in IDS[:1].split(LENGTHS, dim=1)], dim=1)
    if teacher.arch.family.joins_documents:
        assert not torch.allclose(together, alone, atol=1e-2)
        return
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(states(model, IDS[:1]), alone, atol=1e-2)
    both = states(model, IDS, BLOCKS.positions)
    torch.testing.assert_close(both[:1], together, atol=1e-4, rtol=1e-4)


def test_only_training_keeps_them_apart(tmp_path: Path) -> None:
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"text": "text number {i}"}}\n' for i in range(400)))
    packing = Packing(byte_tokenizer(), 258, 32, documents="apart")
    splits = read_splits(str(tmp_path / "texts.jsonl"), packing, SplitTokens(64, 64, 640))
    assert splits.evaluation.starts is None
    assert splits.heldout.starts is None
    assert splits.train.starts is not None
    one = pack(["text number 1"], Packing(byte_tokenizer(), 258, 2))
    assert torch.equal(splits.train.ids[splits.train.starts], one.ids[0, 0].expand(int(splits.train.starts.sum())))
    assert len(splits.train) < int(splits.train.starts.sum())


def test_stored_states_are_those_of_documents(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(make_model(tmp_path / "teacher", "llama-tied"))
    model = load_model(checkpoint, CPU, torch.float32)
    recipe = DistillRecipe(stored_dtype="float32")
    source = Source({}, lambda: nullcontext(model), read_head(checkpoint, CPU, torch.float32))
    outputs = stored(tmp_path / "states", source, BLOCKS, recipe, World())
    said = outputs(IDS, torch.arange(2), BLOCKS.positions)
    assert isinstance(said, States)
    torch.testing.assert_close(said.hidden, states(Headless(model), IDS, BLOCKS.positions))


@pytest.mark.parametrize("stored_too", [False, True])
def test_by_the_command_line(tmp_path: Path, text_file: Path, stored_too: bool) -> None:
    teacher, student = (make_model(tmp_path / name, "llama-tied", seed=seed) for name, seed in (("t", 0), ("s", 1)))
    lines = [line for line in text_file.read_text().splitlines() if line]
    (tmp_path / "texts.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    for kind in ("joined", "apart"):
        (tmp_path / f"{kind}.yaml").write_text(f"distill: {{documents: {kind}}}\nsearch: {{tokens: 64}}\n")
        more = ["--teacher-states", str(tmp_path / f"states-{kind}")] if stored_too else []
        given = ["distill", str(teacher), str(student), str(tmp_path / kind), "--data", str(tmp_path / "texts.jsonl"),
                 "--context", "32", "--tokens", "512", "--recipe", str(tmp_path / f"{kind}.yaml"), *more]  # fmt: skip
        cli.app(given, standalone_mode=False)
    weights = [(tmp_path / kind / "model.safetensors").read_bytes() for kind in ("joined", "apart")]
    assert weights[0] != weights[1]


@pytest.mark.parametrize("variant", ["mamba2", "opt"])
def test_what_cannot_is_refused(tmp_path: Path, variant: str) -> None:
    teacher = make_model(tmp_path / "teacher", variant)
    recipe = Recipe.model_validate({"teacher": str(teacher), "distill": {"documents": "apart"}})
    with pytest.raises(
        UserError, match=f"{variant} runs from one document of a block into the next; accepted: joined, whole"
    ):
        _ = Session(recipe).splits
