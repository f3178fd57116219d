"""The order of the steps in one run directory."""

import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

from rich.filesize import decimal
from safetensors.torch import load_file

from minitron import nas
from minitron.conversations import CHATS, announce_silence, answers_of, require_conversing, teacher_nats, write_chats
from minitron.distillation import (
    correct,
    distill,
    require_correctable,
    require_trainable,
    warn_of_repetition,
)
from minitron.distillation.rounding import simulate_rounding
from minitron.errors import courtesy
from minitron.evaluation import measure
from minitron.evaluation.agreement import Comparison, TeacherStates
from minitron.evaluation.speed import TURNS, speed_up
from minitron.files import read_json, read_jsonl, require_space, write_json
from minitron.forecast import forecast, in_words, taken_in_words
from minitron.history import record_step
from minitron.model.arch import Arch
from minitron.model.checkpoint import open_checkpoint
from minitron.model.language_model import load_model
from minitron.progress import Progress, announce
from minitron.pruning import how_measured, over_vocabulary, prune, require_scores, write_importance
from minitron.pruning.selection import kept_layers
from minitron.recipe import Recipe
from minitron.reports.card import write_card
from minitron.reports.figures import PER_TEACHER_TOKEN, rounded_name
from minitron.reports.html import write_report
from minitron.reports.run_files import RunFiles
from minitron.run import Run, linked, open_run
from minitron.runtime import World, joined_world, resolve_device
from minitron.session import Session
from minitron.stages import STEPS, Stage

logger = logging.getLogger(__name__)
NUM_SAMPLES = 3
"""Texts that each model generates for the report."""


def compress(recipe: Recipe, out: Path, overwrite: bool = False) -> dict[str, Any]:
    """Make a smaller model of the recipe's teacher in the run directory `out`; return what `eval.json` holds.

    A finished run is read; an interrupted one continues after its last finished step, or inside search, distillation
    or evaluation. Of the processes of torchrun, all search and train, and the main one does the rest.

    Raises:
        UserError: something asked for cannot be done; nothing is left behind that was not finished.
    """
    require_scores(recipe)
    with joined_world(resolve_device(recipe.device)) as world:
        return take_stage(Stage(out.name, recipe), out, overwrite, world=world)


def take_stage(
    stage: Stage, out: Path, overwrite: bool = False, *, world: World, larger: Path | None = None
) -> dict[str, Any]:
    """Take all steps of a stage in the run directory `out`; `larger` is the student that it starts from."""
    with open_run(out, stage.recipe, overwrite, follows=not world.is_main) as run:
        run.share(world)
        if not all(map(run.is_done, STEPS[stage.kind])):
            take = {"cut": _cut, "distill": _distill_further, "correct": _correct}[stage.kind]
            take(run, Session(stage.recipe, larger, world))
            if world.is_main:
                taken = {name: step["seconds"] for name, step in run.record["stages"].items()}
                announce(taken_in_words(taken, run.record.get("expected", {})))
                shutil.rmtree(run.path("checkpoint"), ignore_errors=True)
                run.path("report.html").unlink(missing_ok=True)  # a page that was written while the run was under way
        if world.is_main:
            accompany(run)
            run.publish()
        run.share(world)
    return dict(read_json(run.path("eval.json")))


def _cut(run: Run, session: Session) -> None:
    """Cut a student and distil it."""
    session.validate(one_process=False)
    require_trainable(session, session.source.arch)
    require_conversing(session)
    shapes, budget = nas.shapes_within(session)
    session.require_one_reading()
    begin(run, session, int(shapes.figures["num_parameters"].max()))
    if session.runtime.world.is_main and not run.is_done("calibrate"):
        expected = forecast(session, shapes)
        announce(in_words(expected))
        run.record["expected"] = {each.name: round(each.seconds, 2) for each in expected if each.seconds is not None}
        run.save()
    converse(run, session)
    with step_of(run, session, "calibrate", on_main=True) as is_taken:
        if is_taken:
            write_importance(run.folder, session, nas.removed_layers(shapes))
    importance = load_file(run.path("importance.safetensors"))
    with step_of(run, session, "search") as is_taken:
        if is_taken:
            arch = nas.search(session, importance, shapes, budget, run.folder)
            if session.runtime.world.is_main:
                write_json(run.path("arch.json"), arch.to_dict())
    arch = Arch.from_dict(read_json(run.path("arch.json")), session.source.arch)
    measured, session = how_measured(session), over_vocabulary(session, arch.axis_size("vocab"))
    source = session.source.arch
    with step_of(run, session, "prune", on_main=True) as is_taken:
        if is_taken:
            run.record["kept_layers"] = kept_layers(importance, source, arch).tolist()
            if not _takes_trial(run):
                step = prune(session, arch, importance, run.path("pruned"))
                record_step(run.path("pruned"), session.source.folder, step | {"measured": measured})
    _train(run, session)


def _takes_trial(run: Run) -> bool:
    """Make the files of the chosen shape's trial those of the run, and return whether there are any.

    They are the pruned model and, where the distillation continues the trial, its checkpoint and its rows of figures.
    """
    trial = run.path(nas.TRIAL)
    if not trial.is_dir():
        return False
    for path in trial.iterdir():
        path.replace(run.path(path.name))
    trial.rmdir()
    return True


def _distill_further(run: Run, session: Session) -> None:
    """Distil a student further, its shape as it is."""
    session.validate(one_process=False)
    require_trainable(session, session.source.arch)
    require_conversing(session)
    session.require_one_reading()
    begin(run, session, session.source.arch.num_parameters)
    converse(run, session)
    if session.runtime.world.is_main:
        write_json(run.path("arch.json"), session.source.arch.to_dict())
        run.link("pruned", session.source.folder)
    run.share(session.runtime.world)
    _train(run, session, start="before")


def _correct(run: Run, session: Session) -> None:
    """Train the teacher itself on the text."""
    session.validate(one_process=False)
    require_correctable(session)
    session.require_one_reading()
    begin(run, session, session.teacher.arch.num_parameters)
    with step_of(run, session, "distill") as is_taken:
        if is_taken:
            _record_resumption(run, session)
            correct(session, run.path("corrected"), work=run.folder)
    evaluate(run, session, {"teacher": session.teacher.folder, "corrected": run.path("corrected")})


def _train(run: Run, session: Session, start: str = "pruned") -> None:
    """Distil the pruned model and measure it; `start` is the name of the pruned model among the figures."""
    pruned, student = linked(run.folder, "pruned"), run.path("student")
    with step_of(run, session, "distill") as is_taken:
        if is_taken:
            _record_resumption(run, session)
            distill(session, open_checkpoint(pruned), student, work=run.folder)
    models = {"teacher": session.teacher.folder, start: pruned, "student": student}
    if scheme := session.recipe.distill.quantize:
        models[rounded_name(scheme)] = student
    evaluate(run, session, models)


@contextmanager
def step_of(run: Run, session: Session, name: str, *, on_main: bool = False) -> Iterator[bool]:
    """Record a step while the block runs, in which all processes take it, or with `on_main` the main one alone.

    The block receives whether this process has to take the step, which may be done already. The processes wait for
    each other at its end.
    """
    world = session.runtime.world
    if run.is_done(name) or (on_main and not world.is_main):
        yield False
    else:
        with run.stage(name):
            yield True
    run.share(world)


def accompany(run: Run) -> None:
    """Write the model card and the report of a finished run where they are missing; a failure is a warning."""
    if run.path("student").exists() and not (run.path("student") / "README.md").exists():
        with courtesy("the model card"):
            write_card(run.path("student"), open_checkpoint(run.path("student")).arch, RunFiles(run.folder))
    if not run.path("report.html").exists():
        with courtesy("report.html"):
            write_report(run.folder)


def begin(run: Run, session: Session, num_parameters: int) -> None:
    """Check text and disk space for a student of at most `num_parameters`, and begin the run.

    Raises:
        UserError: teacher or text are not those that the run was started with, or there is too little space.
    """
    if session.runtime.world.is_main:  # hashing a teacher takes as long as reading it
        with Progress("check teacher", session.teacher.num_bytes, "bytes") as progress:
            run.bind("teacher", session.teacher.fingerprint(progress.advance))
        if session.larger:
            run.bind("larger", session.source.fingerprint())
        run.bind("data", session.splits.fingerprint())
        warn_of_repetition(session)
        if not run.is_begun:
            # Pruned model and student in the teacher's dtype; two checkpoints of weights and AdamW moments in float32.
            require_space(run.folder, 2 * session.teacher.num_bytes + 2 * 12 * num_parameters)
    run.begin()
    run.link("teacher", session.teacher.folder)
    run.share(session.runtime.world)


def converse(run: Run, session: Session) -> None:
    """Let the teacher answer chats where the recipe asks for them, and mix them into the training text."""
    if not session.recipe.chats.share:
        if session.runtime.world.is_main:
            announce_silence(session)
        return
    if session.runtime.world.is_main and not run.path(CHATS).exists():
        write_chats(session, run.path(CHATS))
    run.share(session.runtime.world)
    session.mix_in(run.path(CHATS))


def _record_resumption(run: Run, session: Session) -> None:
    """Record at how many tokens an interrupted distillation continues, for the curves, but not after a trial."""
    state, rows = run.path("checkpoint") / "state.json", read_jsonl(run.path("metrics.jsonl"))
    if state.exists() and not (rows and "trial" in rows[-1]):
        tokens = read_json(state)["step"] * session.recipe.distill.batch_size * session.context
        run.record["stages"]["distill"].setdefault("resumed_at", []).append(tokens)
        run.save()


def evaluate(run: Run, session: Session, models: dict[str, Path]) -> None:
    """Measure models, by name, on the blocks that no other stage has seen; see `_measure`."""
    with step_of(run, session, "evaluate", on_main=True) as is_taken:
        if is_taken:
            _measure(run, session, models)


def _measure(run: Run, session: Session, models: dict[str, Path]) -> None:
    """Measure models, by name; results go to `eval.json` one by one.

    The first model is the teacher. The others are compared with its last hidden states, so that one model is
    in memory at a time. After an interruption the teacher runs again for its states; what has been measured stays. A
    student that was trained for a scheme is measured as it is saved, and under a name of its own as the scheme rounds
    it. A teacher with more tokens reads the text with its own, and the figures of the others are given per token of the
    teacher too: exp(negative log-likelihood of the text over the number of tokens that the teacher has for it).
    """
    scheme = session.recipe.distill.quantize
    path, runtime, blocks = run.path("eval.json"), session.runtime, session.splits.evaluation
    figures = read_json(path) if path.exists() else {}
    missing = [name for name in models if name not in figures]
    states = TeacherStates(blocks, session.pieces)
    for name in dict.fromkeys(["teacher", *missing]) if missing else ():
        checkpoint = session.teacher if name == "teacher" else open_checkpoint(models[name])
        rounding = scheme if scheme and name == rounded_name(scheme) else None
        # What is rounded is computed as in training: from weights in float32, under autocast.
        dtype = runtime.weights_dtype if rounding else runtime.dtype
        model = load_model(checkpoint, runtime.device, dtype, runtime.attention)
        if rounding:
            simulate_rounding(model, checkpoint, rounding)
        with runtime.autocast() if rounding else nullcontext():
            measured = measure(
                model,
                checkpoint,
                blocks.whole.blocks if blocks.whole and name == "teacher" else blocks,
                stage=f"evaluate {name}",
                num_samples=NUM_SAMPLES if name in missing else 0,
                observer=states if name == "teacher" else Comparison(states),
            )
        if session.recipe.chats.share and name in missing:
            measured["answers"] = answers_of(session, checkpoint, model)
        del model
        figures.setdefault(name, measured)
        if session.pieces is not None:
            share = measured["bits_per_byte"] / figures["teacher"]["bits_per_byte"]
            figures[name][PER_TEACHER_TOKEN] = figures["teacher"]["perplexity"] ** share
        write_json(path, figures)
    for name in missing:
        if answers := figures[name].get("answers"):
            figures[name]["answers_teacher_nats"] = teacher_nats(session, answers)
            write_json(path, figures)
    if "student" in models and "speed_up" not in figures["student"] and (ratios := _speed_up(run, session)):
        figures["student"]["speed_up"] = ratios
        write_json(path, figures)


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
    student, teacher = (load_model(each, runtime.device, runtime.dtype, runtime.attention) for each in checkpoints)
    with Progress("evaluate speed-up", TURNS + 1, "turns") as progress:
        return speed_up(student, teacher, context, progress.advance)
