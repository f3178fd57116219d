"""A family of models from one command: each smaller member is cut out of the next larger one."""

import shutil
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from minitron.errors import UserError
from minitron.files import read_json, write_json
from minitron.nas.rank import budget_of
from minitron.pipeline import compress
from minitron.recipe import Recipe
from minitron.reports.series import write_family_report
from minitron.run import Run, open_run
from minitron.runtime import World
from minitron.session import Session
from minitron.stages import stored_word

STATES = "teacher-states"


def compress_family(recipe: Recipe, out: Path, overwrite: bool = False) -> dict[str, Any]:
    """Make a model of each of the recipe's targets in `out`; return what the members' `eval.json` hold, by target.

    As in Minitron (arXiv 2407.14679, section 4): each smaller one is cut out of the next larger student, and taught by
    the teacher of all or by that student. Each is a run directory of its own, continued where it was interrupted; the
    teacher runs over the text once.

    Raises:
        UserError: the targets do not fall, or what `compress` raises.
    """
    targets = recipe.target_params
    assert isinstance(targets, tuple)
    _require_falling(targets, Session(recipe))
    run = open_run(out, recipe, overwrite)
    run.begin()
    results: dict[str, Any] = {}
    larger: Path | None = None
    try:
        for target in targets:
            name = str(target)
            member = _member(recipe, target, run, larger)
            if not run.is_done(name):
                with run.stage(name):
                    _store_once(run, member, larger)
                    compress(member, run.path(name), larger=larger if recipe.lineage.taught_by == "teacher" else None)
            results[name] = read_json(run.path(name) / "eval.json")
            larger = run.path(name) / "student"
        shutil.rmtree(run.path(STATES), ignore_errors=True)
        write_family_report(out)
    finally:
        run.clean()
    return results


def _member(recipe: Recipe, target: str | float, run: Run, larger: Path | None) -> Recipe:
    """The recipe of one member."""
    teacher, distill = recipe.teacher, recipe.distill
    if larger and recipe.lineage.taught_by == "larger":
        teacher, whole = str(larger), Session(recipe).teacher.arch.num_parameters
        if isinstance(target, float):  # of the first teacher, not of this one
            target = str(round(target * whole))
    elif _stores_states(recipe):
        distill = distill.model_copy(update={"teacher_states": str(run.path(STATES))})
    return recipe.model_copy(update={"teacher": teacher, "target_params": target, "distill": distill})


def _stores_states(recipe: Recipe) -> bool:
    """Whether the teacher's word is kept here: not where it is kept elsewhere or the teacher has to run along."""
    distill = recipe.distill
    runs_along = distill.intermediate.of or distill.correction.trains != "nothing"
    return recipe.lineage.stores_states and distill.teacher_states is None and not runs_along


def _store_once(run: Run, member: Recipe, larger: Path | None) -> None:
    """Let the teacher run over the text before its first student is made, and record what that took."""
    states = member.distill.teacher_states
    if larger or states != str(run.path(STATES)):
        return
    inputs, started = Session(member), time.monotonic()
    stored_word(inputs, Path(states), inputs.splits.train, member.distill, World())
    found = {"tokens": inputs.splits.train.num_tokens, "seconds": round(time.monotonic() - started, 2)}
    if not run.path("teacher.json").exists():
        write_json(run.path("teacher.json"), found)


def _require_falling(targets: tuple[str | float, ...], inputs: Session) -> None:
    highs = [budget_of(inputs, target).limits["num_parameters"].high for target in targets]
    if any(following >= before for before, following in pairwise(highs)):
        raise UserError(
            f"target_params {', '.join(map(str, targets))}: each member must be smaller than the one before"
        )
