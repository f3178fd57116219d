"""Several students of one teacher in a row: each is cut out of the one before, in a run directory of its own."""

import shutil
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from minitron import nas
from minitron.distillation import stored_teacher
from minitron.errors import UserError, courtesy
from minitron.files import read_json, write_json
from minitron.pipeline import take_stage
from minitron.progress import announce
from minitron.pruning import require_scores
from minitron.recipe import Recipe, Target
from minitron.reports.series import write_series_report
from minitron.run import Run, open_run
from minitron.runtime import World, joined_world, resolve_device
from minitron.session import Session
from minitron.stages import IN_WORDS, Stage, stages_of, stores_states

STATES = "teacher-states"


def compress_series(recipe: Recipe, out: Path, overwrite: bool = False) -> dict[str, Any]:
    """Take the stages of a recipe, or make a student for each of its targets, in `out`; return what `eval.json` holds.

    Each student is cut out of the one before, and taught by the one teacher or by that student (Minitron, arXiv
    2407.14679, section 4). Each stage is a run directory of its own, which continues after an interruption. For a
    series of targets the teacher runs over the text once.

    Raises:
        UserError: the targets do not fall; or see `compress` and `stages_of`.
    """
    stages = stages_of(recipe)
    for stage in stages:
        require_scores(stage.recipe)
    if isinstance(recipe.target_params, tuple):
        _require_falling(recipe.target_params, Session(recipe))
    figures: dict[str, Any] = {}
    made = Made()
    with (
        joined_world(resolve_device(recipe.device)) as world,
        open_run(out, recipe, overwrite, follows=not world.is_main) as run,
    ):
        run.begin()
        run.share(world)
        for number, stage in enumerate(stages, 1):
            folder, member = run.path(stage.name), _member(stage, run, made)
            if not run.is_done(stage.name):
                announce(f"{number} of {len(stages)}: {stage.name}, {IN_WORDS[stage.kind]}")
                with run.stage(stage.name):
                    if made.student is None:
                        _store_teacher_once(run, member, world)
                    larger = None if stage.is_taught_by_larger else made.student
                    take_stage(replace(stage, recipe=member), folder, world=world, larger=larger)
            run.share(world)
            figures[stage.name] = read_json(folder / "eval.json")
            if stage.kind == "correct":
                made = replace(made, teacher=folder / "corrected")
            else:
                made = replace(made, student=folder / "student")
        if world.is_main:
            shutil.rmtree(run.path(STATES), ignore_errors=True)
            with courtesy("report.html"):
                write_series_report(run.folder)
            run.publish()
    return figures


@dataclass(frozen=True)
class Made:
    """What the stages so far have made, from which the next one starts."""

    teacher: Path | None = None
    """The corrected teacher, which teaches in place of the recipe's."""
    student: Path | None = None


def _member(stage: Stage, run: Run, made: Made) -> Recipe:
    """Return the recipe with which a stage runs, which names the models before it and the stored teacher outputs."""
    recipe = stage.recipe
    teacher, target, distill = made.teacher or recipe.teacher, recipe.target_params, recipe.distill
    if made.student and stage.is_taught_by_larger:
        whole = Session(recipe.model_copy(update={"teacher": str(teacher)})).teacher.arch.num_parameters
        teacher = made.student
        if isinstance(target, float):  # a share of the first teacher, not of this one
            target = str(round(target * whole))
    elif run.record["recipe"]["target_params"] and stores_states(recipe):
        distill = distill.model_copy(update={"teacher_states": str(run.path(STATES))})
    return recipe.model_copy(update={"teacher": str(teacher), "target_params": target, "distill": distill})


def _store_teacher_once(run: Run, member: Recipe, world: World) -> None:
    """Run the teacher over the text before its first student is made, and record the time."""
    states = member.distill.teacher_states
    if states != str(run.path(STATES)):
        return
    session, started = Session(member, world=world), time.monotonic()
    stored_teacher(session, Path(states), session.splits.train, member.distill)
    cost = {"tokens": session.splits.train.num_tokens, "seconds": round(time.monotonic() - started, 2)}
    if world.is_main and not run.path("teacher.json").exists():
        write_json(run.path("teacher.json"), cost)


def _require_falling(targets: tuple[Target, ...], session: Session) -> None:
    highs = [nas.budget_of(session, target).limits["num_parameters"].high for target in targets]
    if any(following >= before for before, following in pairwise(highs)):
        raise UserError(
            f"target_params {', '.join(map(str, targets))}: each member must be smaller than the one before"
        )
