"""The statistics that calibration gathers: their keys, and the aggregates over tokens and over blocks.

An activation x is reduced twice. A block's tokens become one number s per channel (`OVER_TOKENS`); calibration sums s
and s² over blocks, and these sums become one number per channel of the whole text (`OVER_BLOCKS`).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from minitron.model.anatomy import Tap
from minitron.model.arch import Arch
from minitron.recipe import CalibrationRecipe

Statistics = dict[str, Tensor]
"""Sums over the calibration blocks, by key; `calibrate.calibrate` lists them."""
BLOCK_INFLUENCE = "block_influence"
NUM_BLOCKS = "num_blocks"
STREAM_MOMENT = "stream_moment"
ROUTED = "routed"


View = Literal["channels", "entry_norms", "first_linear"]
"""How calibration looks at a tap: at every channel; at each token's L2 norm over the channels of every entry (a head);
or, at the input of an MLP's second matrix, at the output of its first one instead (`first_linear`)."""


@dataclass(frozen=True)
class Quantity:
    """Something that calibration sums up: a tap's activation in one view, aggregated over tokens in one way."""

    tap: Tap
    aggregate: str
    view: View = "channels"

    def key(self, recipe: CalibrationRecipe) -> str:
        """Return the key of its sums; all channels under the recipe's own aggregate have the tap's key."""
        key = self.tap.key if self.view == "channels" else f"{self.tap.key}/{self.tap.axes[0]}/{self.view}"
        return key if self.aggregate == recipe.sequence else f"{key}/{self.aggregate}"


def first_linear(arch: Arch, tap: Tap) -> Tap:
    """Return the tap at the output of the first matrix of the MLP whose second matrix reads `tap`.

    In every table it is the first matrix along the axis: W1 of δ(X·W1ᵀ)·W2 as Minitron writes an MLP (arXiv
    2407.14679, section 2.1), so in gated MLPs the gate, whose output δ is applied to.
    """
    row = next(row for row in arch.rows if row.kind == tap.kind and tap.axes[0] in row.axes)
    stretch = None if row.dimensions[0] == (tap.axes,) or row.dimensions[-1] == (tap.axes,) else 0
    return Tap(tap.axes, f"{tap.module.partition('.')[0]}.{row.module}", "output", stretch, tap.kind)


def widened(activation: Tensor) -> Tensor:
    """Return an activation in float32, or in its own dtype if that is wider."""
    return activation.to(torch.promote_types(activation.dtype, torch.float32))


def _mean_of_tokens(tokens: Tensor, count: int) -> Tensor:
    return tokens.abs().sum(dim=0) / count


def _l2_of_tokens(tokens: Tensor, _: int) -> Tensor:
    return tokens.square().sum(dim=0).sqrt()


def _var_of_tokens(tokens: Tensor, count: int) -> Tensor:
    mean = tokens.sum(dim=0) / count
    return ((tokens - mean).square().sum(dim=0) + (count - len(tokens)) * mean.square()) / count


OVER_TOKENS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "mean": _mean_of_tokens,
    "l2": _l2_of_tokens,
    "var": _var_of_tokens,
}
"""Aggregates over the tokens of a block, by the values of `calibration.sequence`: mean_t |x_t|, √Σ_t x_t² or
mean_t (x_t − x̄)² (Minitron, arXiv 2407.14679, section 2.2 and table 13).

Each takes tokens (n, width) and their number `count`, which is larger than n where the tokens left out are zero (those
that do not reach an expert)."""


def _mean_of_blocks(first: Tensor, _: Tensor, num_blocks: int) -> Tensor:
    return first / num_blocks


def _l2_of_blocks(_: Tensor, second: Tensor, __: int) -> Tensor:
    return second.sqrt()


def _var_of_blocks(first: Tensor, second: Tensor, num_blocks: int) -> Tensor:
    return (second / num_blocks - (first / num_blocks).square()).clamp_min(0)


OVER_BLOCKS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {
    "l2": _l2_of_blocks,
    "mean": _mean_of_blocks,
    "var": _var_of_blocks,
}
"""Aggregates over blocks of the s of each block, by the values of `calibration.batch`: √Σ s², the mean or the variance
of s. Each takes Σ s, Σ s² and the number of blocks."""
