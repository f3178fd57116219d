"""Budgets of a student: limits on exact counts, on the bytes that serving takes, and on measured speed."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minitron.errors import UserError
from minitron.model.arch import Arch
from minitron.model.memory import attention_windows, memory
from minitron.quantities import parse_bytes, parse_count
from minitron.recipe import BudgetRecipe, Target
from minitron.session import Session

COUNTS = {
    "num_parameters": "parameters",
    "num_non_embedding_parameters": "non-embedding parameters",
    "num_active_parameters": "active parameters",
    "memory_bytes": "bytes of memory",
}
"""Figures that are computed from a shape, with their names in messages."""
SPEEDS = {"prefill_seconds": "seconds of prefill", "decode_seconds": "seconds a token"}
"""Figures that are measured, with their names in messages."""
SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}

Figures = Mapping[str, Any]
"""Values by the names of `COUNTS` and `SPEEDS`: numbers for one shape, arrays (n,) for many."""


@dataclass(frozen=True)
class Limit:
    """The largest value of a figure, and the value from which on the budget counts as used up.

    Of a range, `low` is the smallest value that is allowed.
    """

    low: float
    high: float
    is_range: bool = False


@dataclass(frozen=True)
class Serving:
    """The sequences that memory and speed are computed and measured for."""

    batch: int = 1
    context: int = 4096
    dtype: str = "bfloat16"


@dataclass(frozen=True)
class Budget:
    """Limits by the name of the figure.

    A shape fits when it is within every limit and reaches the `low` of at least one of them, the one that binds.
    """

    limits: Mapping[str, Limit]
    serving: Serving = field(default_factory=Serving)
    larger: Arch | None = None
    """A shape of which those within the budget must be beginnings, with no more of anything."""

    def fits(self, figures: Figures) -> Any:
        """Return whether a shape fits the budget, or a boolean for each of many shapes."""
        is_inside: Any = True
        is_near: Any = not self.limits or any(limit.is_range for limit in self.limits.values())
        for name, limit in self.limits.items():
            is_inside = is_inside & (figures[name] <= limit.high)
            if limit.is_range:
                is_inside = is_inside & (figures[name] >= limit.low)
            is_near = is_near | (figures[name] >= limit.low)
        return is_inside & is_near

    def excess(self, figures: Figures) -> Any:
        """Return how far shapes are from fitting: the logarithm of the worst ratio to a limit, 0 for what fits."""
        above: Any = 0.0
        below: Any = math.inf if self.limits else 0.0
        for name, limit in self.limits.items():
            logarithm = np.log(np.maximum(np.asarray(figures[name], dtype=float), 1e-30))
            above = np.maximum(above, logarithm - math.log(limit.high))
            short = np.maximum(0.0, math.log(max(limit.low, 1e-30)) - logarithm)
            if limit.is_range:
                above = np.maximum(above, short)
            else:
                below = np.minimum(below, short)
        return np.maximum(above, np.where(np.isinf(below), 0.0, below))


def budget_of(session: Session, target: Target | None) -> Budget:
    """Return the budget of a session's recipe with `target` for all parameters; limits on speed are left out.

    Raises:
        UserError: see `parse_budget`; or speed is limited for more tokens than the teacher was made for.
    """
    recipe, teacher = session.recipe, session.teacher
    longest = getattr(teacher.config, "max_position_embeddings", None) or recipe.budget.context
    if has_speed_limits(session) and recipe.budget.context > longest:
        raise UserError(
            f"budget.context {recipe.budget.context} is above the {longest} tokens that the teacher was made for"
        )
    windows = attention_windows(teacher.config.to_dict())
    return parse_budget(target, recipe.budget, recipe.search.tolerance, teacher.arch, windows)


def has_speed_limits(session: Session) -> bool:
    """Return whether the session's recipe asks for a throughput or a latency."""
    return session.recipe.budget.throughput is not None or session.recipe.budget.latency is not None


def counted(teacher: Arch, sizes: Mapping[str, Any], serving: Serving, windows: list[int]) -> Figures:
    """Compute the figures of `COUNTS` for shapes with these sizes, integers or integer arrays that broadcast."""
    return {
        "num_parameters": teacher.count_grid(sizes),
        "num_non_embedding_parameters": teacher.count_grid(sizes, without="vocab"),
        "num_active_parameters": teacher.count_grid(sizes, active=True),
        "memory_bytes": memory(teacher, serving.batch, serving.context, serving.dtype, windows, sizes).total,
    }


def parse_budget(
    target: Target | None, budget: BudgetRecipe, tolerance: float, teacher: Arch, windows: list[int]
) -> Budget:
    """Read the limits on counts and bytes from a recipe; `speed_limits` reads those on speed.

    Raises:
        UserError: the recipe has no limit, one is not understood, or one is not below the teacher's own figure.
    """
    serving = Serving(budget.batch, budget.context, budget.dtype)
    of_teacher = counted(teacher, {}, serving, windows)
    options: dict[str, tuple[str, Target | None, Callable[[str], int]]] = {
        "num_parameters": ("target_params", target, parse_count),
        "num_non_embedding_parameters": ("budget.non_embedding_params", budget.non_embedding_params, parse_count),
        "num_active_parameters": ("budget.active_params", budget.active_params, parse_count),
        "memory_bytes": ("budget.memory", budget.memory, parse_bytes),
    }
    limits = {
        name: _limit(option, value, parse, int(of_teacher[name]), tolerance)
        for name, (option, value, parse) in options.items()
        if value is not None
    }
    for option, value, read in (("throughput", budget.throughput, _rate), ("latency", budget.latency, _latency)):
        if value is not None:
            read(f"budget.{option} {value}", 1.0)
    if not limits and budget.throughput is None and budget.latency is None:
        raise UserError(
            "no budget: target_params is not given; accepted: a share of the teacher such as 0.7, a count such as "
            "94M, a range such as 7.8B..8.5B; or budget.memory, budget.throughput, budget.latency"
        )
    return Budget(limits, serving)


def _limit(option: str, value: Target, parse: Callable[[str], int], of_teacher: int, tolerance: float) -> Limit:
    low, dots, high = str(value).partition("..")
    ends = [_amount(option, end, parse, of_teacher) for end in ([low, high] if dots else [low])]
    if ends[-1] >= of_teacher:
        raise UserError(f"{option} {value} is not below the teacher's {of_teacher:,}")
    if dots and ends[0] > ends[1]:
        raise UserError(f"{option} {value} is a range that ends before it begins")
    return Limit(ends[0], ends[1], is_range=True) if dots else Limit(round(ends[0] * (1 - tolerance)), ends[0])


def _amount(option: str, text: str, parse: Callable[[str], int], of_teacher: int) -> int:
    try:
        if 0 < float(text) <= 1:
            return round(float(text) * of_teacher)
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


def speed_limits(budget: BudgetRecipe, tolerance: float, teacher: Mapping[str, float]) -> dict[str, Limit]:
    """Return the limits on the seconds of a prefill and of decoding a token, given the teacher's seconds.

    Throughput counts the tokens per second of a prefill, over all sequences of the batch; latency is the time of
    decoding one token. Both may be a multiple of the teacher's, such as `1.5x` or `0.7x`.

    Raises:
        UserError: a limit is not understood, or the teacher meets it already.
    """
    limits = {}
    prefill, decode = teacher["prefill_seconds"], teacher["decode_seconds"]
    if budget.throughput is not None:
        option, tokens = f"budget.throughput {budget.throughput}", budget.batch * budget.context
        rate = _rate(option, tokens / prefill)
        _require_below(option, tokens / rate, prefill, f"{tokens / prefill:,.0f} tokens/s")
        limits["prefill_seconds"] = Limit(tokens / rate * (1 - tolerance), tokens / rate)
    if budget.latency is not None:
        option = f"budget.latency {budget.latency}"
        seconds = _latency(option, decode)
        _require_below(option, seconds, decode, f"{decode * 1e3:.3g} ms")
        limits["decode_seconds"] = Limit(seconds * (1 - tolerance), seconds)
    return limits


def _rate(option: str, of_teacher: float) -> float:
    return _multiple(option, of_teacher, r"(tok(ens)?/s)?", {"": 1.0}, "1.5x or 900 tok/s")


def _latency(option: str, of_teacher: float) -> float:
    return _multiple(option, of_teacher, "us|ms|s", SECONDS, "40ms or 0.7x")


def _multiple(option: str, of_teacher: float, unit: str, scale: Mapping[str, float], example: str) -> float:
    name, _, value = option.partition(" ")
    match = re.fullmatch(rf"(\d+(?:\.\d+)?)\s*(x|{unit})", value.strip().lower())
    if not match or not float(match[1]):
        raise UserError(f"{name} '{value}' is not understood; accepted: such as {example}")
    return float(match[1]) * (of_teacher if match[2] == "x" else scale.get(match[2], 1.0))


def _require_below(option: str, seconds: float, of_teacher: float, in_words: str) -> None:
    if seconds >= of_teacher:
        raise UserError(f"{option} is met by the teacher already, which has {in_words} here")
