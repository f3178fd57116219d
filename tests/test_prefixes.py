"""Tests that beginnings of a sorted teacher are the models that `prune` makes, without their copies."""

from typing import Any

import pytest
import torch
from torch import Tensor

from minitron.data.blocks import Blocks
from minitron.derivation.proof import random_importance
from minitron.errors import UserError
from minitron.model.anatomy import AXES
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint
from minitron.model.config import student_config
from minitron.model.language_model import build_model
from minitron.nas.sorted_teacher import SortedTeacher, deciding_sizes, sort_teacher
from minitron.pruning.calibrate import calibrate
from minitron.pruning.cut import cut_to
from minitron.pruning.repair import repaired
from minitron.pruning.rotate import obstacle
from minitron.pruning.scores import Importance, score
from minitron.pruning.selection import select
from minitron.recipe import CUT_ONLY, CalibrationRecipe, PruneRecipe
from minitron.runtime import Runtime
from tests.conftest import MECHANISMS, variant_arch, variants_by, variants_that
from tests.test_trim import CPU, CUTS, build, can_cut, logits
from tests.test_trim import cut_to as shape_cut

RUNTIME = Runtime(CPU, torch.float32)


@pytest.fixture(scope="module")
def blocks() -> Blocks:
    ids = torch.randint(0, 256, (4, 40), generator=torch.Generator().manual_seed(3))
    return Blocks(ids, torch.ones_like(ids, dtype=torch.int32))


def cut_everywhere_but_in_hidden(arch: Arch) -> Arch:
    prunable = {AXES[axis] for axis in arch.prunable_axes}
    return arch.resized(**{name: size for name, size in CUTS["all but hidden"].items() if name in prunable})


def sorted_for(
    teacher: Checkpoint, arch: Arch, importance: Importance, recipe: PruneRecipe, blocks: Blocks
) -> SortedTeacher:
    sizes = {name: arch.sizes[name] for name in deciding_sizes(teacher.arch, recipe)}
    return sort_teacher(teacher, importance, sizes, recipe=recipe, blocks=blocks, runtime=RUNTIME)


def can_cut_everywhere_but_in_hidden(arch: Arch) -> bool:
    """Return whether no product ties hidden to heads, and whether three layers are enough for one of each kind."""
    try:
        return bool(cut_everywhere_but_in_hidden(arch))
    except UserError:
        return False


@pytest.mark.parametrize("teacher", variants_that(can_cut_everywhere_but_in_hidden), indirect=True)
def test_a_beginning_of_the_sorted_teacher_is_the_pruned_model(
    teacher: Checkpoint, blocks: Blocks, input_ids: Tensor
) -> None:
    arch = cut_everywhere_but_in_hidden(teacher.arch)
    importance = random_importance(teacher.arch)
    expected = logits(build(teacher, arch, select(importance, teacher.arch, arch)), input_ids)
    found = logits(sorted_for(teacher, arch, importance, CUT_ONLY, blocks).model(arch, RUNTIME), input_ids)
    torch.testing.assert_close(found, expected, atol=5e-4, rtol=1e-4)
    other = random_importance(teacher.arch, seed=1)
    wrong = logits(sorted_for(teacher, arch, other, CUT_ONLY, blocks).model(arch, RUNTIME), input_ids)
    assert (wrong - expected).abs().max() > 1e-3


def repaired_model(teacher: Checkpoint, arch: Arch, importance: Importance, recipe: PruneRecipe, blocks: Blocks) -> Any:
    cut = cut_to(arch, teacher, importance, recipe)
    tensors = dict(repaired(teacher, cut, blocks=blocks, recipe=recipe, runtime=Runtime(CPU, torch.float32)))
    return build_model(student_config(teacher, arch, cut.layers), tensors.items(), CPU)


def narrower(arch: Arch) -> Arch:
    """Return a shape with fewer hidden channels, as the family and its config class allow it."""
    if (product := arch.family.product) is not None:
        return arch.resized(hidden_size=24) if product.ratio else arch.resized(hidden_size=32, num_attention_heads=4)
    return arch.resized(hidden_size=36 if arch.family.demand and not arch._can_be_restated else 40)


@pytest.mark.parametrize(
    ("teacher", "rotate"),
    [(variant, rotate) for variant in MECHANISMS for rotate in (True, False)
     if not rotate or obstacle(variant_arch(variant)) is None],
    indirect=["teacher"],
)  # fmt: skip
def test_hidden_is_rotated_and_its_norms_rescaled_as_in_the_pruned_model(
    teacher: Checkpoint, blocks: Blocks, input_ids: Tensor, rotate: bool
) -> None:
    arch = narrower(teacher.arch)
    recipe = PruneRecipe(rotate=rotate, refit=False)
    runtime, calibration = Runtime(CPU, torch.float32), CalibrationRecipe()
    others = blocks[:1] if rotate else None
    statistics = calibrate(teacher, blocks, recipe=calibration, runtime=runtime, others=others)
    importance = score(statistics, teacher, calibration)
    expected = logits(repaired_model(teacher, arch, importance, recipe, blocks), input_ids)
    found = logits(sorted_for(teacher, arch, importance, recipe, blocks).model(arch, RUNTIME), input_ids)
    torch.testing.assert_close(found, expected, atol=2e-3, rtol=1e-3)
    plain = recipe.model_copy(update={"rescale_norms": False})
    without = logits(repaired_model(teacher, arch, importance, plain, blocks), input_ids)
    assert (found - without).abs().max() > 5e-3


@pytest.mark.parametrize(
    ("teacher", "axis"), variants_by(["ffn", "kv", "expert", "expert_ffn", "layer"], can_cut), indirect=["teacher"]
)
def test_candidates_are_views(teacher: Checkpoint, blocks: Blocks, axis: str) -> None:
    """Tensors that do not join several things in one dimension share the storage of the sorted teacher."""
    arch = shape_cut(teacher.arch, axis)
    whole = sorted_for(teacher, arch, random_importance(teacher.arch), CUT_ONLY, blocks)
    owned = {tensor.untyped_storage().data_ptr() for tensor in whole.tensors.values()}
    for name, value in whole.views(arch):
        place = arch.family.match(name, arch.rows)
        assert place is not None
        is_joined = any(len(dim) > 1 or isinstance(dim[0][0], int) for dim in place.row.dimensions)
        assert value.untyped_storage().data_ptr() in owned or is_joined, name
