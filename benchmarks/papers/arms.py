"""The arms that the papers' tables compare: what is cut, how it is trained, and with which settings of a recipe.

Sizes are shares of the teacher's, so that every teacher has every arm. The papers cut Nemotron-4 15B to 8B by 2/3 along
each width, or by half in depth, and to 4B by half in hidden and heads and 3/8 in MLPs.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from benchmarks.papers.teachers import Text

Place = int | float
"""A layer: an integer counts from the end (−1 is the last), a share names the last layer of that part (0.5: the one
that ends the first half)."""


@dataclass(frozen=True)
class Step:
    """A cut and the training after it."""

    shares: Mapping[str, float] = field(default_factory=dict)
    """What is left of sizes, by their config names, as shares of the teacher's."""
    tokens: float = 1.0
    """Tokens of training, in units; 0 trains nothing."""
    loss: Literal["distil", "text"] = "distil"
    """What trains: the teacher's outputs, or the text alone, as in conventional training."""


@dataclass(frozen=True)
class Arm:
    """One way of making a student."""

    steps: tuple[Step, ...]
    """Each step cuts the student of the step before; the teacher of all is the teacher."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Keys of the recipe, laid over those of `runner.BASE`."""
    random: bool = False
    """Start from random weights in the shape of the first step."""
    layers: tuple[tuple[Place, Place], ...] = ()
    """Pairs of a teacher's and a student's layer whose outputs are compared."""
    text: Text = "wiki"
    """The text of calibration, training and evaluation."""
    correction: Literal["no", "teaches", "is pruned and teaches"] = "no"
    """Whether the teacher is trained on the text before it teaches, and whether it is also the model that is cut."""


def one(shares: Mapping[str, float], *, tokens: float = 1.0, loss: Literal["distil", "text"] = "distil") -> tuple[Step]:
    """Return the steps of an arm with a single cut."""
    return (Step(shares, tokens, loss),)


HIDDEN, FFN, HEADS, DEPTH = "hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers"
WIDTH = {HIDDEN: 2 / 3, FFN: 2 / 3, HEADS: 2 / 3}
ALL_AXES = {HIDDEN: 3 / 4, FFN: 2 / 3, HEADS: 2 / 3, DEPTH: 5 / 6}
MLP_AND_HEADS = {FFN: 7 / 24, HEADS: 2 / 3}
HALF_DEPTH = {DEPTH: 1 / 2}
SMALL = {HIDDEN: 1 / 2, FFN: 3 / 8, HEADS: 2 / 3}
EMBEDDING = {HIDDEN: 2 / 3}

PERPLEXITY = {"depth": {"score": "perplexity"}}
BOTH = ("embedding", "block_output")


def _losses(of: tuple[str, ...], pair: tuple[Place, Place], shares: Mapping[str, float] = HALF_DEPTH) -> Arm:
    return Arm(one(shares), {"distill": {"intermediate": {"of": of}}}, layers=(pair,))


def _loss(name: str, shares: Mapping[str, float] = WIDTH, label_weight: float = 0.0) -> Arm:
    return Arm(one(shares), {"distill": {"loss": name, "label_weight": label_weight}})


def _aggregation(batch: str, sequence: str) -> Arm:
    tokens = 1.0 if batch == sequence else 0.0  # the papers' table is of untrained models
    return Arm(one(WIDTH, tokens=tokens), {"calibration": {"batch": batch, "sequence": sequence}})


STRATEGIES = {
    "width": Arm(one(WIDTH)),
    "all axes": Arm(one(ALL_AXES)),
    "MLP and heads": Arm(one(MLP_AND_HEADS)),
    "depth": Arm(one(HALF_DEPTH)),
    "depth by perplexity": Arm(one(HALF_DEPTH), PERPLEXITY),
    "random": Arm(one(WIDTH), random=True),
}
"""Tables 1 and 10: which axes are cut. `depth` ranks layers by block influence."""

AGGREGATES = ("l2", "mean", "var")
AGGREGATIONS = {
    f"batch {batch}, sequence {sequence}": _aggregation(batch, sequence)
    for batch in AGGREGATES
    for sequence in AGGREGATES
    if (batch, sequence) != ("l2", "mean")  # this is the arm `width`
}
"""Table 13: how activations become scores."""

ROUNDS = {
    f"embedding in {rounds} round{'s' * (rounds > 1)}": Arm(one(EMBEDDING), {"prune": {"rounds": rounds}})
    for rounds in (1, 2, 4)
}
"""Table 14: importance measured again while the model shrinks."""

LOSSES = {
    "label and MSE": _loss("probability_mse", label_weight=1.0),
    "label and reverse KL": _loss("reverse_kl", label_weight=1.0),
    "label and cosine": _loss("probability_cosine", label_weight=1.0),
    "label and KL": _loss("forward_kl", label_weight=1.0),
    "text alone": Arm(one(WIDTH, loss="text")),
    "depth, reverse KL": _loss("reverse_kl", HALF_DEPTH),
}
"""Tables 15 and 16: what the student learns from."""

INTERMEDIATE = {
    "output 29:13": _losses(("block_output",), (-3, -3)),
    "output 15:15, embedding": _losses(BOTH, (0.5, -1)),
    "output 29:15, embedding": _losses(BOTH, (-3, -1)),
    "output 31:15, embedding": _losses(BOTH, (-1, -1)),
    "output 28:12, embedding": _losses(BOTH, (-4, -4)),
    "output 29:13, embedding": _losses(BOTH, (-3, -3)),
    "output 29:13, embedding, MLP input": _losses((*BOTH, "mlp_input"), (-3, -3)),
    "width, intermediate": _losses(BOTH, (-3, -3), WIDTH),
}
"""Tables 17 and 18: losses inside the layers. Names are those of the papers' 32 and 16 layers, counted from 0."""

LAYER_BY_LAYER = 6
SCHEDULES = {
    "one shot": Arm(one(HALF_DEPTH, tokens=2.0)),
    "layer by layer": Arm(
        tuple(Step({DEPTH: 1 - step / (2 * LAYER_BY_LAYER)}, 2.0 / LAYER_BY_LAYER) for step in range(1, 7))
    ),
}
"""Figure 7: half of the layers at once, or a part at a time with a training after each, at equal tokens in all."""

CANDIDATES = {
    f"candidate {number}": Arm(one(shares))
    for number, shares in enumerate(
        (
            {HIDDEN: 5 / 6, FFN: 5 / 12, HEADS: 2 / 3},
            {HIDDEN: 7 / 12, FFN: 5 / 6, HEADS: 2 / 3},
            {HIDDEN: 3 / 4, FFN: 7 / 12, HEADS: 2 / 3, DEPTH: 11 / 12},
            {HIDDEN: 2 / 3, FFN: 1, HEADS: 2 / 3, DEPTH: 3 / 4},
        ),
        start=3,
    )
}
"""Figure 9: shapes of about equal size; further candidates are the arms of table 1."""

SMALL_MODELS = {
    "small, random, text": Arm(one(SMALL, tokens=1.5, loss="text"), random=True),
    "small, text": Arm(one(SMALL, tokens=1.5, loss="text")),
    "small, direct": Arm(one(SMALL)),
    "small, staged": Arm((Step(WIDTH), Step(SMALL))),
    "small, direct, tokens of both stages": Arm(one(SMALL, tokens=2.0)),
}
"""Table 11: ways to a model of about a quarter of the teacher's size."""

CORRECTIONS = {
    "teacher as it is": Arm(one(WIDTH), text="docstrings"),
    "corrected teacher": Arm(one(WIDTH), text="docstrings", correction="teaches"),
    "corrected, then pruned": Arm(one(WIDTH), text="docstrings", correction="is pruned and teaches"),
    "corrected while teaching": Arm(
        one(WIDTH),
        {"distill": {"correction": {"trains": "full", "original": {"learning_rate": 2e-3}}}},
        text="docstrings",
    ),
}
"""Teacher correction: the text is one that the teacher has not seen."""

REMOVALS = {
    "contiguous by block influence": Arm(one(HALF_DEPTH), {"depth": {"removal": "contiguous"}}),
    "contiguous by perplexity": Arm(one(HALF_DEPTH), {"depth": {"score": "perplexity", "removal": "contiguous"}}),
    "iterative by logits": Arm(one(HALF_DEPTH), {"depth": {"score": "logits_mse", "removal": "iterative"}}),
}
"""Contiguous against scattered layers, compared with `depth` and `depth by perplexity`."""

MAMBA = {
    "Mamba heads": Arm(one({"mamba_num_heads": 1 / 2})),
    "Mamba channels": Arm(one({"mamba_head_dim": 1 / 2})),
    "fewer Mamba heads": Arm(one({"mamba_num_heads": 3 / 4})),
    "fewer Mamba channels": Arm(one({"mamba_head_dim": 3 / 4})),
}
"""Mamba heads against channels, of equal numbers of parameters but for B, C and dt."""

CURVES = {
    "pruned, distilled, 0.5 units": Arm(one(WIDTH, tokens=0.5)),
    "pruned, distilled, 2 units": Arm(one(WIDTH, tokens=2.0)),
    "random, text, 1 unit": Arm(one(WIDTH, loss="text"), random=True),
    "random, text, 2 units": Arm(one(WIDTH, tokens=2.0, loss="text"), random=True),
    "random, text, 4 units": Arm(one(WIDTH, tokens=4.0, loss="text"), random=True),
}
"""Figure 1: quality against training tokens, each point a training of its own; one unit is the arm `width`."""

ARMS = {
    **STRATEGIES, **AGGREGATIONS, **ROUNDS, **LOSSES, **INTERMEDIATE, **SCHEDULES, **CANDIDATES, **SMALL_MODELS,
    **CORRECTIONS, **REMOVALS, **MAMBA, **CURVES,
}  # fmt: skip
"""All arms by name; several tables share some of them."""
