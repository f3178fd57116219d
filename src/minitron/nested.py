"""A series of students in one training: each is the beginning of the next larger one and shares its weights."""

import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from minitron import distillation, nas, pruning
from minitron.conversations import require_conversing
from minitron.distillation import Member, distill_nested
from minitron.distillation.record import rows_of
from minitron.errors import UserError, courtesy
from minitron.files import read_json, write_json, write_jsonl
from minitron.history import record_step
from minitron.model.arch import Arch
from minitron.model.checkpoint import open_checkpoint
from minitron.nas.budget import Budget
from minitron.nas.shapes import Shapes
from minitron.pipeline import accompany, begin, converse, evaluate
from minitron.progress import announce
from minitron.pruning import Importance, how_measured, nested_cuts, require_scores, write_cut, write_importance
from minitron.pruning.nested import beginning_of
from minitron.recipe import Recipe
from minitron.reports.series import write_series_report
from minitron.run import Run, open_run
from minitron.session import Session
from minitron.stages import Stage, nested_stages

IMPORTANCE = "importance.safetensors"


def compress_nested(recipe: Recipe, out: Path, overwrite: bool = False) -> dict[str, Any]:
    """Make the students of a recipe's targets or stages in one training, in `out`; return what `eval.json` holds.

    The teacher is scored once. The shape of each student is searched for among those that are beginnings of the next
    larger one, without trials. Each student has a run directory of its own in `out`, and the training continues after
    an interruption.

    Raises:
        UserError: something asked for cannot be done, or not in a nested series; see `nested_stages` and
            `require_nestable`.
    """
    stages = nested_stages(recipe)
    require_nestable(recipe, stages)
    with open_run(out, recipe, overwrite) as run:
        if not run.is_done("evaluate"):
            students = [Student.of(stage) for stage in stages]
            require_conversing(students[0].session)
            distillation.require_equal_names(students[0].session.teacher)
            students[0].session.require_one_reading()
            run.begin()
            with ExitStack() as stack:
                for student in students:
                    student.open(run, stack)
                importance = _score(run, students)
                _prune(students, _shapes(students, importance), importance)
                session = Session(recipe)
                converse(run, session)
                _train(run, session, students)
                _evaluate(run, students)
        with courtesy("report.html"):
            write_series_report(run.folder)
        run.publish()
        return {stage.name: read_json(run.path(stage.name) / "eval.json") for stage in stages}


def require_nestable(recipe: Recipe, stages: tuple[Stage, ...]) -> None:
    """Check that the stages of a recipe can be students of a nested series.

    Raises:
        UserError: the recipe asks for what these cannot have.
    """
    for stage in stages:
        require_scores(stage.recipe)
    recipe.lineage.shares(len(stages))
    if recipe.lineage.taught_by == "larger":
        raise UserError("lineage.taught_by larger: a larger student that shares its weights teaches nothing new")
    if recipe.vocabulary.trim or any("vocab_size" in {*s.recipe.shape, *s.recipe.search.space} for s in stages):
        raise UserError("a nested series keeps the teacher's vocabulary: leave out vocab_size and vocabulary.trim")
    distillation.require_nestable(recipe.distill)
    for stage in stages:
        pruning.require_nestable(stage.recipe.prune)


@dataclass
class Student:
    """A student of a nested series while it is made: what its recipe names, the shapes it may have, its run."""

    name: str
    session: Session
    shapes: Shapes
    budget: Budget
    run: Run = field(init=False)

    @classmethod
    def of(cls, stage: Stage) -> "Student":
        """Check what can be wrong with a stage before any work."""
        session = Session(stage.recipe)
        session.validate()
        distillation.require_trainable(session, session.source.arch)
        return cls(stage.name, session, *nas.shapes_within(session))

    def open(self, series: Run, stack: ExitStack) -> None:
        """Open the student's run directory within that of the series, until the stack is left."""
        self.run = stack.enter_context(open_run(series.path(self.name), self.session.recipe, False))
        begin(self.run, self.session, int(self.shapes.figures["num_parameters"].max()))


def _score(run: Run, students: list[Student]) -> Importance:
    """Score the teacher, once, and return the importance, of which each student's run has a copy for its report."""
    if not run.is_done("calibrate"):
        removed = set[int]().union(*(nas.removed_layers(student.shapes) for student in students))
        with run.stage("calibrate"):
            write_importance(run.folder, students[0].session, removed)
            for student in students:
                shutil.copyfile(run.path(IMPORTANCE), student.run.path(IMPORTANCE))
    importance: Importance = load_file(run.path(IMPORTANCE))
    return importance


def _shapes(students: list[Student], importance: Importance) -> list[Arch]:
    """Return the shape of each student, searched for within that of the one before."""
    archs: list[Arch] = []
    for student in students:
        run, shapes, budget = student.run, student.shapes, student.budget
        if not run.is_done("search"):
            if archs and budget.limits:
                shapes, budget = nas.inside(shapes, budget, archs[-1])
            announce(f"{student.name}: search among {len(shapes):,} shapes")
            with run.stage("search"):
                arch = nas.search(student.session, importance, shapes, budget, run.folder)
                write_json(run.path("arch.json"), arch.to_dict())
        archs.append(Arch.from_dict(read_json(run.path("arch.json")), student.session.source.arch))
    return archs


def _prune(students: list[Student], archs: list[Arch], importance: Importance) -> None:
    """Write the pruned model of each student."""
    if all(student.run.is_done("prune") for student in students):
        return
    session = students[0].session
    recipe, blocks = session.recipe.prune, session.calibration_blocks
    for student, cut in zip(students, nested_cuts(session.source, importance, archs, recipe), strict=True):
        with student.run.stage("prune"):
            student.run.record["kept_layers"] = cut.layers
            step = write_cut(student.session, cut, student.run.path("pruned"), recipe=recipe, blocks=blocks)
            measured = {"measured": how_measured(session)}
            record_step(student.run.path("pruned"), session.source.folder, step | measured)


def _train(run: Run, session: Session, students: list[Student]) -> None:
    """Train all students together, and give each run the rows of figures of its own student."""
    if run.is_done("distill"):
        return
    with run.stage("distill"):
        outs = [student.run.path("student") for student in students]
        distill_nested(session, _members(session.recipe, students), outs, run.folder)
        for student in students:
            with student.run.stage("distill"):
                rows = rows_of(run.path("metrics.jsonl"), student.name)
                write_jsonl(student.run.path("metrics.jsonl"), rows)
    shutil.rmtree(run.path("checkpoint"), ignore_errors=True)


def _members(recipe: Recipe, students: list[Student]) -> tuple[Member, ...]:
    """Return the members of the series, each as the beginning of the first."""
    weights = recipe.lineage.shares(len(students))
    models = [open_checkpoint(student.run.path("pruned")) for student in students]
    layers = [student.run.record["kept_layers"] for student in students]
    return tuple(
        Member(student.name, model, beginning_of(models[0], layers[0], model, kept), weight)
        for student, model, kept, weight in zip(students, models, layers, weights, strict=True)
    )


def _evaluate(run: Run, students: list[Student]) -> None:
    """Measure each student beside the teacher, and write its card and its report."""
    with run.stage("evaluate"):
        for student in students:
            folders = {"pruned": student.run.path("pruned"), "student": student.run.path("student")}
            evaluate(student.run, student.session, {"teacher": student.session.teacher.folder} | folders)
            accompany(student.run)
