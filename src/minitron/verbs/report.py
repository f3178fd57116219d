"""Write a page on a run, or one that compares several."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.verbs.results import Result


@dataclass(frozen=True, repr=False)
class Reported(Result):
    """A page that was written."""

    report: Path

    def to_dict(self) -> dict[str, Any]:
        """Return its path."""
        return {"report": str(self.report)}


def report(runs: str | Path | Sequence[str | Path], *, out: str | Path | None = None) -> Reported:
    """Write `report.html` into a run directory, also of a run under way; or a page at `out` that compares several.

    Raises:
        UserError: one of the folders is not a run directory.
    """
    from minitron.reports.html import write_comparison, write_report

    folders = [Path(run).absolute() for run in ([runs] if isinstance(runs, (str, Path)) else runs)]
    if len(folders) == 1 and out is None:
        path = folders[0] / "report.html"
        write_report(folders[0])
    else:
        path = Path(out or "comparison.html").absolute()
        write_comparison(folders, path)
    return Reported(path)
