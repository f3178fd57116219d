"""Statistics against the formulas, computed the slow way from the activations of single blocks."""

import pytest
import torch
from torch import Tensor

from minitron.data.blocks import Blocks
from minitron.errors import UserError
from minitron.model.causal import load_model
from minitron.model.checkpoint import Checkpoint
from minitron.prune.calibrate import calibrate
from minitron.prune.importance import score

CPU = torch.device("cpu")


@pytest.fixture
def blocks() -> Blocks:
    ids = torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(0))
    return Blocks(ids, torch.ones_like(ids, dtype=torch.int32))


@torch.no_grad()
def test_one_pass_gives_every_score(teacher: Checkpoint, blocks: Blocks) -> None:
    model = load_model(teacher, CPU, torch.float32)
    importance = score(calibrate(model, teacher.arch, blocks), teacher.arch)
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str, output: bool = False) -> None:
        module = model.get_submodule(name)
        if output:
            module.register_forward_hook(lambda _, __, out: seen.setdefault(name, []).append(out.flatten(0, -2)))
        else:
            module.register_forward_pre_hook(
                lambda _, inputs: seen.setdefault(name, []).append(inputs[0].flatten(0, -2))
            )

    taps = {tap.module: tap for tap in teacher.arch.family.taps}
    for i in range(4):
        for name, tap in taps.items():
            keep(name.replace("{i}", str(i)), output=tap.side == "output")
    residuals = [model(input_ids=ids[None], output_hidden_states=True).hidden_states for ids in blocks.ids]

    def aggregate(axis: str, layer: int) -> Tensor:
        """Batch L2 of the sequence mean of absolute values, summed over the taps of an axis."""
        names = [name.replace("{i}", str(layer)) for name, tap in taps.items() if tap.axis == axis]
        return torch.stack(
            [torch.stack([x.abs().mean(dim=0) for x in seen[name]]).square().sum(dim=0).sqrt() for name in names]
        ).sum(dim=0)

    hidden = torch.stack([aggregate("hidden", i) for i in range(4)]).sum(dim=0)
    torch.testing.assert_close(importance["hidden"], hidden.double(), rtol=1e-4, atol=1e-5)
    for i in range(4):
        torch.testing.assert_close(importance["ffn"][i], aggregate("ffn", i).double(), rtol=1e-4, atol=1e-5)
        if "query" not in importance:
            continue
        query = aggregate("query", i).view(6, 8).norm(dim=1)
        torch.testing.assert_close(importance["query"][i], query.double(), rtol=1e-4, atol=1e-5)
        if "kv" not in importance:
            continue
        torch.testing.assert_close(importance["kv"][i], query.view(3, 2).norm(dim=1).double(), rtol=1e-4, atol=1e-5)
    for i in range(3):  # the last hidden state is normalised, so the last layer's output is not among them
        cosines = [torch.nn.functional.cosine_similarity(h[i][0], h[i + 1][0], dim=-1).mean() for h in residuals]
        influence = 1 - torch.stack(cosines).mean()
        torch.testing.assert_close(importance["layer"][i], influence.double(), rtol=1e-3, atol=1e-5)


def test_hooks_are_gone_afterwards(teacher: Checkpoint, blocks: Blocks) -> None:
    model = load_model(teacher, CPU, torch.float32)
    calibrate(model, teacher.arch, blocks)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_broken_activations_are_an_error(teacher: Checkpoint, blocks: Blocks) -> None:
    model = load_model(teacher, CPU, torch.float32)
    with torch.no_grad():
        tap = next(tap for tap in teacher.arch.family.taps if tap.axis == "ffn")
        model.get_submodule(tap.module.replace("{i}", "1")).weight[0, 0] = float("nan")
    with pytest.raises(UserError, match="hold NaN or infinity"):
        calibrate(model, teacher.arch, blocks)


def test_scores_do_not_depend_on_the_order_of_blocks_but_on_the_blocks(teacher: Checkpoint, blocks: Blocks) -> None:
    model = load_model(teacher, CPU, torch.float32)
    one = calibrate(model, teacher.arch, blocks)
    turned = calibrate(model, teacher.arch, Blocks(blocks.ids.flip(0), blocks.num_bytes))
    fewer = calibrate(model, teacher.arch, blocks[:2])
    for name in one:
        torch.testing.assert_close(one[name], turned[name], rtol=1e-9, atol=1e-12)
        assert not torch.allclose(one[name], fewer[name], rtol=1e-3, atol=0)
