"""The main job: the order of the stages, in one run directory."""

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from minitron.files import (
    read_json,
    require_space,
    write_json,
)
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.nas.rank import removed_layers, search, shapes_within
from minitron.nas.shapes import Shapes
from minitron.progress import Progress
from minitron.pruning.importance import kept_layers
from minitron.recipe import Recipe
from minitron.reports.card import write_card
from minitron.reports.html import write_report
from minitron.run import Run, open_run
from minitron.runtime import World
from minitron.session import Session
from minitron.stages import (
    measure,
    read_arch,
    require_one_process,
    teacher_of,
    train,
    write_pruned_folder,
    write_statistics,
)


def compress(recipe: Recipe, out: Path, overwrite: bool = False, larger: Path | None = None) -> dict[str, Any]:
    """Make a smaller model of the recipe's teacher in the run directory `out`; return what `eval.json` holds.

    With `larger`, the folder of another student of that teacher, that is what is cut. A finished run is read; an
    interrupted one continues after its last finished stage, or inside the search, the distillation and the evaluation
    where they stood.

    Raises:
        UserError: something asked for cannot be done; nothing is left behind that was not finished.
    """
    require_one_process()
    run = open_run(out, recipe, overwrite)
    if run.is_finished and run.path("report.html").exists():
        return dict(read_json(run.path("eval.json")))
    inputs = Session(recipe, larger)
    shapes, budget = shapes_within(inputs)
    _check(run, inputs, shapes)
    try:
        run.begin()
        _link_teacher(run, inputs.teacher)
        if not run.is_done("calibrate"):
            with run.stage("calibrate"):
                write_statistics(out, inputs, removed_layers(shapes))
        importance = load_file(run.path("importance.safetensors"))
        if not run.is_done("search"):
            with run.stage("search"):
                arch = search(inputs, importance, shapes, budget, out, World())
                write_json(run.path("arch.json"), arch.to_dict())
        arch = read_arch(run.path("arch.json"), inputs.whole.arch)
        if not run.is_done("prune"):
            with run.stage("prune"):
                run.record["kept_layers"] = kept_layers(importance, inputs.whole.arch, arch).tolist()
                write_pruned_folder(inputs, arch, importance, run.path("pruned"))
        if not run.is_done("distill"):
            with run.stage("distill"):
                _note_resumption(run, inputs)
                pruned = open_checkpoint(run.path("pruned"))
                teacher = teacher_of(inputs, pruned, World())
                train(inputs, teacher, pruned, run.path("student"), work=out, world=World())
        shutil.rmtree(run.path("checkpoint"), ignore_errors=True)
        if not run.is_done("evaluate"):
            with run.stage("evaluate"):
                results = _evaluate_run(run, inputs)
                student = open_checkpoint(run.path("student")).arch
                write_card(out, run.record, inputs.teacher.arch, student, results)
        if not run.path("report.html").exists():
            write_report(out)
    finally:
        run.clean()
    return dict(read_json(run.path("eval.json")))


def _check(run: Run, inputs: Session, shapes: Shapes) -> None:
    """Look at everything that can be wrong before anything is written."""
    _ = inputs.dtype
    largest = int(shapes.figures["num_parameters"].max())
    with Progress("check teacher", inputs.teacher.num_bytes, "bytes") as progress:
        run.bind("teacher", inputs.teacher.fingerprint(progress.advance))
    if inputs.larger:
        run.bind("larger", inputs.whole.fingerprint())
    run.bind("data", inputs.splits.fingerprint())
    if run.is_begun:
        return
    # Pruned and student in the teacher's dtype; two checkpoints of weights and two AdamW moments in float32.
    require_space(run.folder, 2 * inputs.teacher.num_bytes + 2 * 12 * largest)


def _link_teacher(run: Run, teacher: Checkpoint) -> None:
    link = run.path("teacher")
    if not link.is_symlink():
        link.symlink_to(teacher.folder.absolute(), target_is_directory=True)


def _note_resumption(run: Run, inputs: Session) -> None:
    """Record at how many tokens the distillation is taken up again, for the curves."""
    state = run.path("checkpoint") / "state.json"
    if state.exists():
        tokens = read_json(state)["step"] * inputs.recipe.distill.batch_size * inputs.context
        run.record["stages"]["distill"].setdefault("resumed_at", []).append(tokens)
        run.save()


def _evaluate_run(run: Run, inputs: Session) -> dict[str, Any]:
    """Measure teacher, pruned and student on the blocks that no other stage has seen."""
    path = run.path("eval.json")
    results = read_json(path) if path.exists() else {}
    for name in ("teacher", "pruned", "student"):
        if name not in results:
            checkpoint = inputs.teacher if name == "teacher" else open_checkpoint(run.path(name))
            results[name] = measure(inputs, checkpoint, inputs.splits.evaluation, f"evaluate {name}", num_samples=3)
            write_json(path, results)
    return dict(results)
