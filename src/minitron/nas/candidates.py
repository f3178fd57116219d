"""The candidates of a search: shapes with what each costs and how far each is from the teacher."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron.files import read_jsonl
from minitron.model.arch import Arch
from minitron.nas.budget import COUNTS, SPEEDS, Figures


@dataclass
class Candidate:
    """A shape that a search considers: one line of `candidates.jsonl`, number `number` counted from 0.

    Losses are KL divergences from the teacher, in nats per token.
    """

    number: int
    arch: Arch
    counts: Mapping[str, int]
    """The figures of `COUNTS`."""
    predicted_kl: float
    zero_shot_kl: float | None = None
    """The loss of the untrained candidate; None where no more candidates than places for trials were compared."""
    distilled_kl: dict[int, float] = field(default_factory=dict)
    """The losses after a trial, by the tokens that the candidate was distilled on."""
    prefill_seconds: float | None = None
    decode_seconds: float | None = None
    chosen: bool = False

    @property
    def loss(self) -> float:
        """The loss as it is best known: after the most tokens of a trial, or untrained, or as predicted."""
        if self.distilled_kl:
            return self.distilled_kl[max(self.distilled_kl)]
        return self.predicted_kl if self.zero_shot_kl is None else self.zero_shot_kl

    @property
    def speeds(self) -> dict[str, float | None]:
        """The figures of `SPEEDS`; None before they are measured."""
        return {name: getattr(self, name) for name in SPEEDS}

    @property
    def figures(self) -> Figures:
        """Everything that a budget may limit."""
        return {**self.counts, **self.speeds}

    def to_dict(self) -> dict[str, Any]:
        """Return the line of `candidates.jsonl`."""
        return {
            "arch": self.arch.to_dict(),
            **self.counts,
            "predicted_kl": self.predicted_kl,
            "zero_shot_kl": self.zero_shot_kl,
            "distilled_kl": {str(tokens): kl for tokens, kl in self.distilled_kl.items()},
            **self.speeds,
            "chosen": self.chosen,
        }

    @classmethod
    def from_dict(cls, number: int, row: Mapping[str, Any], teacher: Arch) -> "Candidate":
        """Return the candidate that `to_dict` described, a shape of the teacher."""
        return cls(
            number,
            Arch.from_dict(row["arch"], teacher),
            {name: row[name] for name in COUNTS},
            row["predicted_kl"],
            zero_shot_kl=row["zero_shot_kl"],
            distilled_kl={int(tokens): kl for tokens, kl in row["distilled_kl"].items()},
            **{name: row[name] for name in SPEEDS},
            chosen=row["chosen"],
        )


def read_candidates(path: Path, teacher: Arch) -> list[Candidate]:
    """Read the candidates of a `candidates.jsonl`, shapes of the teacher."""
    return [Candidate.from_dict(number, row, teacher) for number, row in enumerate(read_jsonl(path))]
