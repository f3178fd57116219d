"""The stages one by one, each a verb of the command line."""

import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file

from minitron.data.blocks import load_tokenizer, read_blocks
from minitron.distill.distributed import World, joined_world
from minitron.distill.teacher import Teacher
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
from minitron.inputs import Inputs
from minitron.measure.agreement import measure_agreement
from minitron.measure.answers import Answerer
from minitron.measure.instruct import run_benches
from minitron.measure.judge import Judge
from minitron.measure.peak import peak_memory
from minitron.measure.speed import DECODED_TOKENS, alternate, figures_of
from minitron.measure.tasks import load_lm, plan_tasks, run_tasks, tasks_data
from minitron.model.arch import Arch
from minitron.model.causal import load_model
from minitron.model.checkpoint import Checkpoint, has_weights, open_checkpoint, read_config
from minitron.model.memory import DTYPE_BYTES, attention_windows, memory
from minitron.model.source import open_teacher, resolve_teacher
from minitron.model.streaming import Sampling, Speaker
from minitron.present.chat import serve, talk
from minitron.present.plot import write_plot
from minitron.progress import Progress
from minitron.recipe import Recipe, data_in_words, parse_context
from minitron.run import versions
from minitron.search.rank import removed_layers, shapes_within
from minitron.search.rank import search as find_shape
from minitron.stages import (
    measure,
    read_arch,
    read_importance,
    require_one_process,
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
    _require_one_vocabulary(inputs.teacher, pruned)
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


def _train(inputs: Inputs, student: Checkpoint, out: Path, teacher: Callable[[World], Teacher | None]) -> None:
    with _resumable(inputs, out, "distill", [student.fingerprint()]) as (work, world):
        train(inputs, teacher(world), student, work / "student", work, world)
        if world.is_main:
            shutil.copyfile(work / "metrics.jsonl", work / "student" / "metrics.jsonl")
            if (work / "tensorboard").exists():
                shutil.copytree(work / "tensorboard", work / "student" / "tensorboard")
            publish_folder(work / "student", out)


@contextmanager
def _resumable(inputs: Inputs, out: Path, verb: str, sources: list[str]) -> Iterator[tuple[Path, World]]:
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


def evaluate(
    recipe: Recipe, max_tokens: int | None, stride: int | None = None, against: str | None = None
) -> dict[str, Any]:
    """Perplexity and bits per byte of the recipe's teacher on its data, the first `max_tokens` in the seed's order.

    With the seed, context and tokens of a run, these are the blocks that the run kept for its evaluation. With a
    `stride`, windows slide over them; with another model, how far the one is from the other is measured too.

    Raises:
        UserError: the stride is above the context.
    """
    require_one_process()
    inputs = Inputs(recipe)
    _ = inputs.dtype
    tokenizer, vocab_size = load_tokenizer(inputs.teacher.folder), inputs.teacher.arch.sizes["vocab_size"]
    blocks = read_blocks(recipe.data, tokenizer, vocab_size, inputs.context, recipe.seed, max_tokens)
    if stride is not None:
        if not 0 < stride < inputs.context:
            raise UserError(f"--stride {stride}: accepted: 1 to {inputs.context - 1}, below the context")
        blocks = blocks.sliding(stride)
    found = measure(inputs, inputs.teacher, blocks, "evaluate")
    if against is not None:
        other = open_teacher(against)
        _require_one_vocabulary(other, inputs.teacher)
        with Progress("compare", blocks.num_tokens) as progress:
            teacher = load_model(other, inputs.device, inputs.dtype)
            found |= measure_agreement(inputs.model, teacher, blocks, progress.advance).to_dict()
    return {**found, "stride": stride, "against": against, "data": data_in_words(recipe.data), "seed": recipe.seed}


def evaluate_tasks(
    recipe: Recipe, names: list[str], limit: int | None, data: str | None, runs_code: bool,
    answers: Path | None = None, judge: tuple[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Benchmarks of the recipe's teacher, by lm-eval and of chats; what cannot be had is named with the reason.

    Answers to chats are kept in the folder `answers`, if one is given, and rated by a `judge`: its endpoint and model.

    Raises:
        UserError: a name is no task, none can be run, or lm-eval is not installed.
    """
    require_one_process()
    inputs, folder = Inputs(recipe), tasks_data(data)
    plan = plan_tasks(names, limit, folder, runs_code)
    for name, reason in plan.skipped.items():
        print(f"skipped {name}: {reason}", file=sys.stderr)
    dtype, found = str(inputs.dtype).removeprefix("torch."), versions() | {"lm_eval": version("lm_eval")}
    model = load_lm(inputs.teacher.folder, str(inputs.device), dtype)
    results: dict[str, Any] = {}
    if plan.tasks:
        with Progress(f"tasks {', '.join(task.name for task in plan.tasks)}", len(plan.tasks), "tasks") as progress:
            results |= run_tasks(model, plan, folder, recipe.seed, progress.advance)
    if plan.benches:
        identity = {"model": inputs.teacher.fingerprint(), "seed": recipe.seed, "dtype": dtype, "versions": found}
        answerer = Answerer(model, "-".join(Path(recipe.teacher).parts[-2:]), recipe.seed)
        results |= run_benches(
            plan.benches, answerer, folder, answers, identity, limit, Judge(*judge) if judge else None
        )
    return {
        "tasks": results,
        "skipped": dict(plan.skipped),
        "limit": plan.limit,
        "seed": recipe.seed,
        "versions": found,
    }


def bench(recipe: Recipe, against: str | None, batches: list[int], contexts: list[int], repeats: int) -> dict[str, Any]:
    """Speed and peak memory of the recipe's model, beside those of another, at every batch and context.

    A run directory stands for its student, and is compared with its teacher. The models take turns; ratios are of
    turns next to each other.

    Raises:
        UserError: a context is above what a model was made for.
    """
    require_one_process()
    recipe, against = _of_run(recipe, against)
    inputs = Inputs(recipe)
    folders = {"model": inputs.teacher} | ({"against": open_teacher(against)} if against else {})
    for checkpoint in folders.values():
        most = getattr(checkpoint.config, "max_position_embeddings", None) or max(contexts)
        if max(contexts) > most:
            raise UserError(f"context {max(contexts)} is above the {most} tokens that {checkpoint.folder} was made for")
    models = {name: load_model(checkpoint, inputs.device, inputs.dtype) for name, checkpoint in folders.items()}
    grid = [(batch, context) for batch in batches for context in contexts]
    rows = []
    with Progress("bench", len(grid) * len(models) * (repeats + 2), "measurements") as progress:
        for batch, context in grid:
            speeds = alternate(models, batch, context, repeats, progress.advance)
            peaks = {}
            for name, checkpoint in folders.items():
                peaks[name] = peak_memory(checkpoint.folder, batch, context, inputs.device, inputs.dtype)
                progress.advance(1)
            rows.append({"batch": batch, "context": context, **figures_of(speeds, peaks)})
    return {
        **{name: str(checkpoint.folder) for name, checkpoint in folders.items()},
        "warm_up": 1, "repeats": repeats, "decoded_tokens": DECODED_TOKENS, "device": str(inputs.device),
        "dtype": str(inputs.dtype).removeprefix("torch."), "threads": torch.get_num_threads(), "versions": versions(),
        "rows": rows,
    }  # fmt: skip


def chat(recipe: Recipe, against: str | None, sampling: Sampling | None, host: str, port: int | None) -> None:
    """Talk to the recipe's model, a run's student beside its teacher, on a page; or with `sampling` on the terminal.

    Raises:
        UserError: a model cannot be read, the page cannot be served, or Gradio is missing.
    """
    require_one_process()
    recipe, against = _of_run(recipe, against)
    inputs = Inputs(recipe)
    checkpoints = {"teacher": open_teacher(against)} if against else {}
    checkpoints["student" if against else "model"] = inputs.teacher
    speakers = {
        name: Speaker(load_model(checkpoint, inputs.device, inputs.dtype), load_tokenizer(checkpoint.folder))
        for name, checkpoint in checkpoints.items()
    }
    if sampling:
        talk(speakers, sampling)
    else:
        serve(speakers, f"minitron: {inputs.teacher.folder.parent.name}", host, port)


def _of_run(recipe: Recipe, against: str | None) -> tuple[Recipe, str | None]:
    """Of a run directory its student, to be held against its teacher."""
    run = Path(recipe.teacher).expanduser()
    if not (run / "run.json").is_file():
        return recipe, against
    if not (run / "student").is_dir():
        raise UserError(f"{run} has no student yet")
    return recipe.model_copy(update={"teacher": str(run / "student")}), against or str(run / "teacher")


def _inputs(recipe: Recipe, out: Path, overwrite: bool, mark: str, *folders: Path, one_process: bool = True) -> Inputs:
    """The inputs of a stage that runs alone, and whether its result may go to `out`."""
    if one_process:
        require_one_process()
    inputs = Inputs(recipe)
    require_new_folder(out, overwrite, mark, (inputs.teacher.folder, *folders))
    _ = inputs.dtype
    return inputs


def _require_one_vocabulary(teacher: Checkpoint, student: Checkpoint) -> None:
    """The same tokens under the same numbers; the models may have more entries than these, as padding."""
    tokens, of_student = (load_tokenizer(model.folder).get_vocab() for model in (teacher, student))
    if tokens != of_student:
        differing = len(tokens.items() ^ of_student.items())
        raise UserError(f"teacher and student have different tokenizers: {differing} tokens are not the same")
    smaller = min(model.arch.axis_size("vocab") for model in (teacher, student))
    if (highest := max(tokens.values(), default=0)) >= smaller:
        raise UserError(f"the tokenizer knows token {highest}, one of the models {smaller} tokens only")
