"""One forward pass over calibration blocks: every width score and the block influence at once.

Statistics are keyed by the module that was read, so that one file serves every way of scoring them.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from minitron.data.blocks import Blocks
from minitron.errors import UserError
from minitron.model.anatomy import Tap
from minitron.model.arch import Arch
from minitron.progress import Progress

BLOCK_INFLUENCE = "block_influence"


@torch.no_grad()
def calibrate(model: nn.Module, arch: Arch, blocks: Blocks) -> dict[str, Tensor]:
    """Run the blocks through the model and accumulate, in float64 on the CPU:

    - for each tap, under its module's name, (num_layers, width): the sum over blocks of the squared sequence
      mean of absolute activations, `Σ_b (mean_t |x_tbc|)²`, so that its root is the (batch L2, sequence mean)
      aggregate of Minitron, arXiv 2407.14679, section 2.2 and table 13;
    - `block_influence`, (num_layers,): the mean over tokens of `1 − cos(layer input, layer output)`
      (the same paper, section 2.2, after ShortGPT).

    Raises:
        UserError: an activation is NaN or infinite.
    """
    statistics: dict[str, Tensor] = {BLOCK_INFLUENCE: torch.zeros(arch.axis_size("layer"), dtype=torch.float64)}
    device = next(model.parameters()).device

    def watch_width(name: str, layer: int) -> Callable[[Tensor], None]:
        def record(activation: Tensor) -> None:  # (B, T, width), or (B T, width) where a family flattens it
            activation = activation.reshape(-1, blocks.context, activation.shape[-1])
            aggregate = activation.float().abs().mean(dim=1).square().sum(dim=0).double().cpu()  # (width,)
            if name not in statistics:
                statistics[name] = torch.zeros(arch.axis_size("layer"), len(aggregate), dtype=torch.float64)
            statistics[name][layer] += aggregate

        return record

    def record_influence(layer: int, before: Tensor, after: Tensor) -> None:  # (B, T, hidden) each
        cosine = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
        statistics[BLOCK_INFLUENCE][layer] += (1 - cosine).double().sum().cpu() / blocks.num_tokens

    base: Any = model.base_model
    with ExitStack() as hooks, Progress("calibrate", blocks.num_tokens) as progress:
        for layer in range(arch.axis_size("layer")):
            for tap in arch.family.taps:
                hooks.enter_context(_tapped(model, tap, layer, watch_width(tap.module, layer)))
            hooks.enter_context(_layer_watched(model, arch, layer, record_influence))
        for ids in blocks.ids.split(1):
            base(input_ids=ids.to(device), use_cache=False)
            progress.advance(ids.numel())
    for name, value in statistics.items():
        if not torch.isfinite(value).all():
            raise UserError(f"the teacher's activations at {name} hold NaN or infinity: its weights are broken")
    return statistics


@contextmanager
def _tapped(model: nn.Module, tap: Tap, layer: int, record: Callable[[Tensor], None]) -> Iterator[None]:
    module = model.get_submodule(tap.module.replace("{i}", str(layer)))
    if tap.side == "input":
        handle = module.register_forward_pre_hook(lambda _, inputs: record(inputs[0]))
    else:
        handle = module.register_forward_hook(lambda _, __, output: record(output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _layer_watched(
    model: nn.Module, arch: Arch, layer: int, record: Callable[[int, Tensor, Tensor], None]
) -> Iterator[None]:
    module = model.get_submodule(arch.family.layer.replace("{i}", str(layer)))

    def hook(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        before = args[0] if args else kwargs["hidden_states"]
        record(layer, before, output[0] if isinstance(output, tuple) else output)

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
