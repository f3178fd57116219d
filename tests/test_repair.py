"""Repairs against least squares and root mean squares computed the slow way."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from minitron.data.blocks import Blocks
from minitron.errors import UserError
from minitron.model.causal import build_model, load_model
from minitron.model.checkpoint import Checkpoint, student_config
from minitron.prune.importance import select
from minitron.prune.repair import best_reader, measure_repairs
from minitron.prune.trim import trimmed
from minitron.recipe import PruneRecipe
from tests.test_trim import cut_everywhere, random_importance

CPU = torch.device("cpu")
EXACT = PruneRecipe(refit=True, ridge=0.0)
BOTH = PruneRecipe(refit=True, rescale_norms=True)


@pytest.fixture
def blocks() -> Blocks:
    ids = torch.randint(0, 256, (6, 48), generator=torch.Generator().manual_seed(0))
    return Blocks(ids, torch.ones_like(ids, dtype=torch.int32))


@torch.no_grad()
def inputs_of(module: nn.Module, model: nn.Module, blocks: Blocks) -> Tensor:
    """What goes into a module over all blocks, (tokens, width), in float64."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2).double()))
    for ids in blocks.ids:
        model(input_ids=ids[None])
    handle.remove()
    return torch.cat(seen)


def test_a_refit_is_the_least_squares_reader(teachers: Callable[[str], Checkpoint], blocks: Blocks) -> None:
    teacher = teachers("llama")
    model, arch = load_model(teacher, CPU, torch.float32), teacher.arch.resized(intermediate_size=24)
    kept = select(random_importance(teacher.arch), teacher.arch, arch)
    repairs = measure_repairs(model, teacher, arch, kept, blocks, EXACT)
    assert len(repairs.refits) == 4
    for layer in range(4):
        name = f"model.layers.{layer}.mlp.down_proj"
        inputs = inputs_of(model.get_submodule(name), model, blocks)
        weight, positions = teacher.tensor(f"{name}.weight").double(), kept["ffn"][layer]
        best = torch.linalg.lstsq(inputs[:, positions], inputs @ weight.T).solution.T
        found = repairs.refits[f"{name}.weight"].fitted.double()
        torch.testing.assert_close(found, best, rtol=1e-2, atol=1e-3)
        plain, whole = weight[:, positions], inputs @ weight.T
        errors = [(whole - inputs[:, positions] @ one.T).square().sum() for one in (found, plain)]
        assert errors[0] < 0.9 * errors[1]


def test_nothing_cut_is_nothing_refitted_and_a_heavy_ridge_reads_less() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, weight = torch.randn(50, 8, generator=generator).double(), torch.randn(3, 8, generator=generator).double()
    moment, everything = inputs.T @ inputs, torch.arange(8)
    torch.testing.assert_close(best_reader(weight, moment, everything, 0.0), weight)
    light, heavy = (best_reader(weight, moment, everything[:5], ridge) for ridge in (0.0, 10.0))
    assert heavy.norm() < 0.5 * light.norm()


def test_a_rescaled_norm_puts_out_what_it_did(teachers: Callable[[str], Checkpoint], blocks: Blocks) -> None:
    teacher = teachers("llama")
    model, arch = load_model(teacher, CPU, torch.float32), teacher.arch.resized(hidden_size=24)
    kept = select(random_importance(teacher.arch), teacher.arch, arch)
    repairs = measure_repairs(model, teacher, arch, kept, blocks, PruneRecipe(rescale_norms=True))
    assert len(repairs.norm_scales) == 9
    assert not repairs.refits
    for name in ("model.layers.2.post_attention_layernorm", "model.norm"):
        stream = inputs_of(model.get_submodule(name), model, blocks)
        share = stream[:, kept["hidden"]].square().sum() / stream.square().sum()
        assert repairs.norm_scales[f"{name}.weight"] == pytest.approx(float((share * 48 / 24).sqrt()), rel=1e-4)


def test_every_family_can_be_mended(teacher: Checkpoint, blocks: Blocks) -> None:
    arch = cut_everywhere(teacher.arch)
    kept = select(random_importance(teacher.arch), teacher.arch, arch)
    model = load_model(teacher, CPU, torch.float32)
    repairs = measure_repairs(model, teacher, arch, kept, blocks, BOTH)
    assert set(repairs.norm_scales) | set(repairs.refits) <= set(teacher.tensors)
    assert repairs.norm_scales
    plain = dict(trimmed(teacher.arch, arch, kept, teacher.tensor))
    mended = dict(trimmed(teacher.arch, arch, kept, lambda name: repairs.mend(name, teacher.tensor(name))))
    changed = {name for name in plain if not torch.equal(plain[name], mended[name])}
    assert len(changed) >= 4
    config = student_config(teacher, arch, kept["layer"].tolist())
    with torch.no_grad():
        output = build_model(config, mended.items(), CPU)(input_ids=blocks.ids[:1]).logits
    assert torch.isfinite(output).all()
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_too_few_tokens_for_a_refit(teachers: Callable[[str], Checkpoint], blocks: Blocks) -> None:
    teacher = teachers("llama")
    arch = teacher.arch.resized(intermediate_size=24)
    kept = select(random_importance(teacher.arch), teacher.arch, arch)
    with pytest.raises(UserError, match="a refit of 64 inputs needs at least as many calibration tokens; there are 48"):
        measure_repairs(load_model(teacher, CPU, torch.float32), teacher, arch, kept, blocks[:1], BOTH)
