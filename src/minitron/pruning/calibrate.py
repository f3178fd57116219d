"""One forward pass over calibration blocks, layer by layer: every width score and the block influence at once.

Statistics are keyed by the module that was read, so that one file serves every way of scoring them.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from math import prod

import torch
from torch import Tensor, nn

from minitron.data.blocks import Blocks
from minitron.errors import UserError
from minitron.model.anatomy import Tap
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint
from minitron.model.experts import run_expert
from minitron.progress import Progress
from minitron.pruning.layers import Layer, Layers
from minitron.recipe import CalibrationRecipe

Statistics = dict[str, Tensor]
BLOCK_INFLUENCE = "block_influence"
NUM_BLOCKS = "num_blocks"
STREAM_MOMENT = "stream_moment"
ROUTED = "routed"


@torch.no_grad()
def calibrate(
    checkpoint: Checkpoint,
    blocks: Blocks,
    recipe: CalibrationRecipe,
    device: torch.device,
    dtype: torch.dtype,
    moment: bool = False,
) -> Statistics:
    """Run the blocks through the teacher and accumulate, in float64 on the CPU:

    - for each tap, under its key, (num_layers, 2, width): the sums over blocks of s and of s², where s is the
      recipe's aggregate over a block's tokens (Minitron, arXiv 2407.14679, section 2.2 and table 13): `mean`,
      mean_t |x_t|; `l2`, √Σ_t x_t²; `var`, mean_t (x_t − x̄)². Zero in layers that lack the module;
    - for experts the same of what enters an expert's second matrix, (num_layers, 2, num_experts, width), where
      tokens that do not reach the expert count as zeros; and under the key with `/routed`, (num_layers,
      num_experts, 3): the sums over an expert's tokens of router weight × norm of its output (REAP, arXiv
      2510.13999) and of that norm alone, and their number;
    - `block_influence`, (num_layers,): the mean over tokens of `1 − cos(layer input, layer output)`
      (Minitron, section 2.2, after ShortGPT);
    - `num_blocks`, (1,);
    - if the `moment` is asked for, `stream_moment`, (hidden, hidden): the second moment of what norms in front of
      blocks, the final one included, make of the stream before they weight it; mean over tokens, summed over norms.

    One layer is in memory at a time, and the stream between two of them.

    Raises:
        UserError: an activation is NaN or infinite.
    """
    arch, layers = checkpoint.arch, Layers.of(checkpoint, device, dtype)
    gathered = _Gathered(arch, recipe, blocks.num_tokens)
    with Progress("calibrate", arch.axis_size("layer") * blocks.num_tokens, "tokens × layers") as progress:
        stream = layers.embedded(blocks)
        for number in range(arch.axis_size("layer")):
            layer = layers.load(number)
            progress.note(f"layer {number + 1} of {arch.axis_size('layer')}")
            with gathered.watching(layer, moment):
                for i in range(len(blocks)):
                    before = stream[i].to(device)
                    after = layer(before)
                    gathered.add_influence(number, before, after)
                    stream[i] = after
                    progress.advance(blocks.context)
    if moment:
        for last in stream:
            gathered.add_moment(last.to(device))
    statistics = {key: value.double().cpu() for key, value in gathered.sums.items()}
    statistics[NUM_BLOCKS] = torch.tensor([len(blocks)])
    for name, value in statistics.items():
        if not torch.isfinite(value).all():
            raise UserError(f"the teacher's activations at {name} hold NaN or infinity: its weights are broken")
    return statistics


class _Gathered:
    """The sums over blocks, on the device that activations are on, and the hooks that add to them."""

    def __init__(self, arch: Arch, recipe: CalibrationRecipe, num_tokens: int) -> None:
        self.arch, self.num_tokens = arch, num_tokens
        self.aggregate = AGGREGATES[recipe.sequence]
        self.sums: Statistics = {}

    def add(self, key: str, layer: int, value: Tensor) -> None:
        if key not in self.sums:
            shape = (self.arch.axis_size("layer"), *value.shape)
            self.sums[key] = torch.zeros(shape, dtype=torch.float64, device=value.device)
        self.sums[key][layer] += value

    def add_influence(self, layer: int, before: Tensor, after: Tensor) -> None:  # (1, T, hidden) each
        cosine = nn.functional.cosine_similarity(_wide(before), _wide(after), dim=-1)
        self.add(BLOCK_INFLUENCE, layer, (1 - cosine).double().sum() / self.num_tokens)

    def add_moment(self, stream: Tensor) -> None:  # (1, T, hidden)
        normed = _normalised(_wide(stream.flatten(0, -2)), self.arch.family.is_centred)
        value = normed.T @ normed / self.num_tokens
        self.sums[STREAM_MOMENT] = self.sums[STREAM_MOMENT].add_(value) if STREAM_MOMENT in self.sums else value

    @contextmanager
    def watching(self, layer: Layer, moment: bool) -> Iterator[None]:
        """Reads every tap of a layer, and the stream in front of its norms."""
        family, kind = self.arch.family, self.arch.layers[layer.number] if self.arch.layers else None
        with ExitStack() as hooks:
            for tap in {tap.key: tap for tap in family.taps if tap.kind in {None, kind}}.values():
                hooks.callback(self._tap(layer, tap).remove)
            for norm in family.norms if moment else ():
                if "{i}" in norm.name and norm.is_in_front(self.arch.flags):
                    handle = layer.stored_module(norm.name).register_forward_pre_hook(
                        lambda _, inputs: self.add_moment(inputs[0])
                    )
                    hooks.callback(handle.remove)
            yield

    def _tap(self, layer: Layer, tap: Tap) -> torch.utils.hooks.RemovableHandle:
        module, number = layer.module(tap.module), layer.number
        if tap.side == "output":
            return module.register_forward_hook(lambda _, __, output: self._read_width(tap, number, output))
        if tap.side == "input":
            return module.register_forward_pre_hook(lambda _, inputs: self._read_width(tap, number, inputs[0]))
        return module.register_forward_pre_hook(
            lambda module, args, kwargs: self._read_experts(tap, number, module, *args, *kwargs.values()),
            with_kwargs=True,
        )

    def _read_width(self, tap: Tap, layer: int, activation: Tensor) -> None:
        if tap.stretch is not None:  # (1, T, width), or (T, width) where a family flattens it
            width = prod(map(self.arch.axis_size, tap.axes))
            activation = activation.narrow(-1, width * tap.stretch, width)
        tokens = _wide(activation.flatten(0, -2))
        self.add(tap.key, layer, _powers(self.aggregate(tokens, len(tokens))))

    def _read_experts(
        self, tap: Tap, layer: int, module: nn.Module, states: Tensor, numbers: Tensor, weights: Tensor
    ) -> None:
        """Of tokens (T, hidden) with the numbers and weights (T, k) of their experts."""
        inner, routed = [], []
        for expert in range(self.arch.axis_size("expert")):
            token, place = (numbers == expert).nonzero(as_tuple=True)
            activation, output = run_expert(module, expert, states[token])
            inner.append(_powers(self.aggregate(_wide(activation), len(states))))
            norms = _wide(output).norm(dim=-1)
            weighted = _wide(weights[token, place]) * norms
            routed.append(torch.stack([weighted.sum(), norms.sum(), torch.ones_like(norms).sum()]))
        self.add(tap.key, layer, torch.stack(inner, dim=1))
        self.add(f"{tap.key}/{ROUTED}", layer, torch.stack(routed))


def _mean(tokens: Tensor, count: int) -> Tensor:
    return tokens.abs().sum(dim=0) / count


def _l2(tokens: Tensor, _: int) -> Tensor:
    return tokens.square().sum(dim=0).sqrt()


def _var(tokens: Tensor, count: int) -> Tensor:
    mean = tokens.sum(dim=0) / count
    return ((tokens - mean).square().sum(dim=0) + (count - len(tokens)) * mean.square()) / count


AGGREGATES: dict[str, Callable[[Tensor, int], Tensor]] = {"mean": _mean, "l2": _l2, "var": _var}
"""Over tokens (n, width) and further ones that are zero, `count` in all."""


def _wide(activation: Tensor) -> Tensor:
    return activation.to(torch.promote_types(activation.dtype, torch.float32))


def _powers(value: Tensor) -> Tensor:
    return torch.stack([value, value.square()]).double()


def _normalised(stream: Tensor, is_centred: bool) -> Tensor:
    """Each token's channels (…, hidden) divided by their root mean square, without their mean if `is_centred`."""
    if is_centred:
        stream = stream - stream.mean(dim=-1, keepdim=True)
    return stream * stream.square().mean(dim=-1, keepdim=True).clamp_min(1e-12).rsqrt()
