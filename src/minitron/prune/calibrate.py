"""One forward pass over calibration blocks: every width score and the block influence at once.

Statistics are keyed by the module that was read, so that one file serves every way of scoring them.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from minitron.data.blocks import Blocks
from minitron.errors import UserError
from minitron.model.anatomy import Tap
from minitron.model.arch import Arch
from minitron.model.experts import run_expert
from minitron.progress import Progress

BLOCK_INFLUENCE = "block_influence"
ROUTED_NORM = "routed_norm"


@torch.no_grad()
def calibrate(model: nn.Module, arch: Arch, blocks: Blocks) -> dict[str, Tensor]:
    """Run the blocks through the model and accumulate, in float64 on the CPU:

    - for each tap, under its key, (num_layers, width): the sum over blocks of the squared sequence mean of
      absolute activations, `Σ_b (mean_t |x_tbc|)²`, so that its root is the (batch L2, sequence mean) aggregate
      of Minitron, arXiv 2407.14679, section 2.2 and table 13; zero in layers that lack the module;
    - for experts the same of what enters an expert's second matrix, (num_layers, num_experts, width), where
      tokens that do not reach the expert count as zeros; and under the key with `/routed_norm`,
      (num_layers, num_experts, 2): the sum over an expert's tokens of router weight × norm of its output, and
      their number (REAP, arXiv 2510.13999);
    - `block_influence`, (num_layers,): the mean over tokens of `1 − cos(layer input, layer output)`
      (Minitron, section 2.2, after ShortGPT).

    Raises:
        UserError: an activation is NaN or infinite.
    """
    statistics: dict[str, Tensor] = {BLOCK_INFLUENCE: torch.zeros(arch.axis_size("layer"), dtype=torch.float64)}
    device = next(model.parameters()).device

    def add(key: str, layer: int, value: Tensor) -> None:
        if key not in statistics:
            statistics[key] = torch.zeros(arch.axis_size("layer"), *value.shape, dtype=torch.float64)
        statistics[key][layer] += value.double().cpu()

    def read(tap: Tap, layer: int) -> Callable[..., None]:
        def read_width(activation: Tensor) -> None:  # (1, T, width), or (T, width) where a family flattens it
            if tap.stretch is not None:
                width = prod(map(arch.axis_size, tap.axes))
                activation = activation.narrow(-1, width * tap.stretch, width)
            add(tap.key, layer, activation.flatten(0, -2).float().abs().mean(dim=0).square())

        def read_experts(module: nn.Module, states: Tensor, numbers: Tensor, weights: Tensor) -> None:
            inner, norms = _routed(module, states, numbers, weights, arch.axis_size("expert"))
            add(tap.key, layer, (inner / len(states)).square())
            add(f"{tap.key}/{ROUTED_NORM}", layer, norms)

        return read_experts if tap.side == "routed" else read_width

    def record_influence(layer: int, before: Tensor, after: Tensor) -> None:  # (1, T, hidden) each
        cosine = nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
        statistics[BLOCK_INFLUENCE][layer] += (1 - cosine).double().sum().cpu() / blocks.num_tokens

    base: Any = model.base_model
    with ExitStack() as hooks, Progress("calibrate", blocks.num_tokens) as progress:
        for tap in {
            tap.key: tap for tap in arch.family.taps if tap.kind is None or tap.kind in arch.layer_counts
        }.values():
            for layer in arch.layer_numbers(tap.kind):
                hooks.enter_context(_tapped(model, tap, layer, read(tap, layer)))
        for layer in range(arch.axis_size("layer")):
            hooks.enter_context(_layer_watched(model, arch, layer, record_influence))
        for ids in blocks.ids.split(1):  # one block a pass: what is read below is one sequence
            base(input_ids=ids.to(device), use_cache=False)
            progress.advance(ids.numel())
    for name, value in statistics.items():
        if not torch.isfinite(value).all():
            raise UserError(f"the teacher's activations at {name} hold NaN or infinity: its weights are broken")
    return statistics


def _routed(
    module: nn.Module, states: Tensor, numbers: Tensor, weights: Tensor, num_experts: int
) -> tuple[Tensor, Tensor]:
    """Over tokens (T, hidden) with the numbers and weights (T, k) of their experts, for every expert: the sums of
    the absolute inputs of its second matrix (num_experts, width), and (num_experts, 2) as `calibrate` says."""
    inner, norms = [], []
    for expert in range(num_experts):
        token, place = (numbers == expert).nonzero(as_tuple=True)
        activation, output = run_expert(module, expert, states[token])
        inner.append(activation.float().abs().sum(dim=0))
        weighted = weights[token, place].float() * output.float().norm(dim=-1)
        norms.append(torch.stack([weighted.sum(), torch.tensor(float(len(token)), device=weighted.device)]))
    return torch.stack(inner), torch.stack(norms)


@contextmanager
def _tapped(model: nn.Module, tap: Tap, layer: int, record: Callable[..., None]) -> Iterator[None]:
    module = model.get_submodule(tap.module.replace("{i}", str(layer)))
    if tap.side == "output":
        handle = module.register_forward_hook(lambda _, __, output: record(output))
    elif tap.side == "input":
        handle = module.register_forward_pre_hook(lambda _, inputs: record(inputs[0]))
    else:
        handle = module.register_forward_pre_hook(
            lambda module, args, kwargs: record(module, *args, *kwargs.values()), with_kwargs=True
        )
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
