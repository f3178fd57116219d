"""Upload a student to the Hugging Face Hub."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.verbs.results import Result


@dataclass(frozen=True, repr=False)
class Pushed(Result):
    """A commit on the hub."""

    commit: str

    def to_dict(self) -> dict[str, Any]:
        """Return the address of the commit."""
        return {"commit": self.commit}


def push(run: str | Path, repo: str, *, private: bool = False) -> Pushed:
    """Upload the student of a run directory, or a model folder, with its card, to `owner/name` on the hub.

    Raises:
        UserError: the folder holds no model, or the hub refuses it.
    """
    from minitron.reports import hub

    return Pushed(str(hub.push(Path(run), repo, private=private)))
