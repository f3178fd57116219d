"""The stages one by one, each a verb of the command line."""

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import load_file

from minitron.distillation.teacher import Teacher
from minitron.errors import UserError
from minitron.files import (
    empty_folder,
    parents_of,
    publish_folder,
    read_json,
    require_new_folder,
    require_space,
    whole_folder,
    write_json,
)
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint, has_weights, open_checkpoint, read_config
from minitron.model.memory import DTYPE_BYTES, attention_windows, memory
from minitron.model.source import open_teacher, resolve_teacher
from minitron.nas.rank import removed_layers, shapes_within
from minitron.nas.rank import search as find_shape
from minitron.recipe import Recipe, parse_context
from minitron.reports.plot import write_plot
from minitron.runtime import World, joined_world
from minitron.session import Session
from minitron.stages import (
    read_arch,
    read_importance,
    require_one_process,
    require_one_vocabulary,
    shape,
    teacher_of,
    train,
    write_pruned_folder,
    write_statistics,
)


def inspect(
    model: str, family: str | None = None, batch: int = 1, context: str = "4k", dtype: str = "auto"
) -> dict[str, Any]:
    """What a model is and what serving it takes, in bfloat16 by default, from its config alone.

    The weights of a folder that has some are held against the family's table.

    Raises:
        UserError: `context` or `dtype` is none, or the model cannot be read.
    """
    dtype = "bfloat16" if dtype == "auto" else dtype
    if dtype not in DTYPE_BYTES:
        raise UserError(f"unknown dtype '{dtype}'; accepted: auto, {', '.join(DTYPE_BYTES)}")
    try:
        num_tokens = parse_context(context)
    except ValueError as error:
        raise UserError(str(error)) from error
    path = _config_or_folder(model, family)
    checked = has_weights(path)
    config = (open_checkpoint(path, family).config if checked else read_config(path, family)).to_dict()
    arch = Arch.from_config(config)
    needed = memory(arch, batch, num_tokens, dtype, attention_windows(config))
    return {
        "model_type": arch.model_type,
        "num_parameters": arch.num_parameters,
        "num_non_embedding_parameters": arch.num_non_embedding_parameters,
        "arch": arch.to_dict(),
        "weights_checked": checked,
        "memory": needed.to_dict(),
        "memory_of": {"batch": batch, "context": num_tokens, "dtype": dtype},
    }


def plan_prune(
    teacher: str, sizes: dict[str, int], arch_file: Path | None, family: str | None = None
) -> dict[str, Any]:
    """The shape that `prune` would cut a teacher to, and its exact counts; from the teacher's config alone.

    Raises:
        UserError: no shape is given, or it cannot be cut out of the teacher.
    """
    whole = Arch.from_config(read_config(_config_or_folder(teacher, family), family).to_dict())
    if not arch_file and not sizes:
        raise UserError("--dry-run needs a shape: sizes such as --hidden-size, or --arch")
    arch = read_arch(arch_file, whole) if arch_file else whole.resized(**sizes)
    whole.require_prunable_to(arch)
    return {
        "model_type": arch.restatement.restated_as if arch.restatement else arch.model_type,
        **shape(arch),
        "num_non_embedding_parameters": arch.num_non_embedding_parameters,
        "share_of_teacher": arch.num_parameters / whole.num_parameters,
    }


def _config_or_folder(model: str, family: str | None) -> Path:
    path = Path(model).expanduser()
    return path if path.suffix == ".json" else resolve_teacher(model, weights=False, family=family)


def calibrate(recipe: Recipe, out: Path, overwrite: bool) -> dict[str, Any]:
    """Write `calibration.safetensors` and `importance.safetensors` of a teacher into the folder `out`."""
    inputs = _inputs(recipe, out, overwrite, mark="importance.safetensors")
    _ = inputs.statistics
    with whole_folder(out) as staging:
        importance = write_statistics(staging, inputs)
    return {"out": str(out), "importance": {axis: list(scores.shape) for axis, scores in importance.items()}}


def search(recipe: Recipe, out: Path, overwrite: bool) -> dict[str, Any]:
    """Write `arch.json`, `candidates.jsonl`, `search.json` and a plot for a teacher and a budget into the folder `out`.

    An interrupted search with the same inputs continues where it stood, in a hidden folder beside `out`. Under
    torchrun, candidates are shared out to the processes.

    Raises:
        UserError: the budget is not understood, or no shape meets it.
    """
    inputs = _inputs(recipe, out, overwrite, mark="candidates.jsonl", one_process=False)
    shapes, budget = shapes_within(inputs)
    with _resumable(inputs, out, "search", []) as (work, world):
        if world.is_main and not (work / "importance.safetensors").exists():
            write_statistics(work, inputs, removed_layers(shapes))
        world.barrier()
        arch = find_shape(inputs, load_file(work / "importance.safetensors"), shapes, budget, work, world)
        if world.is_main:
            with whole_folder(out) as staging:
                for name in ("candidates.jsonl", "search.json"):
                    shutil.copyfile(work / name, staging / name)
                write_json(staging / "arch.json", arch.to_dict())
                write_plot(staging)
    return {"out": str(out), **shape(arch)}


def prune(
    recipe: Recipe, sizes: dict[str, int], arch_file: Path | None, importance: Path | None, out: Path, overwrite: bool
) -> dict[str, Any]:
    """Write a pruned Hugging Face folder at `out`, of the sizes given, of `arch_file`'s, or of the best shape.

    Importance is read from a file that `calibrate` wrote, or measured on the recipe's data.

    Raises:
        UserError: the shape cannot be cut out of the teacher.
    """
    inputs = _inputs(recipe, out, overwrite, mark="config.json")
    teacher = inputs.teacher
    arch = None
    if arch_file:
        arch = read_arch(arch_file, teacher.arch)
    elif sizes:
        arch = teacher.arch.resized(**sizes)
        teacher.arch.require_prunable_to(arch)
    else:
        shapes, budget = shapes_within(inputs)
    require_space(out, teacher.num_bytes)
    removed = {teacher.arch.axis_size("layer") - arch.axis_size("layer")} if arch else removed_layers(shapes)
    scores = read_importance(importance, teacher) if importance else inputs.importance(removed)
    if arch is None:
        with TemporaryDirectory() as folder:
            arch = find_shape(inputs, scores, shapes, budget, Path(folder), World())
    write_pruned_folder(inputs, arch, scores, out)
    return {"out": str(out), **shape(arch)}


def distill(recipe: Recipe, student: str, out: Path, overwrite: bool) -> dict[str, Any]:
    """Train the model `student` on the recipe's teacher and write a Hugging Face folder at `out`.

    An interrupted run with the same inputs continues from its last checkpoint, in a hidden folder beside `out`.

    Raises:
        UserError: the two do not share a tokenizer, or the training cannot be done.
    """
    pruned = open_teacher(student)
    inputs = _inputs(recipe, out, overwrite, "config.json", pruned.folder, one_process=False)
    require_one_vocabulary(inputs.teacher, pruned)
    _train(inputs, pruned, out, lambda world: teacher_of(inputs, pruned, world))
    return {"out": str(out), **shape(pruned.arch)}


def correct(recipe: Recipe, out: Path, overwrite: bool) -> dict[str, Any]:
    """Train the recipe's teacher itself on the recipe's data and write a Hugging Face folder at `out`.

    A teacher that has not seen such data teaches it badly ("teacher correction", arXiv 2408.11796, section 2). An
    interrupted run continues as in `distill`.

    Raises:
        UserError: the training cannot be done.
    """
    inputs = _inputs(recipe, out, overwrite, "config.json", one_process=False)
    _train(inputs, inputs.teacher, out, lambda _: None)
    return {"out": str(out), **shape(inputs.teacher.arch)}


def _train(inputs: Session, student: Checkpoint, out: Path, teacher: Callable[[World], Teacher | None]) -> None:
    with _resumable(inputs, out, "distill", [student.fingerprint()]) as (work, world):
        train(inputs, teacher(world), student, work / "student", work, world)
        if world.is_main:
            shutil.copyfile(work / "metrics.jsonl", work / "student" / "metrics.jsonl")
            if (work / "tensorboard").exists():
                shutil.copytree(work / "tensorboard", work / "student" / "tensorboard")
            publish_folder(work / "student", out)


@contextmanager
def _resumable(inputs: Session, out: Path, verb: str, sources: list[str]) -> Iterator[tuple[Path, World]]:
    """A hidden folder beside `out` that what is interrupted continues from, emptied unless it is of the same inputs."""
    identity = {
        "recipe": inputs.recipe.model_dump(mode="json"),
        "sources": [inputs.teacher.fingerprint(), *sources, inputs.splits.fingerprint()],
    }
    work = out.with_name(f".{out.name}.{verb}")
    with parents_of(out), joined_world(inputs.device) as world:
        if world.is_main and not ((work / "run.json").exists() and read_json(work / "run.json") == identity):
            empty_folder(work)
            write_json(work / "run.json", identity)
        world.barrier()
        can_continue = [work / name for name in ("checkpoint", "candidates.jsonl")]
        try:
            yield work, world
            world.barrier()
            can_continue = []
        except UserError:
            raise
        except BaseException:  # interrupted: what has been measured counts as well
            can_continue.append(work / "importance.safetensors")
            raise
        finally:
            if world.is_main and not any(path.exists() for path in can_continue):
                shutil.rmtree(work, ignore_errors=True)


def _inputs(recipe: Recipe, out: Path, overwrite: bool, mark: str, *folders: Path, one_process: bool = True) -> Session:
    """The inputs of a stage that runs alone, and whether its result may go to `out`."""
    if one_process:
        require_one_process()
    inputs = Session(recipe)
    require_new_folder(out, overwrite, mark, (inputs.teacher.folder, *folders))
    _ = inputs.dtype
    return inputs
