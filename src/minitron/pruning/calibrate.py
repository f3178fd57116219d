"""Gathers activation statistics for all width scores and the block influence in one layer-by-layer forward pass.

Statistics are keyed by the module that was read, so that one file serves every way of scoring them.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from math import prod
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from minitron.data.blocks import Blocks
from minitron.errors import UserError
from minitron.model.anatomy import Tap
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint
from minitron.model.experts import Experts
from minitron.progress import Progress
from minitron.pruning.layers import Layer, Layers
from minitron.pruning.scores import needed_quantities, require_width_scores
from minitron.pruning.statistics import (
    BLOCK_INFLUENCE,
    NUM_BLOCKS,
    OVER_TOKENS,
    ROUTED,
    STREAM_MOMENT,
    Quantity,
    Statistics,
    first_linear,
    widened,
)
from minitron.recipe import CalibrationRecipe
from minitron.runtime import Runtime

ENDS = 3.0
"""The weight in the moment of the stream of its two ends, the embeddings and what the final norm reads; that of every
place between them is 1. Everything that a model reads or writes passes there (docs/studies/token-efficiency.md)."""
OTHERS = 1.2
"""The weight in the moment of the stream of a token of other text; that of a token of the calibration text is 1.
Directions that the latter hardly uses, and other texts need, are kept for them (docs/studies/token-efficiency.md)."""


@torch.no_grad()
def calibrate(
    checkpoint: Checkpoint, blocks: Blocks, *, recipe: CalibrationRecipe, runtime: Runtime, others: Blocks | None = None
) -> Statistics:
    """Run blocks through a model and sum statistics of its activations, in float64 on the CPU.

    The statistics are, by key:

    - for each tap, its key, (num_layers, 2, width): the sums over blocks of s and of s², where s is the aggregate of
      `recipe.sequence` over a block's tokens (`statistics.OVER_TOKENS`); zero in layers that lack the module. Another
      aggregate or view of the tap, which only the chosen score needs (`scores.Score`), has a key of its own
      (`statistics.Quantity`);
    - for experts, sums of the states that enter an expert's second matrix, (num_layers, 2, num_experts, width), where
      tokens that do not reach the expert count as zeros; and under the key with `/routed`, (num_layers, num_experts,
      3): sums over an expert's tokens of router weight × norm of its output (REAP, arXiv 2510.13999), of that norm
      alone, and the number of tokens;
    - `block_influence`, (num_layers,): the mean over tokens of `1 − cos(layer input, layer output)`
      (Minitron, arXiv 2407.14679, section 2.2, after ShortGPT);
    - `num_blocks`, (1,);
    - with blocks of other text (`others`), `stream_moment`, (hidden, hidden): the second moment of the stream as norms
      before blocks, the final one included, normalise it and before they multiply by their weights; summed over norms,
      the first and the final one `ENDS` times, and over tokens, those of the other text `OTHERS` times, divided by the
      number of calibration tokens.

    One layer is in memory at a time, and the residual stream of all blocks.

    Raises:
        UserError: the recipe names an unknown score or aggregate, or an activation is NaN or infinite.
    """
    require_width_scores(recipe)
    arch, layers = checkpoint.arch, Layers.of(checkpoint, runtime)
    depth, sums = arch.axis_size("layer"), _Sums(arch, recipe, blocks.num_tokens)
    has_moment, others = others is not None, blocks[:0] if others is None else others
    weights = (1 / blocks.num_tokens, OTHERS / blocks.num_tokens)
    num_tokens = blocks.num_tokens + others.num_tokens
    with Progress("calibrate", depth * num_tokens, "tokens × layers") as progress:
        stream, of_others = layers.embedded(blocks), layers.embedded(others) if has_moment else None
        for number in range(depth):
            layer = layers.load(number)
            progress.note(f"layer {number + 1} of {depth}")
            with sums.reading(layer), sums.reading_stream(layer, weights[0]) if has_moment else nullcontext():
                for i in range(len(blocks)):
                    before = stream[i].to(runtime.device)
                    after = layer(before)
                    sums.add_influence(number, before, after)
                    stream[i] = after
                    progress.advance(blocks.context)
            if of_others is not None:
                with sums.reading_stream(layer, weights[1]):
                    for i in range(len(others)):
                        of_others[i] = layer(of_others[i].to(runtime.device))
                        progress.advance(blocks.context)
    if of_others is not None:
        for part, weight in zip((stream, of_others), weights, strict=True):
            for states in part:
                sums.add_moment(states.to(runtime.device), ENDS * weight)
    statistics = {key: value.double().cpu() for key, value in sums.by_key.items()}
    statistics[NUM_BLOCKS] = torch.tensor([len(blocks)])
    if broken := [key for key, value in statistics.items() if not torch.isfinite(value).all()]:
        _explain(checkpoint, broken[0], runtime)
    return statistics


def _explain(checkpoint: Checkpoint, key: str, runtime: Runtime) -> NoReturn:
    """Say why statistics are not finite: a weight is not, or products of finite weights overflow the dtype."""
    for name in checkpoint.tensors:
        checkpoint.checked_tensor(name)
    accepted = {torch.float16: "bfloat16, float32", torch.float32: "float64"}.get(runtime.dtype, "float32")
    raise UserError(
        f"the teacher's activations at {key} overflow {runtime.dtype_name}, which holds numbers up to "
        f"{torch.finfo(runtime.dtype).max:.3g}, though its weights are finite; accepted for --dtype: {accepted}"
    )


class _Sums:
    """Sums over blocks, kept on the device of the activations, and the hooks that add to them."""

    def __init__(self, arch: Arch, recipe: CalibrationRecipe, num_tokens: int) -> None:
        self.arch, self.recipe, self.num_tokens = arch, recipe, num_tokens
        self.quantities = needed_quantities(arch, recipe)
        self.by_key: Statistics = {}

    def add_influence(self, layer: int, before: Tensor, after: Tensor) -> None:
        """Add to a layer's block influence, of its input and its output (1, T, hidden)."""
        cosine = nn.functional.cosine_similarity(widened(before), widened(after), dim=-1)
        self._add(BLOCK_INFLUENCE, layer, (1 - cosine).double().sum() / self.num_tokens)

    def add_moment(self, stream: Tensor, weight: float) -> None:
        """Add to the second moment of the normalised stream, of the residual stream (1, T, hidden) before a norm.

        `weight` is that of a token.
        """
        normed = _normalised(widened(stream.flatten(0, -2)), self.arch.family.is_centred)
        value = normed.T @ normed * weight
        self.by_key[STREAM_MOMENT] = self.by_key[STREAM_MOMENT].add_(value) if STREAM_MOMENT in self.by_key else value

    @contextmanager
    def reading(self, layer: Layer) -> Iterator[None]:
        """Read every tap of a layer while the block runs."""
        with ExitStack() as hooks:
            for tap, quantities in self._places(layer):
                hooks.callback(self._hook(layer, tap, quantities).remove)
            yield

    @contextmanager
    def reading_stream(self, layer: Layer, weight: float) -> Iterator[None]:
        """Read the stream before the norms of a layer while the block runs; `weight` is that of a token."""
        with ExitStack() as hooks:
            for number, norm in enumerate(self.arch.norms_before_blocks):
                factor = ENDS if layer.number == number == 0 else 1.0
                add = partial(self._add_read, weight=factor * weight)
                hooks.callback(layer.module_of(norm).register_forward_pre_hook(add).remove)
            yield

    def _add_read(self, _: nn.Module, inputs: tuple[Tensor, ...], weight: float) -> None:
        self.add_moment(inputs[0], weight)

    def _places(self, layer: Layer) -> Iterable[tuple[Tap, list[Quantity]]]:
        """Return the taps at which modules of a layer are read, each with the quantities that are read there."""
        places: dict[tuple[str, str], tuple[Tap, list[Quantity]]] = {}
        for quantity in self.quantities:
            tap = quantity.tap
            if tap.kind in {None, self.arch.layer_kind(layer.number)}:
                is_elsewhere = quantity.view == "first_linear" and tap.side != "routed"
                place = first_linear(self.arch, tap) if is_elsewhere else tap
                places.setdefault((place.key, place.side), (place, []))[1].append(quantity)
        return places.values()

    def _hook(self, layer: Layer, tap: Tap, quantities: list[Quantity]) -> RemovableHandle:
        module, number = layer.module(tap.module), layer.number
        if tap.side == "output":
            return module.register_forward_hook(lambda _, __, output: self._add_tap(tap, quantities, number, output))
        if tap.side == "input":
            return module.register_forward_pre_hook(lambda _, inputs: self._add_tap(tap, quantities, number, inputs[0]))
        return module.register_forward_pre_hook(
            lambda module, args, kwargs: self._add_experts(quantities, number, module, *args, *kwargs.values()),
            with_kwargs=True,
        )

    def _add_tap(self, tap: Tap, quantities: list[Quantity], layer: int, activation: Tensor) -> None:
        """Add the sums of an activation (1, T, width), or flattened (T, width)."""
        if tap.stretch is not None:
            width = prod(map(self.arch.axis_size, tap.axes))
            activation = activation.narrow(-1, width * tap.stretch, width)
        tokens = widened(activation.flatten(0, -2))
        for quantity in quantities:
            values = tokens
            if quantity.view == "entry_norms":
                values = tokens.unflatten(-1, (self.arch.axis_size(quantity.tap.axes[0]), -1)).norm(dim=-1)
            self._add(quantity.key(self.recipe), layer, _powers(OVER_TOKENS[quantity.aggregate](values, len(values))))

    def _add_experts(
        self,
        quantities: list[Quantity],
        layer: int,
        module: nn.Module,
        states: Tensor,
        numbers: Tensor,
        weights: Tensor,
    ) -> None:
        """Add the experts' sums, of tokens (T, hidden) with the numbers and router weights (T, k) of their experts."""
        inner: list[list[Tensor]] = [[] for _ in quantities]
        routed, experts = [], Experts(module)
        for expert in range(self.arch.axis_size("expert")):
            token, place = (numbers == expert).nonzero(as_tuple=True)
            activation = experts.inner_states(expert, states[token])
            for quantity, sums in zip(quantities, inner, strict=True):
                is_first = quantity.view == "first_linear"
                values = widened(experts.first_outputs(expert, states[token]) if is_first else activation)
                sums.append(_powers(OVER_TOKENS[quantity.aggregate](values, len(states))))
            norms = widened(experts.outputs(expert, activation)).norm(dim=-1)
            weighted = widened(weights[token, place]) * norms
            routed.append(torch.stack([weighted.sum(), norms.sum(), torch.ones_like(norms).sum()]))
        for quantity, sums in zip(quantities, inner, strict=True):
            self._add(quantity.key(self.recipe), layer, torch.stack(sums, dim=1))
        self._add(f"{quantities[0].tap.key}/{ROUTED}", layer, torch.stack(routed))

    def _add(self, key: str, layer: int, value: Tensor) -> None:
        if key not in self.by_key:
            shape = (self.arch.axis_size("layer"), *value.shape)
            self.by_key[key] = torch.zeros(shape, dtype=torch.float64, device=value.device)
        self.by_key[key][layer] += value


def _powers(value: Tensor) -> Tensor:
    return torch.stack([value, value.square()]).double()


def _normalised(stream: Tensor, is_centred: bool) -> Tensor:
    """Divide each token's channels (…, hidden) by their root mean square, after their mean is taken off if centred."""
    if is_centred:
        stream = stream - stream.mean(dim=-1, keepdim=True)
    return stream * stream.square().mean(dim=-1, keepdim=True).clamp_min(1e-12).rsqrt()
