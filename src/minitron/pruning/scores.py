"""Turns calibration statistics into importance: one score per entry of every axis, higher for entries to keep.

A score is a function of what calibration read at a tap (`Readings`). To add one, write the function and give it a name
in `SCORES`; recipes accept the name from then on.
"""

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from minitron.errors import UserError
from minitron.model.anatomy import Row, Tap
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint
from minitron.model.families import FAMILIES
from minitron.pruning.statistics import (
    BLOCK_INFLUENCE,
    NUM_BLOCKS,
    OVER_BLOCKS,
    OVER_TOKENS,
    ROUTED,
    STREAM_MOMENT,
    Quantity,
    Statistics,
    View,
    widened,
)
from minitron.recipe import CalibrationRecipe

Importance = dict[str, Tensor]
"""Scores by axis, (size,), preceded by (num_layers,) where each layer keeps entries of its own and by (num_experts,)
where each expert does; of Mamba heads (num_layers, size, channels). `stream_moment` (hidden, hidden) and `layer_blocks`
(see `depth.score_depth`) are stored with the scores where they were measured."""


@dataclass(frozen=True)
class Readings:
    """What calibration read at one tap in all layers, and the model's weights: the argument of a score."""

    checkpoint: Checkpoint
    recipe: CalibrationRecipe
    statistics: Statistics
    tap: Tap
    view: View = "channels"
    """The view of the tap that `aggregate` returns: that of the score."""

    @property
    def arch(self) -> Arch:
        """The shape of the model."""
        return self.checkpoint.arch

    @property
    def num_entries(self) -> int:
        """The number of entries of the axis that the tap scores."""
        return self.arch.axis_size(self.tap.axes[0])

    def aggregate(self, sequence: str | None = None, batch: str | None = None) -> Tensor:
        """Aggregate the activations of each channel over tokens and blocks, in float64.

        `sequence` and `batch` name aggregates of `OVER_TOKENS` and `OVER_BLOCKS`, by default the recipe's. A `sequence`
        must be listed in `Score.needs`. Returns (num_layers, width), or (num_layers, num_experts, width) for the inner
        states of experts, where width is the number of entries if these are seen by their norms; zero in layers without
        the tap.
        """
        key = Quantity(self.tap, sequence or self.recipe.sequence, self.view).key(self.recipe)
        first, second = self.statistics[key].unbind(dim=1)
        return OVER_BLOCKS[batch or self.recipe.batch](first, second, int(self.statistics[NUM_BLOCKS]))

    def routed(self) -> Tensor:
        """Return (num_layers, num_experts, 3): Σ router weight × output norm, Σ output norm, and the number of tokens.

        The sums run over the tokens that reach the expert.
        """
        return self.statistics[f"{self.tap.key}/{ROUTED}"]

    def matrices(self) -> Iterator[tuple[int, Tensor]]:
        """Yield, for each layer that has the tap, its number and the matrix that multiplies the activation.

        The matrix is (outputs, width), or (num_experts, outputs, width), in float32 or wider.
        """
        row, dim = self._matrix()
        for layer in self.arch.layer_numbers(self.tap.kind):
            experts = range(self.arch.axis_size("expert")) if row.is_per_expert else [None]
            values = [self.checkpoint.tensor(row.tensor_name(layer, expert)).movedim(dim, -1) for expert in experts]
            yield layer, widened(torch.stack(values) if row.is_per_expert else values[0])

    def _matrix(self) -> tuple[Row, int]:
        """Return the row of the matrix that multiplies the activation, and the dimension of its inputs."""
        inner = self.arch.family.per_expert_axes
        if self.tap.side == "routed":
            row = self.arch.expert_writer
            assert row is not None, self.tap.module
            return row, next(i for i, dim in enumerate(row.dimensions) if inner & {f for part in dim for f in part})
        row = next(filter(self.tap.reads_input_of, self.arch.rows))
        return row, next(i for i, dim in enumerate(row.dimensions) if dim != (("hidden",),))


@dataclass(frozen=True)
class Score:
    """A way to score the entries of an axis."""

    function: Callable[[Readings], Tensor]
    """Returns (num_layers, size), or (num_layers, num_experts, size) where each expert has entries of its own."""
    needs: tuple[str, ...] = ()
    """The aggregates of `OVER_TOKENS` that it reads in addition to the recipe's."""
    view: View = "channels"
    """What it looks at, at the tap of its axis."""


def activation(readings: Readings) -> Tensor:
    """Score an entry by the L2 norm, over its channels, of the aggregate of their activations.

    By default the aggregate is the batch L2 of the sequence mean (Minitron, arXiv 2407.14679, section 2.2, table 13).
    An entry that is seen as one channel, such as a neuron, has the aggregate itself.
    """
    entries: Tensor = readings.aggregate().unflatten(-1, (readings.num_entries, -1))
    scores: Tensor = entries.norm(dim=-1)
    return scores


def wanda(readings: Readings) -> Tensor:
    """Score neuron j by Σ_i |W_ij| · ‖x_j‖₂, W the second MLP matrix and x_j the neuron over all calibration tokens.

    |W_ij| · ‖x_j‖₂ is the score of a single weight in Wanda (Sun et al., arXiv 2306.11695, section 3); here it is
    summed over the weights that leave with the neuron.
    """
    scores = readings.aggregate("l2", "l2")  # (num_layers, …, width)
    for layer, matrix in readings.matrices():
        scores[layer] *= matrix.abs().sum(dim=-2, dtype=torch.float64)
    return scores


def reap(readings: Readings) -> Tensor:
    """Score an expert by the mean over its tokens of router weight × norm of its output (REAP, arXiv 2510.13999)."""
    weighted, _, count = readings.routed().unbind(dim=-1)
    return weighted / count.clamp_min(1)


def output_norm(readings: Readings) -> Tensor:
    """Score an expert by the mean over its tokens of the norm of its output, as Model-Optimizer does."""
    _, norms, count = readings.routed().unbind(dim=-1)
    return norms / count.clamp_min(1)


ACTIVATION = Score(activation)
"""The score of every axis that has no table in `SCORES`."""
SCORES: dict[str, dict[str, Score]] = {
    "ffn": {
        # As Model-Optimizer (mcore_minitron) does.
        "input_of_second": ACTIVATION,
        # Σ X·W1ᵀ (Minitron, arXiv 2407.14679, section 2.2).
        "first_linear": Score(activation, view="first_linear"),
        "wanda": Score(wanda, needs=("l2",)),
    },
    "head": {
        # As Model-Optimizer does.
        "norm_of_aggregates": ACTIVATION,
        # Σ ‖Attn(X·W_Q, X·W_K, X·W_V)‖₂ (Minitron, arXiv 2407.14679, section 2.2).
        "aggregate_of_norms": Score(activation, view="entry_norms"),
    },
    "expert": {"reap": Score(reap), "norm": Score(output_norm)},
}
"""The scores of axes by the values of `calibration.ffn_scores`, `head_scores` and `expert_scores`."""
SCORED_AS = {"expert_ffn": "ffn", "shared_ffn": "ffn", "query": "head", "kv": "head"}
"""The key in `SCORES` of axes that have another name: neurons of experts and of shared experts, and heads."""


def score_of(axis: str, recipe: CalibrationRecipe) -> Score:
    """Return the score that a recipe chooses for an axis."""
    key = SCORED_AS.get(axis, axis)
    return SCORES[key][getattr(recipe, f"{key}_scores")] if key in SCORES else ACTIVATION


def needed_quantities(arch: Arch, recipe: CalibrationRecipe) -> list[Quantity]:
    """Return what calibration has to sum up: the channels of every tap, and whatever else the recipe's scores read."""
    needed = [Quantity(tap, recipe.sequence) for tap in arch.taps]
    for tap in arch.taps:
        chosen = score_of(tap.axes[0], recipe)
        needed += [Quantity(tap, aggregate, chosen.view) for aggregate in (recipe.sequence, *chosen.needs)]
    return list({quantity.key(recipe): quantity for quantity in needed}.values())


def require_width_scores(recipe: CalibrationRecipe) -> None:
    """Check that every score of width and every aggregate that a recipe names exists.

    Raises:
        UserError: one does not; the message lists those that do.
    """
    taps = {tap.choice: None for family in FAMILIES.values() for tap in family.taps if tap.choice}
    accepted: dict[str, Collection[str | None]] = {"batch": OVER_BLOCKS, "sequence": OVER_TOKENS, "mamba_scores": taps}
    accepted |= {f"{axis}_scores": scores for axis, scores in SCORES.items()}
    for key, names in accepted.items():
        if (name := getattr(recipe, key)) not in names:
            raise UserError(f"calibration.{key}: unknown value '{name}'; accepted: {', '.join(map(str, names))}")


def score(statistics: Statistics, checkpoint: Checkpoint, recipe: CalibrationRecipe) -> Importance:
    """Score every prunable axis of a model from its calibration statistics.

    - hidden: `activation` of the norms' outputs, summed over layers and norms;
    - ffn, also in experts: one of `SCORES["ffn"]`, at the input of the second MLP matrix or the output of the first;
    - query: one of `SCORES["head"]`, at the input of the output projection;
    - kv: that score there, with the channels of all query heads of the group;
    - expert: one of `SCORES["expert"]`;
    - Mamba channels: the L2 norm of the aggregate over heads. Mamba heads have the aggregate of each channel, since a
      head is scored on the channels that are kept (Minitron-SSM, arXiv 2504.11409, section 3). `recipe.mamba_scores`
      chooses between `x`, `z` and the input of the output projection (`out_proj`);
    - layer: block influence.
    """
    arch = checkpoint.arch
    importance: Importance = {"layer": statistics[BLOCK_INFLUENCE].clone()}
    if STREAM_MOMENT in statistics:
        importance[STREAM_MOMENT] = statistics[STREAM_MOMENT]
    for tap in arch.taps:
        if tap.choice not in {None, recipe.mamba_scores} or tap.key not in statistics:
            continue
        axis, chosen = tap.axes[0], score_of(tap.axes[0], recipe)
        readings = Readings(checkpoint, recipe, statistics, tap, chosen.view)
        if len(tap.axes) > 1:
            importance[axis] = readings.aggregate().unflatten(-1, [arch.axis_size(axis) for axis in tap.axes])
            importance[tap.axes[1]] = importance[axis].norm(dim=-2)
            continue
        entries = chosen.function(readings)  # (num_layers, …, size)
        if axis not in arch.family.per_layer_axes:
            entries = entries.sum(dim=0)
        importance[axis] = importance[axis] + entries if axis in importance else entries
    return importance
