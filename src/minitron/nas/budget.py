"""What the student may cost: limits on exact counts, on bytes to serve it, and on measured speed."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minitron.errors import UserError
from minitron.model.arch import Arch
from minitron.model.memory import memory
from minitron.recipe import BudgetRecipe, Target, parse_count

COUNTS = {
    "num_parameters": "parameters",
    "num_non_embedding_parameters": "non-embedding parameters",
    "num_active_parameters": "active parameters",
    "memory_bytes": "bytes of memory",
}
"""What is computed from a shape, and what to call it."""
SPEEDS = {"prefill_seconds": "seconds of prefill", "decode_seconds": "seconds a token"}
"""What is measured of a shape."""
BYTES: dict[str, int] = {
    "": 1,
    **{f"{k}b": 1000**n for n, k in enumerate("kmgt", 1)},
    **{f"{k}ib": 1024**n for n, k in enumerate("kmgt", 1)},
}
SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}

Figures = dict[str, Any]
"""Of a shape, or as arrays of many: figures by the names above."""


@dataclass(frozen=True)
class Limit:
    """A figure may be at most `high`; `low` is near enough to that, or, of a range, the least it may be."""

    low: float
    high: float
    is_range: bool = False


@dataclass(frozen=True)
class Serving:
    """The sequences that memory and speed are for."""

    batch: int = 1
    context: int = 4096
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Budget:
    """Limits by the name of the figure.

    A shape fits when it is within every limit and near enough to one of them: the one that binds.
    """

    limits: Mapping[str, Limit]
    serving: Serving = field(default_factory=Serving)

    @property
    def of_counts(self) -> "Budget":
        """Without the limits on speed."""
        limits = {name: limit for name, limit in self.limits.items() if name in COUNTS}
        # Near enough to a speed is not known yet.
        if len(limits) < len(self.limits):
            limits = {name: Limit(limit.low if limit.is_range else 0, limit.high, limit.is_range)
                      for name, limit in limits.items()}  # fmt: skip
        return Budget(limits, self.serving)

    def fits(self, figures: Figures) -> Any:
        """Whether a shape, or which of many, may be chosen."""
        inside: Any = True
        is_near: Any = not self.limits or any(limit.is_range for limit in self.limits.values())
        for name, limit in self.limits.items():
            inside = inside & (figures[name] <= limit.high)
            if limit.is_range:
                inside = inside & (figures[name] >= limit.low)
            is_near = is_near | (figures[name] >= limit.low)
        return inside & is_near

    def excess(self, figures: Figures) -> Any:
        """How far from fitting, 0 for what fits: the logarithm of the worst ratio to a limit."""
        above: Any = 0.0
        below: Any = math.inf if self.limits else 0.0
        for name, limit in self.limits.items():
            logarithm = np.log(np.maximum(np.asarray(figures[name], dtype=float), 1e-30))
            above = np.maximum(above, logarithm - math.log(limit.high))
            short = np.maximum(0.0, math.log(max(limit.low, 1e-30)) - logarithm)
            above, below = (np.maximum(above, short), below) if limit.is_range else (above, np.minimum(below, short))
        return np.maximum(above, np.where(np.isinf(below), 0.0, below))


def counted(teacher: Arch, sizes: Mapping[str, Any], serving: Serving, windows: list[int]) -> Figures:
    """The figures of `COUNTS` of shapes with these sizes, integers or integer arrays that broadcast."""
    return {
        "num_parameters": teacher.count_grid(sizes),
        "num_non_embedding_parameters": teacher.count_grid(sizes, without="vocab"),
        "num_active_parameters": teacher.count_grid(sizes, active=True),
        "memory_bytes": memory(teacher, serving.batch, serving.context, serving.dtype, windows, sizes).total,
    }


def parse_budget(
    target: Target | None, budget: BudgetRecipe, tolerance: float, teacher: Arch, windows: list[int]
) -> Budget:
    """The limits that a recipe sets; without those on speed, see `speed_limits`.

    Raises:
        UserError: there is none, one is not understood, or one is not below the teacher's own figure.
    """
    serving = Serving(budget.batch, budget.context, budget.dtype)
    own = counted(teacher, {}, serving, windows)
    given = {
        "num_parameters": ("target_params", target, parse_count),
        "num_non_embedding_parameters": ("budget.non_embedding_params", budget.non_embedding_params, parse_count),
        "num_active_parameters": ("budget.active_params", budget.active_params, parse_count),
        "memory_bytes": ("budget.memory", budget.memory, parse_bytes),
    }
    limits = {
        name: _limit(option, value, parse, int(own[name]), tolerance)
        for name, (option, value, parse) in given.items()
        if value is not None
    }
    if not limits and budget.throughput is None and budget.latency is None:
        raise UserError(
            "no budget: target_params is not given; accepted: a share of the teacher such as 0.7, a count such as "
            "94M, a range such as 7.8B..8.5B; or budget.memory, budget.throughput, budget.latency"
        )
    return Budget(limits, serving)


def _limit(option: str, value: Target, parse: Callable[[str], int], own: int, tolerance: float) -> Limit:
    low, dots, high = str(value).partition("..")
    ends = [_amount(option, end, parse, own) for end in ([low, high] if dots else [low])]
    if ends[-1] >= own:
        raise UserError(f"{option} {value} is not below the teacher's {own:,}")
    if dots and ends[0] > ends[1]:
        raise UserError(f"{option} {value} is a range that ends before it begins")
    return Limit(ends[0], ends[1], is_range=True) if dots else Limit(round(ends[0] * (1 - tolerance)), ends[0])


def _amount(option: str, text: str, parse: Callable[[str], int], own: int) -> int:
    try:
        if 0 < float(text) <= 1:
            return round(float(text) * own)
    except ValueError:
        pass
    try:
        return parse(text)
    except ValueError as error:
        example = "20GiB or 300MB" if parse is parse_bytes else "94M or 4B"
        raise UserError(
            f"{option} '{text}' is not a number; accepted: a share of the teacher such as 0.7, an amount such as "
            f"{example}, or a range with two dots between its ends"
        ) from error


def parse_bytes(text: str) -> int:
    """`19.66GiB`, `300 MB` or a plain number of bytes.

    Raises:
        ValueError: it is none of these.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*((?:[kmgt]i?b)?)", text.strip().lower())
    if not found or not float(found[1]):
        raise ValueError(f"'{text}' is no size")
    return round(float(found[1]) * BYTES[found[2]])


def speed_limits(budget: BudgetRecipe, tolerance: float, teacher: Mapping[str, float]) -> dict[str, Limit]:
    """Limits on the seconds of prefill and of decoding a token, given the teacher's own.

    Throughput is tokens a second of prefill, over all sequences of the batch; latency is the time of one token of
    decoding. Both may be a multiple of the teacher's: `1.5x`, `0.7x`.

    Raises:
        UserError: one is not understood, or the teacher meets it already.
    """
    limits = {}
    if budget.throughput is not None:
        tokens = budget.batch * budget.context
        own = tokens / teacher["prefill_seconds"]
        wanted = _multiple(
            "budget.throughput", budget.throughput, own, r"(tok(ens)?/s)?", {"": 1.0}, "1.5x or 900 tok/s"
        )
        limits["prefill_seconds"] = _bound("budget.throughput", budget.throughput, tokens / wanted, tolerance,
                                           teacher["prefill_seconds"], f"{own:,.0f} tokens/s")  # fmt: skip
    if budget.latency is not None:
        own = teacher["decode_seconds"]
        wanted = _multiple("budget.latency", budget.latency, own, "us|ms|s", SECONDS, "40ms or 0.7x")
        limits["decode_seconds"] = _bound(
            "budget.latency", budget.latency, wanted, tolerance, own, f"{own * 1e3:.3g} ms"
        )
    return limits


def _multiple(option: str, value: Any, own: float, unit: str, scale: Mapping[str, float], example: str) -> float:
    found = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*(x|{unit})", str(value).strip().lower())
    if not found or not float(found[1]):
        raise UserError(f"{option} '{value}' is not understood; accepted: such as {example}")
    return float(found[1]) * (own if found[2] == "x" else scale.get(found[2], 1.0))


def _bound(option: str, value: Any, seconds: float, tolerance: float, own: float, own_in_words: str) -> Limit:
    if seconds >= own:
        raise UserError(f"{option} {value} is met by the teacher already, which has {own_in_words} here")
    return Limit(seconds * (1 - tolerance), seconds)
