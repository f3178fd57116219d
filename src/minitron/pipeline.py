"""The order of the stages in one run directory, and of several students in a series."""

import logging
import shutil
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.filesize import decimal
from safetensors.torch import load_file

from minitron import nas
from minitron.distillation import distill, require_trainable, stored_teacher, warn_of_repetition
from minitron.errors import UserError, courtesy
from minitron.evaluation import measure
from minitron.evaluation.speed import TURNS, speed_up
from minitron.files import read_json, require_space, write_json
from minitron.model.arch import Arch
from minitron.model.checkpoint import open_checkpoint
from minitron.model.config import config_values
from minitron.model.language_model import load_model
from minitron.nas.shapes import Shapes
from minitron.progress import Progress
from minitron.pruning import prune, require_scores, write_importance
from minitron.pruning.selection import kept_layers
from minitron.recipe import Recipe
from minitron.reports.card import write_card
from minitron.reports.html import write_report
from minitron.reports.series import write_series_report
from minitron.run import Run, open_run, teacher_of
from minitron.session import Session, require_one_process

STATES = "teacher-states"
logger = logging.getLogger(__name__)
NUM_SAMPLES = 3
"""Texts that each model generates for the report."""


def compress(recipe: Recipe, out: Path, overwrite: bool = False, *, larger: Path | None = None) -> dict[str, Any]:
    """Make a smaller model of the recipe's teacher in the run directory `out`; return what `eval.json` holds.

    With `larger`, the folder of another student of that teacher, that student is pruned. A finished run is read; an
    interrupted one continues after its last finished stage, or inside search, distillation or evaluation.

    Raises:
        UserError: something asked for cannot be done; nothing is left behind that was not finished.
    """
    require_one_process()
    require_scores(recipe)
    with open_run(out, recipe, overwrite) as run:
        if not run.is_finished:
            _take_stages(run, Session(recipe, larger))
        _accompany(run)
        run.publish()
    return dict(read_json(run.path("eval.json")))


def _take_stages(run: Run, session: Session) -> None:
    """Run the stages that are not done."""
    session.validate()
    require_trainable(session, session.source.arch)
    shapes, budget = nas.shapes_within(session)
    session.require_one_reading()
    _check(run, session, shapes)
    run.begin()
    run.link_teacher(session.teacher.folder)
    if not run.is_done("calibrate"):
        with run.stage("calibrate"):
            write_importance(run.folder, session, nas.removed_layers(shapes))
    importance = load_file(run.path("importance.safetensors"))
    if not run.is_done("search"):
        with run.stage("search"):
            write_json(run.path("arch.json"), nas.search(session, importance, shapes, budget, run.folder).to_dict())
    source = session.source.arch
    arch = Arch.from_dict(read_json(run.path("arch.json")), source)
    if not run.is_done("prune"):
        with run.stage("prune"):
            run.record["kept_layers"] = kept_layers(importance, source, arch).tolist()
            prune(session, arch, importance, run.path("pruned"))
    if not run.is_done("distill"):
        with run.stage("distill"):
            _record_resumption(run, session)
            distill(session, open_checkpoint(run.path("pruned")), run.path("student"), work=run.folder)
    shutil.rmtree(run.path("checkpoint"), ignore_errors=True)
    if not run.is_done("evaluate"):
        with run.stage("evaluate"):
            _evaluate(run, session)
            run.path("report.html").unlink(missing_ok=True)  # a page that was written while the run was under way


def _accompany(run: Run) -> None:
    """Write the model card and the report of a finished run where they are missing; a failure is a warning."""
    if not (run.path("student") / "README.md").exists():
        with courtesy("the model card"):
            teacher = Arch.from_config(config_values(teacher_of(run.folder), run.record["recipe"]["family"]))
            student = open_checkpoint(run.path("student")).arch
            write_card(run.folder, run.record, teacher, student, read_json(run.path("eval.json")))
    if not run.path("report.html").exists():
        with courtesy("report.html"):
            write_report(run.folder)


def compress_series(recipe: Recipe, out: Path, overwrite: bool = False) -> dict[str, Any]:
    """Make a student for each of the recipe's targets in `out`; return what the members' `eval.json` hold, by target.

    Each smaller student is cut out of the next larger one, and taught by the one teacher or by that student (Minitron,
    arXiv 2407.14679, section 4). Each is a run directory of its own, which continues after an interruption; the
    teacher runs over the text once.

    Raises:
        UserError: the targets do not fall; or see `compress`.
    """
    targets = recipe.target_params
    assert isinstance(targets, tuple)
    require_scores(recipe)
    _require_falling(targets, Session(recipe))
    figures: dict[str, Any] = {}
    larger: Path | None = None
    with open_run(out, recipe, overwrite) as run:
        run.begin()
        for target in targets:
            name = str(target)
            member = _member(recipe, target, run, larger)
            if not run.is_done(name):
                with run.stage(name):
                    _store_teacher_once(run, member, larger)
                    compress(member, run.path(name), larger=larger if recipe.lineage.taught_by == "teacher" else None)
            figures[name] = read_json(run.path(name) / "eval.json")
            larger = run.path(name) / "student"
        shutil.rmtree(run.path(STATES), ignore_errors=True)
        with courtesy("report.html"):
            write_series_report(run.folder)
        run.publish()
    return figures


def _check(run: Run, session: Session, shapes: Shapes) -> None:
    """Check teacher, text and disk space before anything is written."""
    largest = int(shapes.figures["num_parameters"].max())
    with Progress("check teacher", session.teacher.num_bytes, "bytes") as progress:
        run.bind("teacher", session.teacher.fingerprint(progress.advance))
    if session.larger:
        run.bind("larger", session.source.fingerprint())
    run.bind("data", session.splits.fingerprint())
    warn_of_repetition(session)
    if run.is_begun:
        return
    # Pruned model and student in the teacher's dtype; two checkpoints of weights and two AdamW moments in float32.
    require_space(run.folder, 2 * session.teacher.num_bytes + 2 * 12 * largest)


def _record_resumption(run: Run, session: Session) -> None:
    """Record at how many tokens the distillation continues, for the curves."""
    state = run.path("checkpoint") / "state.json"
    if state.exists():
        tokens = read_json(state)["step"] * session.recipe.distill.batch_size * session.context
        run.record["stages"]["distill"].setdefault("resumed_at", []).append(tokens)
        run.save()


def _evaluate(run: Run, session: Session) -> dict[str, Any]:
    """Measure teacher, pruned model and student on the blocks that no other stage has seen."""
    path, runtime, blocks = run.path("eval.json"), session.runtime, session.splits.evaluation
    figures = read_json(path) if path.exists() else {}
    for name in ("teacher", "pruned", "student"):
        if name not in figures:
            checkpoint = session.teacher if name == "teacher" else open_checkpoint(run.path(name))
            model = load_model(checkpoint, runtime.device, runtime.dtype)
            figures[name] = measure(model, checkpoint, blocks, stage=f"evaluate {name}", num_samples=NUM_SAMPLES)
            del model
            write_json(path, figures)
    if "speed_up" not in figures["student"] and (ratios := _speed_up(run, session)):
        figures["student"]["speed_up"] = ratios
        write_json(path, figures)
    return dict(figures)


def _speed_up(run: Run, session: Session) -> dict[str, float] | None:
    """Time student and teacher in turn; None where the memory does not hold both, which is logged."""
    runtime, context = session.runtime, session.splits.evaluation.context
    checkpoints = open_checkpoint(run.path("student")), session.teacher
    needed = sum(each.arch.num_parameters for each in checkpoints) * runtime.dtype.itemsize
    free = runtime.free_memory
    if free is not None and needed > free:
        logger.warning(
            "the speed-up is not measured: teacher and student take %s together, %s are free",
            decimal(needed),
            decimal(free),
        )
        return None
    student, teacher = (load_model(each, runtime.device, runtime.dtype) for each in checkpoints)
    with Progress("evaluate speed-up", TURNS + 1, "turns") as progress:
        return speed_up(student, teacher, context, progress.advance)


def _member(recipe: Recipe, target: str | float, run: Run, larger: Path | None) -> Recipe:
    """Return the recipe of one member of a series."""
    teacher, distill = recipe.teacher, recipe.distill
    if larger and recipe.lineage.taught_by == "larger":
        teacher, whole = str(larger), Session(recipe).teacher.arch.num_parameters
        if isinstance(target, float):  # a share of the first teacher, not of this one
            target = str(round(target * whole))
    elif _stores_states(recipe):
        distill = distill.model_copy(update={"teacher_states": str(run.path(STATES))})
    return recipe.model_copy(update={"teacher": teacher, "target_params": target, "distill": distill})


def _stores_states(recipe: Recipe) -> bool:
    """Return whether the series stores the teacher's outputs: not where the recipe does, or the teacher is needed."""
    distill = recipe.distill
    runs_along = distill.intermediate.of or distill.correction.trains != "nothing"
    return recipe.lineage.stores_states and distill.teacher_states is None and not runs_along


def _store_teacher_once(run: Run, member: Recipe, larger: Path | None) -> None:
    """Run the teacher over the text before its first student is made, and record the time."""
    states = member.distill.teacher_states
    if larger or states != str(run.path(STATES)):
        return
    session, started = Session(member), time.monotonic()
    stored_teacher(session, Path(states), session.splits.train, member.distill)
    cost = {"tokens": session.splits.train.num_tokens, "seconds": round(time.monotonic() - started, 2)}
    if not run.path("teacher.json").exists():
        write_json(run.path("teacher.json"), cost)


def _require_falling(targets: tuple[str | float, ...], session: Session) -> None:
    highs = [nas.budget_of(session, target).limits["num_parameters"].high for target in targets]
    if any(following >= before for before, following in pairwise(highs)):
        raise UserError(
            f"target_params {', '.join(map(str, targets))}: each member must be smaller than the one before"
        )
