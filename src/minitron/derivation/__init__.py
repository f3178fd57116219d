"""Derives the table of a family from transformers, without weights and without a person, and proves it before use."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version

from minitron.derivation.drafts import Draft
from minitron.derivation.proof import (
    checkpoint_of,
    is_its_masked_teacher,
    moves_with,
    narrows,
    reloads,
    survives_without_layers,
    turns,
)
from minitron.derivation.specimens import UnderivableError, causal_types
from minitron.derivation.tables import draft, layouts
from minitron.errors import UserError
from minitron.model.anatomy import AXES
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint
from minitron.model.families.table_files import in_text, parse_table

__all__ = ["Derived", "UnderivableError", "causal_types", "derive"]

MASKED = ("query", "kv", "ffn", "shared_ffn")
"""Axes that a tap at the input of a matrix switches off."""


@dataclass(frozen=True)
class Derived:
    """A derived family: its table, the axes that passed every check, and why others did not."""

    model_type: str
    table: str
    axes: tuple[str, ...]
    failed: dict[str, str]

    def in_text(self) -> str:
        """Return the table with what was proven of it in comments, as files of tables hold it."""
        proven = f"# Derived from transformers {version('transformers')}. Proven: {', '.join(self.axes)}.\n"
        return proven + "".join(f"# Not {axis}: {check}.\n" for axis, check in self.failed.items()) + self.table


def derive(model_type: str) -> Derived:
    """Return the table of a `model_type` that the installed transformers has, proven on tiny random models.

    Raises:
        UnderivableError: no table reads its checkpoints; the message states what stands in the way.
    """
    try:
        return _derived(model_type)
    except UserError as error:
        raise UnderivableError(str(error)) from error
    except Exception as error:  # models of other people fail in ways of their own
        raise UnderivableError(
            f"deriving stops at {type(error).__name__}: {' '.join(str(error).split())[:160]}"
        ) from error


def _derived(model_type: str) -> Derived:
    made = draft(model_type)
    one = made.specimens[0]
    best, fewest = dict(made.rows), None
    for rows in layouts(made):
        made.rows = rows
        with _read_by_its_table(made) as teacher:
            unmoved = [axis for axis in _within(teacher.arch) if not moves_with(teacher, axis)]
        if fewest is None or len(unmoved) < fewest:
            best, fewest = rows, len(unmoved)
        if not unmoved:
            break
    made.rows = best
    with _read_by_its_table(made) as teacher:
        if teacher.arch.num_parameters != one.model.num_parameters():
            raise UnderivableError("its table counts other parameters than the model has")
        failed = _failures(teacher)
        if "hidden" not in failed and not turns(teacher):
            made.entries["fixed_basis"] = "a rotation of its residual stream changes its logits"
    for axis, what in {"layer": "its layers cannot leave", "vocab": "its tokens cannot leave"}.items():
        if axis in failed:
            raise UnderivableError(f"{what}: {failed[axis]}")
    if not failed.keys().isdisjoint({"query", "kv"}):
        made.unproven |= {"query", "kv"}
    made.unproven |= failed.keys()
    if not [tap for tap in made.taps() if tap[0] not in made.unproven]:
        raise UnderivableError("no axis passes: " + "; ".join(f"{axis}: {check}" for axis, check in failed.items()))
    with _read_by_its_table(made) as teacher:
        if not reloads(teacher, _smaller(teacher.arch)):
            raise UnderivableError("a student that is written and read again computes something else")
        return Derived(model_type, in_text(made.text_entries()), (*_within(teacher.arch), "layer", "vocab"), failed)


@contextmanager
def _read_by_its_table(made: Draft) -> Iterator[Checkpoint]:
    """Yield the first specimen as a checkpoint that the draft's table reads."""
    try:
        family = parse_table(in_text(made.text_entries()))
        with checkpoint_of(made.specimens[0], family) as teacher:
            yield teacher
    except UnderivableError:
        raise
    except (UserError, ValueError) as error:
        raise UnderivableError(f"its table does not fit its checkpoint: {error}") from error


def _within(arch: Arch) -> tuple[str, ...]:
    return tuple(axis for axis in arch.prunable_axes if axis != "layer")


def _failures(teacher: Checkpoint) -> dict[str, str]:
    """Return the axes that fail a check, each with the check."""
    failed = {
        axis: "a permutation changes the logits" for axis in _within(teacher.arch) if not moves_with(teacher, axis)
    }
    for tap in teacher.arch.taps:
        if tap.side == "routed" and tap.axes != ("expert",) and tap.axes[0] not in teacher.arch.family.per_expert_axes:
            failed[tap.axes[0]] = "its config has one size for the experts and for an MLP beside them"
    for axis in MASKED:
        is_masked = any(tap.axes == (axis,) and tap.side == "input" for tap in teacher.arch.taps)
        is_tested = is_masked and axis not in failed and _is_free(teacher.arch, axis)
        if is_tested and not is_its_masked_teacher(teacher, axis, _less(teacher.arch, axis)):
            failed[axis] = "a student without some entries is not its teacher with these switched off"
    if not narrows(teacher):
        failed["vocab"] = "a student with fewer tokens has other logits for those that stay"
    if not survives_without_layers(teacher):
        failed["layer"] = "a student with fewer layers is not its teacher without them"
    return failed


def _is_free(arch: Arch, axis: str) -> bool:
    """Whether an axis can be cut while hidden stays."""
    return arch.family.product is None or axis not in {"query", "kv"}


def _less(arch: Arch, axis: str) -> int:
    if axis == "query":
        return arch.axis_size("kv") if "kv" in arch.axes else arch.axis_size("query") // 2
    return arch.axis_size(axis) // 2 if axis == "kv" else arch.axis_size(axis) - 8


def _smaller(arch: Arch) -> Arch:
    """Return a shape in which every axis that can be cut is smaller."""
    sizes = {AXES["layer"]: arch.axis_size("layer") - 1}
    for axis in ("ffn", "shared_ffn", "expert_ffn"):
        if axis in arch.prunable_axes:
            sizes[AXES[axis]] = _less(arch, axis)
    if arch.family.product is not None:
        if {"hidden", "query"} <= set(arch.prunable_axes):
            query = _less(arch, "query")
            sizes |= {AXES["query"]: query, AXES["hidden"]: query * arch.axis_size("head_dim")}
    else:
        if "query" in arch.prunable_axes:
            sizes[AXES["query"]] = _less(arch, "query")
        if "hidden" in arch.prunable_axes:
            sizes[AXES["hidden"]] = (
                arch.axis_size("query") * 8 if "query" in arch.axes else arch.axis_size("hidden") - 8
            )
    return arch.resized(**sizes)
