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
    Statistics,
    sums_key,
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
        states of experts; zero in layers without the tap.
        """
        key = sums_key(self.tap, sequence or self.recipe.sequence, self.recipe)
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


def activation(readings: Readings) -> Tensor:
    """Score an entry by the L2 norm, over its channels, of the aggregate of their activations.

    By default the aggregate is the batch L2 of the sequence mean (Minitron, arXiv 2407.14679, section 2.2, table 13).
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
    "ffn": {"activation": ACTIVATION, "wanda": Score(wanda, needs=("l2",))},
    "expert": {"reap": Score(reap), "norm": Score(output_norm)},
}
"""The scores of an axis by the values of `calibration.ffn_scores` and `calibration.expert_scores`."""
NEURONS = frozenset({"ffn", "expert_ffn", "shared_ffn"})
"""The axes that are scored as `ffn`: neurons of an MLP, of experts and of shared experts."""


def score_of(axis: str, recipe: CalibrationRecipe) -> Score:
    """Return the score that a recipe chooses for an axis."""
    key = "ffn" if axis in NEURONS else axis
    return SCORES[key][getattr(recipe, f"{key}_scores")] if key in SCORES else ACTIVATION


def needed_aggregates(arch: Arch, recipe: CalibrationRecipe) -> dict[str, list[str]]:
    """Return the aggregates over tokens that the recipe's scores read, by the key of the tap."""
    needed = {tap.key: [recipe.sequence] for tap in arch.taps}
    for tap in arch.taps:
        needed[tap.key] += [name for name in score_of(tap.axes[0], recipe).needs if name not in needed[tap.key]]
    return needed


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
    - ffn, also in experts: one of `SCORES["ffn"]`, at the input of the second MLP matrix;
    - query: `activation` at the input of the output projection;
    - kv: `activation` there, with the channels of all query heads of the group;
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
        axis, readings = tap.axes[0], Readings(checkpoint, recipe, statistics, tap)
        if len(tap.axes) > 1:
            importance[axis] = readings.aggregate().unflatten(-1, [arch.axis_size(axis) for axis in tap.axes])
            importance[tap.axes[1]] = importance[axis].norm(dim=-2)
            continue
        entries = score_of(axis, recipe).function(readings)  # (num_layers, …, size)
        if axis not in arch.family.per_layer_axes:
            entries = entries.sum(dim=0)
        importance[axis] = importance[axis] + entries if axis in importance else entries
    return importance
