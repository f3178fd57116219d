"""What verbs return: small dataclasses that print as tables, also in a notebook, and turn into JSON."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from minitron.model.arch import Arch
from minitron.reports.figures import Rows, figures_table
from minitron.reports.page import note, table


class Result(ABC):
    """The base of all results."""

    def rows(self) -> Rows:
        """Return the result as a table of a name and a value per line."""
        return [["", ""], *([key, _in_words(value)] for key, value in self.to_dict().items())]

    def tables(self) -> list[tuple[Rows, str, str]]:
        """Return the result as tables, each with a caption and a line below it, as the terminal prints them."""
        return [(self.rows(), "", "")]

    @property
    def failure(self) -> str | None:
        """What the command line adds to a result that is not as asked for, before it exits with status 1."""
        return None

    @abstractmethod
    def to_dict(self) -> dict[str, Any]:
        """Return the result for JSON, as `--json` prints it."""

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        head, *body = rows = self.rows()
        if not any(head):
            return "\n".join(f"{name:>28}  {value}" for name, value in body)
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows)

    def _repr_html_(self) -> str:
        page = ""
        for rows, caption, footer in self.tables():
            page += table(rows) + "".join(note(text) for text in (caption, footer) if text)
        return page


@dataclass(frozen=True, repr=False)
class Compressed(Result):
    """A finished run directory."""

    out: Path
    student: Path
    """The folder of the student, a stock Hugging Face checkpoint."""
    arch: Arch
    figures: dict[str, dict[str, Any]]
    """What `eval.json` holds: parameters, perplexity, bits per byte and speed of teacher, pruned model and student, and
    the KL of the latter two to the teacher."""

    def rows(self) -> Rows:
        """Return the figures, one column per model."""
        return figures_table(self.figures)

    def tables(self) -> list[tuple[Rows, str, str]]:
        """Return the figures, with what they were measured on and where the student is."""
        return [(self.rows(), _conditions(self.figures["student"]), f"student: {self.student}")]

    def to_dict(self) -> dict[str, Any]:
        """Return the folder and the figures."""
        return {"out": str(self.out), **self.figures}


@dataclass(frozen=True, repr=False)
class CompressedSeries(Result):
    """Finished run directories, one per target or stage, in the order in which they were made."""

    out: Path
    members: dict[str, Compressed]
    corrected: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Figures of the teacher before and after correction, by the names of stages that corrected it."""

    def rows(self) -> Rows:
        """Return the students' figures, one column per student."""
        return figures_table({name: member.figures["student"] for name, member in self.members.items()})

    def tables(self) -> list[tuple[Rows, str, str]]:
        """Return a table for every stage, with its name in the caption."""
        corrections = [
            (figures_table(figures), f"{name}: {_conditions(figures['corrected'])}", "")
            for name, figures in self.corrected.items()
        ]
        return corrections + [
            (rows, f"{name}: {caption}", footer)
            for name, member in self.members.items()
            for rows, caption, footer in member.tables()
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return the folder and the figures of every stage."""
        members = {name: member.figures for name, member in self.members.items()}
        return {"out": str(self.out), "members": members, **({"corrected": self.corrected} if self.corrected else {})}


@dataclass(frozen=True, repr=False)
class Calibrated(Result):
    """Statistics and scores of a teacher, in the folder `out`."""

    out: Path
    importance: dict[str, list[int]]
    """The shape of the scores of every axis."""

    def to_dict(self) -> dict[str, Any]:
        """Return the folder and the shapes."""
        return {"out": str(self.out), "importance": self.importance}


@dataclass(frozen=True, repr=False)
class Shaped(Result):
    """A model folder, or a shape that was found, at `out`."""

    out: Path
    arch: Arch
    random_seed: int | None = None
    """The seed of weights that are random instead of a teacher's."""

    @property
    def student(self) -> Path:
        """The folder."""
        return self.out

    def to_dict(self) -> dict[str, Any]:
        """Return the folder, the sizes, and the exact parameter count that follows from them."""
        seed = {} if self.random_seed is None else {"random_seed": self.random_seed}
        return {"out": str(self.out), "num_parameters": self.arch.num_parameters, "arch": self.arch.to_dict(), **seed}


@dataclass(frozen=True, repr=False)
class Measured(Result):
    """Figures of one model or several, with the conditions under which they were measured."""

    figures: dict[str, Any]
    table: Rows = field(default_factory=list)
    caption: str = ""

    def rows(self) -> Rows:
        """Return the figures as a table."""
        return self.table or super().rows()

    def tables(self) -> list[tuple[Rows, str, str]]:
        """Return the table with its caption."""
        return [(self.rows(), self.caption, "")]

    def to_dict(self) -> dict[str, Any]:
        """Return the figures."""
        return self.figures


def _conditions(figures: dict[str, Any]) -> str:
    return f"{figures['num_tokens']:,} held-out tokens, context {figures['context']}"


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return " · ".join(f"{key} {part}" for key, part in value.items())
    return f"{value:,}" if type(value) is int else str(value)
