"""Whether the order that a table claims holds in the rows at hand."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.papers.runner import Row
from benchmarks.papers.tables import Claim, Figure

TIE = 0.01
"""Nats per token by which the losses of two arms may differ that are equal: the papers print two decimals."""
ERRORS = 2.0
"""Standard errors that a difference has to be from zero to count."""


@dataclass(frozen=True)
class Verdict:
    """A claim, and what the rows say about it."""

    claim: Claim
    differences: tuple[float, ...]
    """Loss of the worse arm minus that of the better one, by seed."""
    noise: float
    """Standard deviation of such a difference from seed to seed, over all claims of this figure."""

    @property
    def mean(self) -> float:
        """The mean difference."""
        return sum(self.differences) / len(self.differences)

    @property
    def error(self) -> float:
        """The standard error of the mean difference."""
        return self.noise / math.sqrt(len(self.differences))

    @property
    def in_words(self) -> str:
        """`holds`, `does not hold` or `not beyond noise`; `not measured` without rows of both arms."""
        if not self.differences:
            return "not measured"
        is_beyond = abs(self.mean) > ERRORS * self.error and len({value > 0 for value in self.differences}) == 1
        if self.claim.equal:
            if abs(self.mean) <= TIE and self.error <= TIE:
                return "holds"
            return "does not hold" if is_beyond and abs(self.mean) > TIE else "not beyond noise"
        if not is_beyond:
            return "not beyond noise"
        return "holds" if self.mean > 0 else "does not hold"


def figure_of(row: Row, figure: Figure) -> float | None:
    """Return a figure of a row, or None if the arm was not trained."""
    stage, name = ("before", "loss") if figure == "before" else ("after", "kl" if figure == "kl after" else "loss")
    return row[stage][name] if stage in row else None


def differences(claim: Claim, rows: Sequence[Row]) -> tuple[float, ...]:
    """Return the differences of a claim, by seed, of the seeds that both arms have."""
    found = []
    for seed in sorted({row["seed"] for row in rows}):
        pair = [
            figure_of(row, claim.figure)
            for arm in (claim.better, claim.worse)
            for row in rows
            if row["arm"] == arm and row["seed"] == seed
        ]
        if len(pair) == 2 and pair[0] is not None and pair[1] is not None:
            found.append(pair[1] - pair[0])
    return tuple(found)


def noise_of(claims: Sequence[Claim], rows: Sequence[Row]) -> float:
    """Return the standard deviation of differences from seed to seed, pooled over claims; NaN with a single seed."""
    squares, freedom = 0.0, 0
    for claim in claims:
        values = differences(claim, rows)
        if len(values) > 1:
            mean = sum(values) / len(values)
            squares += sum((value - mean) ** 2 for value in values)
            freedom += len(values) - 1
    return math.sqrt(squares / freedom) if freedom else math.nan


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Return Spearman's rank correlation of values without ties."""
    ranks: list[list[int]] = [[sorted(values).index(value) for value in values] for values in (first, second)]
    count = len(first)
    distance: int = sum((a - b) * (a - b) for a, b in zip(*ranks, strict=True))
    return 1.0 - 6 * distance / (count * (count**2 - 1))
