"""`minitron families`: the families that have a table, what of each can be pruned, and the table of another one."""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minitron.errors import UserError, nearest
from minitron.files import whole_file
from minitron.model.anatomy import AXES
from minitron.model.families import FAMILIES, family_of
from minitron.model.families.table_files import cached_tables, committed_types, derived_types
from minitron.progress import announce
from minitron.reports.figures import Rows
from minitron.verbs.results import Result


@dataclass(frozen=True, repr=False)
class Families(Result):
    """The families that have a table."""

    origins: dict[str, str]
    """Where each family's table comes from: `written`, `derived`, or `derived here`."""
    axes: dict[str, list[str]]
    """The sizes of each family that can be pruned, by their config names."""

    def rows(self) -> Rows:
        """Return a line for each family."""
        body = [[name, self.origins[name], " ".join(self.axes[name])] for name in sorted(self.origins)]
        return [["model_type", "table", "can be pruned"], *body]

    def to_dict(self) -> dict[str, Any]:
        """Return origins and axes by `model_type`."""
        return {name: {"table": self.origins[name], "axes": self.axes[name]} for name in sorted(self.origins)}


def families(model_type: str | None = None) -> Families:
    """List the families that have a table; with a `model_type`, that one alone, derived if it has no table yet.

    Raises:
        UserError: no table can be derived for the `model_type`; the message states what stands in the way.
    """
    if model_type is not None and model_type not in FAMILIES and model_type not in derived_types():
        derive_table(model_type)
    names = [*FAMILIES, *derived_types()] if model_type is None else [model_type]
    origins = {name: _origin(name) for name in names}
    return Families(origins, {name: _axes(name) for name in names})


def derive_table(model_type: str) -> Path:
    """Derive and prove the table of a `model_type`, and keep it for this machine and version of transformers.

    Raises:
        UserError: none can be derived, or transformers has no such model.
    """
    from minitron.derivation import causal_types, derive

    if model_type not in causal_types():
        raise UserError(
            f"transformers {version('transformers')} has no causal language model '{model_type}'; "
            f"{nearest(model_type, list(FAMILIES))}"
        )
    announce(f"{model_type} has no table yet: deriving and proving one from transformers, which takes some seconds")
    try:
        derived = derive(model_type)
    except UserError as error:
        raise UserError(f"model_type '{model_type}' has no table, and none could be derived: {error}") from error
    file = cached_tables() / f"{model_type}.yaml"
    with whole_file(file) as staging:
        staging.write_text(derived.in_text(), encoding="utf-8")
    announce(f"{model_type} can be pruned along {', '.join(derived.axes)}: {file}")
    return file


def _origin(model_type: str) -> str:
    if model_type in FAMILIES:
        return "written"
    return "derived" if model_type in committed_types() else "derived here"


def _axes(model_type: str) -> list[str]:
    tapped = {axis for tap in family_of(model_type).taps for axis in tap.axes} | {"vocab", "layer"}
    return [AXES[axis] for axis in AXES if axis in tapped]
