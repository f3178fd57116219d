"""The published methods of pruning, as settings."""

from typing import Any

from minitron.errors import UserError

_CUT_ONCE: dict[str, Any] = {
    "calibration.batch": "l2",
    "calibration.sequence": "mean",
    "calibration.mamba_scores": "x",
    "depth.score": "block_influence",
    "depth.removal": "one_shot",
    "depth.ranking": "together",
    "prune.rotate": False,
    "prune.rescale_norms": False,
    "prune.refit": False,
    "prune.rounds": 1,
}
BASELINES: dict[str, dict[str, Any]] = {
    "papers": _CUT_ONCE
    | {
        "calibration.ffn_scores": "first_linear",
        "calibration.head_scores": "aggregate_of_norms",
        "prune.merge_heads": True,
    },
    "modelopt": _CUT_ONCE
    | {
        "calibration.ffn_scores": "input_of_second",
        "calibration.head_scores": "norm_of_aggregates",
        "calibration.expert_scores": "norm",
        "prune.merge_heads": False,
    },
}
"""Published methods of pruning by name, as settings by dotted key: `papers` is that of Minitron (arXiv 2407.14679,
sections 2.2 and 2.3; Mamba heads as in arXiv 2504.11409, section 3), `modelopt` that of NVIDIA's Model-Optimizer. The
papers do not score experts. Neither rotates or repairs."""


def baseline(name: str) -> dict[str, Any]:
    """Return the settings of a published method, by dotted key.

    Raises:
        UserError: the name is not one of `BASELINES`.
    """
    if name not in BASELINES:
        raise UserError(f"--plain: unknown value '{name}'; accepted: {', '.join(BASELINES)}")
    return dict(BASELINES[name])
