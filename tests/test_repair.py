"""Repairs against least squares computed the slow way, and nearer to the teacher for every family."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from minitron.data.blocks import Blocks
from minitron.derivation.proof import random_importance
from minitron.errors import UserError
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint
from minitron.model.config import student_config
from minitron.model.language_model import build_model, load_model
from minitron.pruning.calibrate import calibrate
from minitron.pruning.cut import Cut, cut_to
from minitron.pruning.repair import repaired
from minitron.pruning.rotate import obstacle
from minitron.pruning.scores import Importance, score
from minitron.pruning.writers import correction
from minitron.recipe import CUT_ONLY, CalibrationRecipe, PruneRecipe
from minitron.runtime import Runtime
from tests.conftest import MECHANISMS
from tests.test_trim import cut_everywhere

CPU = torch.device("cpu")
RUNTIME = Runtime(CPU, torch.float32)
REFIT = PruneRecipe(rotate=False, rescale_norms=False, refit=True, ridge=0.0)
RESCALE = PruneRecipe(rotate=False, refit=False)


@pytest.fixture
def blocks() -> Blocks:
    ids = torch.randint(0, 256, (8, 48), generator=torch.Generator().manual_seed(0))
    return Blocks(ids, torch.ones_like(ids, dtype=torch.int32))


def importance_of(teacher: Checkpoint, blocks: Blocks) -> Importance:
    recipe, others = CalibrationRecipe(), blocks[:2] if obstacle(teacher.arch) is None else None
    return score(calibrate(teacher, blocks, recipe=recipe, runtime=RUNTIME, others=others), teacher, recipe)


def made(teacher: Checkpoint, cut: Cut, blocks: Blocks, recipe: PruneRecipe) -> dict[str, Tensor]:
    return dict(repaired(teacher, cut, blocks=blocks, recipe=recipe, runtime=RUNTIME))


def built(teacher: Checkpoint, cut: Cut, tensors: dict[str, Tensor]) -> Any:
    return build_model(student_config(teacher, cut.student, cut.layers), tensors.items(), CPU)


@torch.no_grad()
def inputs_of(module: nn.Module, model: nn.Module, blocks: Blocks) -> Tensor:
    """What goes into a module over all blocks, (tokens, width), in float64."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2).double()))
    for ids in blocks.ids:
        model(input_ids=ids[None])
    handle.remove()
    return torch.cat(seen)


def divergence(teacher: Any, student: Any, blocks: Blocks) -> float:
    """KL from teacher to student, mean over tokens."""
    with torch.no_grad():
        p, q = (
            torch.cat([m(input_ids=x[None]).logits for x in blocks.ids]).log_softmax(-1) for m in (teacher, student)
        )
    return float((p.exp() * (p - q)).sum(-1).mean())


def plain_cut(teacher: Checkpoint, arch: Arch) -> Cut:
    return cut_to(arch, teacher, random_importance(teacher.arch), CUT_ONLY)


def test_the_best_correction_is_that_of_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    x, wanted = (torch.randn(200, n, generator=generator, dtype=torch.float64) for n in (12, 5))
    found = correction(x.T @ x, x.T @ wanted, 0.0, 200)
    torch.testing.assert_close(found.double(), torch.linalg.lstsq(x, wanted).solution.T, rtol=1e-4, atol=1e-5)
    damped = correction(x.T @ x, x.T @ wanted, 100.0, 200)
    assert damped.norm() < 0.5 * found.norm()
    damping = torch.eye(12) * (x.T @ x).diagonal().mean() * 100.0 * 12 / 200
    torch.testing.assert_close(
        damped.double(), torch.linalg.solve(x.T @ x + damping, x.T @ wanted).T, rtol=1e-4, atol=1e-5
    )
    with pytest.raises(UserError, match="NaN"):
        correction(x.T @ x * float("nan"), x.T @ wanted, 0.0, 200)


@torch.no_grad()
def test_each_writer_is_fitted_to_what_the_student_lacks(teachers: Callable[[str], Checkpoint], blocks: Blocks) -> None:
    """The last matrix of a layer: on the student's inputs, to the teacher's stream in front of the next layer kept."""
    teacher = teachers("llama")
    importance = random_importance(teacher.arch)
    importance["layer"] = torch.tensor([4.0, 3.0, 0.0, 2.0])  # the third layer goes
    cut = cut_to(teacher.arch.resized(intermediate_size=40, num_hidden_layers=3), teacher, importance, REFIT)
    tensors = made(teacher, cut, blocks, REFIT)
    whole, student = load_model(teacher, CPU, torch.float32), built(teacher, cut, tensors)
    layer, following = student.model.layers[1], 3
    wanted = inputs_of(whole.model.layers[following].input_layernorm, whole, blocks)
    inputs, before = (
        inputs_of(layer.mlp.down_proj, student, blocks),
        inputs_of(layer.post_attention_layernorm, student, blocks),
    )
    best = torch.linalg.lstsq(inputs, wanted - before).solution.T
    torch.testing.assert_close(layer.mlp.down_proj.weight.double(), best, rtol=2e-2, atol=2e-3)
    plain = teacher.tensor("model.layers.1.mlp.down_proj.weight")[:, cut.kept["ffn"][1]]
    assert not torch.allclose(layer.mlp.down_proj.weight, plain, rtol=2e-2, atol=2e-3)


def test_a_rescaled_norm_puts_out_what_it_did(teachers: Callable[[str], Checkpoint], blocks: Blocks) -> None:
    teacher = teachers("llama")
    cut = plain_cut(teacher, teacher.arch.resized(hidden_size=24))
    model, tensors = load_model(teacher, CPU, torch.float32), made(teacher, cut, blocks, RESCALE)
    for name in ("model.layers.2.post_attention_layernorm", "model.norm"):
        energy = inputs_of(model.get_submodule(name), model, blocks).square()
        share = (energy[:, cut.kept["hidden"]].sum(dim=1) / energy.sum(dim=1)).mean()
        scale = tensors[f"{name}.weight"] / teacher.tensor(f"{name}.weight")[cut.kept["hidden"]]
        torch.testing.assert_close(scale, torch.full_like(scale, float((share * 48 / 24).sqrt())), rtol=1e-4, atol=0)


@pytest.mark.parametrize("teacher", MECHANISMS, indirect=True)
def test_repairs_bring_a_student_nearer_to_its_teacher(teacher: Checkpoint, blocks: Blocks) -> None:
    importance, arch = importance_of(teacher, blocks), cut_everywhere(teacher.arch)
    model, distances = load_model(teacher, CPU, torch.float32), {}
    for name, recipe in {
        "plain": CUT_ONLY,
        "refit": PruneRecipe(rotate=False, refit=True),
        "all": PruneRecipe(refit=True),
    }.items():
        cut = cut_to(arch, teacher, importance, recipe)
        assert (cut.basis is None) == (name != "all" or obstacle(teacher.arch) is not None)
        tensors = made(teacher, cut, blocks, recipe)
        distances[name] = divergence(model, built(teacher, cut, tensors), blocks)
    assert distances["refit"] < 0.95 * distances["plain"]
    assert distances["all"] <= 1.01 * distances["refit"]


@pytest.mark.parametrize("variant", ["mixtral", "qwen3_moe", "gpt_oss", "nemotron_h-latent"])
def test_experts_are_refitted_too(teachers: Callable[[str], Checkpoint], blocks: Blocks, variant: str) -> None:
    teacher = teachers(variant)
    axis = "moe_intermediate_size" if "moe_intermediate_size" in teacher.arch.sizes else "intermediate_size"
    cut = plain_cut(teacher, teacher.arch.resized(**{axis: 16}))
    tensors, plain = made(teacher, cut, blocks, REFIT), dict(cut)
    changed = {name for name in plain if not torch.equal(plain[name], tensors[name])}
    written = {
        name for name in plain if "experts" in name and ("down_proj" in name or "w2" in name) and "bias" not in name
    }
    assert {name for name in changed if "experts" in name} <= written
    assert len(changed & written) > len(written) // 2  # some have no tokens to go by


def test_matrices_are_refitted_only_where_that_is_asked_for(
    teachers: Callable[[str], Checkpoint], blocks: Blocks
) -> None:
    teacher = teachers("llama")
    importance = importance_of(teacher, blocks)
    for sizes in ({"intermediate_size": 40}, {"hidden_size": 36}):
        cut = partial(cut_to, teacher.arch.resized(**sizes), teacher, importance)
        by_default, same, other = (
            made(teacher, cut(recipe), blocks, recipe)
            for recipe in (PruneRecipe(), PruneRecipe(refit=False), PruneRecipe(refit=True))
        )
        assert all(torch.equal(by_default[name], same[name]) for name in same)
        assert any(not torch.equal(by_default[name], other[name]) for name in other)
        plain = dict(cut(PruneRecipe()))
        assert all(torch.equal(by_default[name], plain[name]) for name in plain) == ("hidden_size" not in sizes)


def test_nothing_cut_is_nothing_changed(teachers: Callable[[str], Checkpoint], blocks: Blocks) -> None:
    teacher = teachers("llama-biases")
    cut = plain_cut(teacher, teacher.arch)
    for name, value in made(teacher, cut, blocks, PruneRecipe()).items():
        torch.testing.assert_close(value, teacher.tensor(name), rtol=1e-4, atol=1e-5)


def test_too_few_tokens_for_a_refit(teachers: Callable[[str], Checkpoint], blocks: Blocks) -> None:
    teacher = teachers("llama")
    cut = plain_cut(teacher, teacher.arch.resized(intermediate_size=60))
    with pytest.raises(UserError, match="a refit of 60 inputs needs at least as many calibration tokens; there are 48"):
        made(teacher, cut, blocks[:1], REFIT)
