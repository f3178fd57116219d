"""Importance in rounds."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from minitron.data.blocks import Blocks
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.pruning.calibrate import calibrate
from minitron.pruning.cut import cut_to, write_pruned
from minitron.pruning.rounds import score_in_rounds, shapes_between
from minitron.pruning.scores import Importance, score
from minitron.pruning.selection import select
from minitron.recipe import CUT_ONLY, CalibrationRecipe, Recipe
from minitron.runtime import Runtime
from minitron.session import Session
from tests.conftest import MECHANISMS
from tests.test_trim import cut_everywhere

RUNTIME = Runtime(torch.device("cpu"), torch.float32)
RECIPE = CalibrationRecipe()


def session_of(teacher: Checkpoint, rounds: int) -> Session:
    prune = CUT_ONLY.model_copy(update={"rounds": rounds})
    return Session(Recipe(teacher=str(teacher.folder), device="cpu", dtype="float32", calibration=RECIPE, prune=prune))


def importance_of(teacher: Checkpoint, blocks: Blocks) -> Importance:
    return score(calibrate(teacher, blocks, recipe=RECIPE, runtime=RUNTIME), teacher, RECIPE)


@pytest.mark.parametrize("teacher", MECHANISMS, indirect=True)
def test_each_round_scores_what_the_last_one_left(teacher: Checkpoint, tmp_path: Path) -> None:
    ids = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(0))
    blocks = Blocks(ids, torch.ones_like(ids, dtype=torch.int32))
    once = importance_of(teacher, blocks)
    target = cut_everywhere(teacher.arch)

    def scored(rounds: int) -> dict[str, torch.Tensor]:
        return score_in_rounds(session_of(teacher, rounds), target, once, rounds=rounds, blocks=blocks, folder=tmp_path)

    assert scored(1) is once
    thrice = scored(3)
    assert not list(tmp_path.iterdir())
    final = select(thrice, teacher.arch, target)
    assert {axis: kept.shape[-1] for axis, kept in final.items()} == {
        axis: target.axis_size(axis) for axis in teacher.arch.prunable_axes
    }
    assert all(scores.shape == once[axis].shape for axis, scores in thrice.items())
    gone = int((thrice["layer"] == 0).sum())
    assert 1 <= gone <= teacher.arch.axis_size("layer") - target.axis_size("layer")


@pytest.mark.parametrize("axis", ["intermediate_size", "num_hidden_layers"])
def test_two_rounds_by_hand(tmp_path: Path, axis: str, request: pytest.FixtureRequest) -> None:
    teacher = request.getfixturevalue("teachers")("llama")
    ids = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(0))
    blocks = Blocks(ids, torch.ones_like(ids, dtype=torch.int32))
    once = importance_of(teacher, blocks)
    half, quarter = ({axis: 48}, {axis: 32}) if axis == "intermediate_size" else ({axis: 3}, {axis: 2})
    target = teacher.arch.resized(**quarter)
    twice = score_in_rounds(session_of(teacher, 2), target, once, rounds=2, blocks=blocks, folder=tmp_path)
    cut = cut_to(teacher.arch.resized(**half), teacher, once, CUT_ONLY)
    (tmp_path / "half").mkdir()
    write_pruned(teacher, cut, cut, tmp_path / "half")
    smaller = open_checkpoint(tmp_path / "half")
    again = importance_of(smaller, blocks)
    second = select(again, smaller.arch, target)
    expected = cut.kept["layer"][second["layer"]]
    kept = select(twice, teacher.arch, target)
    assert torch.equal(kept["layer"], expected)
    for layer, number in zip(second["layer"].tolist(), expected.tolist(), strict=True):
        assert torch.equal(kept["ffn"][number], cut.kept["ffn"][number][second["ffn"][layer]])


def test_no_kind_of_layers_is_fewer_between_than_in_the_target(teachers: Callable[[str], Checkpoint]) -> None:
    arch = teachers("nemotron_h").arch  # two layers of each of four kinds
    target = arch.resized(num_attention_layers=1, num_moe_layers=1, hidden_size=40)
    between = shapes_between(arch, target, 4)
    assert len(between) == 3
    for shape in between:
        assert (shape.sizes["num_mamba_layers"], shape.sizes["num_mlp_layers"]) == (2, 2)
        target_fits = all(shape.sizes[name] >= size for name, size in target.sizes.items())
        assert target_fits
