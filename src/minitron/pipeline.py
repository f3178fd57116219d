"""The order of the stages. `compress` is the main job; the other functions run one stage alone."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from minitron.data.blocks import Blocks, load_tokenizer, read_blocks
from minitron.distill.distributed import World, joined_world, loading_device, num_ranks
from minitron.distill.teacher import Learning, Live, Teacher, stored
from minitron.distill.train import distill
from minitron.errors import UserError
from minitron.files import (
    empty_folder,
    parents_of,
    publish_folder,
    read_json,
    require_new_folder,
    require_space,
    whole_file,
    whole_folder,
    write_json,
)
from minitron.inputs import Inputs
from minitron.measure.perplexity import measure_perplexity
from minitron.model.arch import Arch
from minitron.model.causal import load_model, read_head
from minitron.model.checkpoint import Checkpoint, has_weights, open_checkpoint, open_safetensors, read_config
from minitron.model.memory import DTYPE_BYTES, attention_windows, memory
from minitron.model.source import open_teacher, resolve_teacher
from minitron.present.card import write_card
from minitron.present.report import write_report
from minitron.progress import Progress
from minitron.prune.calibrate import STREAM_MOMENT
from minitron.prune.importance import Importance, score_shape
from minitron.prune.repair import mended
from minitron.prune.rounds import score_in_rounds
from minitron.prune.trim import cut_to, write_pruned
from minitron.recipe import Recipe, data_in_words, parse_context
from minitron.run import Run, open_run


def compress(recipe: Recipe, out: Path, overwrite: bool = False) -> dict[str, Any]:
    """Make a smaller model of the recipe's teacher in the run directory `out`; return what `eval.json` holds.

    A finished run is read; an interrupted one continues after its last finished stage, or inside the search,
    the distillation and the evaluation where they stood.

    Raises:
        UserError: something asked for cannot be done; nothing is left behind that was not finished.
    """
    _require_one_process()
    run = open_run(out, recipe, overwrite)
    if run.is_finished and run.path("report.html").exists():
        return dict(read_json(run.path("eval.json")))
    inputs = Inputs(recipe)
    _check(run, inputs)
    try:
        run.begin()
        _link_teacher(run, inputs.teacher)
        if not run.is_done("calibrate"):
            with run.stage("calibrate"):
                _write_statistics(out, inputs)
        importance = load_file(run.path("importance.safetensors"))
        if not run.is_done("search"):
            with run.stage("search"):
                arch = inputs.search(importance, run.path("candidates.jsonl"))
                write_json(run.path("arch.json"), arch.to_dict())
        arch = read_arch(run.path("arch.json"), inputs.teacher.arch)
        if not run.is_done("prune"):
            with run.stage("prune"):
                _write_pruned(inputs, arch, importance, run.path("pruned"))
        if not run.is_done("distill"):
            with run.stage("distill"):
                pruned = open_checkpoint(run.path("pruned"))
                teacher = _teacher(inputs, pruned, World())
                _distill(inputs, teacher, pruned, run.path("student"), work=out, world=World())
        shutil.rmtree(run.path("checkpoint"), ignore_errors=True)
        if not run.is_done("evaluate"):
            with run.stage("evaluate"):
                results = _evaluate_run(run, inputs)
                student = open_checkpoint(run.path("student")).arch
                write_card(run.path("student"), run.record, inputs.teacher.arch, student, results)
        if not run.path("report.html").exists():
            write_report(out)
    finally:
        run.clean()
    return dict(read_json(run.path("eval.json")))


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
    num_tokens = parse_context(context)
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
        **_shape(arch),
        "num_non_embedding_parameters": arch.num_non_embedding_parameters,
        "share_of_teacher": arch.num_parameters / whole.num_parameters,
    }


def _config_or_folder(model: str, family: str | None) -> Path:
    path = Path(model).expanduser()
    return path if path.suffix == ".json" else resolve_teacher(model, weights=False, family=family)


def calibrate_alone(recipe: Recipe, out: Path, overwrite: bool) -> dict[str, Any]:
    """Write `calibration.safetensors` and `importance.safetensors` of a teacher into the folder `out`."""
    inputs = _inputs_alone(recipe, out, overwrite, mark="importance.safetensors")
    _ = inputs.statistics
    with whole_folder(out) as staging:
        importance = _write_statistics(staging, inputs)
    return {"out": str(out), "importance": {axis: list(scores.shape) for axis, scores in importance.items()}}


def search_alone(recipe: Recipe, out: Path, overwrite: bool) -> dict[str, Any]:
    """Write `candidates.jsonl` and `arch.json` for a teacher and a budget into the folder `out`."""
    inputs = _inputs_alone(recipe, out, overwrite, mark="candidates.jsonl")
    _ = inputs.candidates
    importance = inputs.importance
    with whole_folder(out) as staging:
        arch = inputs.search(importance, staging / "candidates.jsonl")
        write_json(staging / "arch.json", arch.to_dict())
    return {"out": str(out), **_shape(arch)}


def prune_alone(
    recipe: Recipe, sizes: dict[str, int], arch_file: Path | None, importance: Path | None, out: Path, overwrite: bool
) -> dict[str, Any]:
    """Write a pruned Hugging Face folder at `out`, of the sizes given, of `arch_file`'s, or of the best shape.

    Importance is read from a file that `calibrate` wrote, or measured on the recipe's data.

    Raises:
        UserError: the shape cannot be cut out of the teacher.
    """
    inputs = _inputs_alone(recipe, out, overwrite, mark="config.json")
    teacher = inputs.teacher
    arch = None
    if arch_file:
        arch = read_arch(arch_file, teacher.arch)
    elif sizes:
        arch = teacher.arch.resized(**sizes)
        teacher.arch.require_prunable_to(arch)
    else:
        _ = inputs.candidates
    require_space(out, teacher.num_bytes)
    if arch is not None:
        removed = teacher.arch.axis_size("layer") - arch.axis_size("layer")
        inputs = replace(inputs, removed=frozenset({removed}))
    scores = _read_importance(importance, teacher) if importance else inputs.importance
    if arch is None:
        with TemporaryDirectory() as folder:
            arch = inputs.search(scores, Path(folder) / "candidates.jsonl")
    _write_pruned(inputs, arch, scores, out)
    return {"out": str(out), **_shape(arch)}


def distill_alone(recipe: Recipe, student: str, out: Path, overwrite: bool) -> dict[str, Any]:
    """Train the model `student` on the recipe's teacher and write a Hugging Face folder at `out`.

    An interrupted run with the same inputs continues from its last checkpoint, in a hidden folder beside `out`.

    Raises:
        UserError: the two do not share a tokenizer, or the training cannot be done.
    """
    pruned = open_teacher(student)
    inputs = _inputs_alone(recipe, out, overwrite, "config.json", pruned.folder, one_process=False)
    _require_one_vocabulary(inputs.teacher, pruned)
    _train_alone(inputs, pruned, out, lambda world: _teacher(inputs, pruned, world))
    return {"out": str(out), **_shape(pruned.arch)}


def correct_alone(recipe: Recipe, out: Path, overwrite: bool) -> dict[str, Any]:
    """Train the recipe's teacher itself on the recipe's data and write a Hugging Face folder at `out`.

    A teacher that has not seen such data teaches it badly ("teacher correction", arXiv 2408.11796, section 2). An
    interrupted run continues as in `distill_alone`.

    Raises:
        UserError: the training cannot be done.
    """
    inputs = _inputs_alone(recipe, out, overwrite, "config.json", one_process=False)
    _train_alone(inputs, inputs.teacher, out, lambda _: None)
    return {"out": str(out), **_shape(inputs.teacher.arch)}


def _train_alone(inputs: Inputs, student: Checkpoint, out: Path, teacher: Callable[[World], Teacher | None]) -> None:
    recipe = inputs.recipe
    identity = {
        "recipe": recipe.model_dump(mode="json"),
        "sources": [inputs.teacher.fingerprint(), student.fingerprint(), inputs.splits.fingerprint()],
    }
    work = out.with_name(f".{out.name}.distill")
    with parents_of(out), joined_world(inputs.device) as world:
        if world.is_main and not ((work / "run.json").exists() and read_json(work / "run.json") == identity):
            empty_folder(work)
            write_json(work / "run.json", identity)
        world.barrier()
        try:
            _distill(inputs, teacher(world), student, work / "student", work, world)
            if world.is_main:
                shutil.copyfile(work / "metrics.jsonl", work / "student" / "metrics.jsonl")
                if (work / "tensorboard").exists():
                    shutil.copytree(work / "tensorboard", work / "student" / "tensorboard")
                publish_folder(work / "student", out)
                shutil.rmtree(work)
        finally:
            if world.is_main and not (work / "checkpoint").exists():  # nothing to continue from
                shutil.rmtree(work, ignore_errors=True)


def evaluate_alone(recipe: Recipe, max_tokens: int | None) -> dict[str, Any]:
    """Perplexity and bits per byte of the recipe's teacher on its data, the first `max_tokens` in the seed's order.

    With the seed, context and tokens of a run, these are the blocks that the run kept for its evaluation.
    """
    _require_one_process()
    inputs = Inputs(recipe)
    _ = inputs.dtype
    tokenizer, vocab_size = load_tokenizer(inputs.teacher.folder), inputs.teacher.arch.sizes["vocab_size"]
    blocks = read_blocks(recipe.data, tokenizer, vocab_size, inputs.context, recipe.seed, max_tokens)
    return {
        **_measure(inputs, inputs.teacher, blocks, "evaluate"),
        "data": data_in_words(recipe.data),
        "seed": recipe.seed,
    }


def read_arch(path: Path, teacher: Arch) -> Arch:
    """The shape in an `arch.json`, checked to be one that the teacher can be cut to."""
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    values = read_json(path)
    arch = teacher.resized(
        **{
            key: size
            for key, size in values.items()
            if key not in {"model_type", *(teacher.flags.keys() - teacher.sizes.keys())}
        }
    )
    teacher.require_prunable_to(arch)
    return arch


def _require_one_process() -> None:
    if num_ranks() > 1:
        raise UserError("only distill and correct run under torchrun; run this one in one process")


def _inputs_alone(
    recipe: Recipe, out: Path, overwrite: bool, mark: str, *folders: Path, one_process: bool = True
) -> Inputs:
    """The inputs of a stage that runs alone, and whether its result may go to `out`."""
    if one_process:
        _require_one_process()
    inputs = Inputs(recipe)
    require_new_folder(out, overwrite, mark, (inputs.teacher.folder, *folders))
    _ = inputs.dtype
    return inputs


def _check(run: Run, inputs: Inputs) -> None:
    """Look at everything that can be wrong before anything is written."""
    _ = inputs.dtype
    largest = max(arch.num_parameters for arch in inputs.candidates)
    with Progress("check teacher", inputs.teacher.num_bytes, "bytes") as progress:
        run.bind("teacher", inputs.teacher.fingerprint(progress.advance))
    run.bind("data", inputs.splits.fingerprint())
    if run.is_begun:
        return
    # Pruned and student in the teacher's dtype; two checkpoints of weights and two AdamW moments in float32.
    require_space(run.folder, 2 * inputs.teacher.num_bytes + 2 * 12 * largest)


def _require_one_vocabulary(teacher: Checkpoint, student: Checkpoint) -> None:
    """The same tokens under the same numbers; the models may have more entries than these, as padding."""
    tokens, of_student = (load_tokenizer(model.folder).get_vocab() for model in (teacher, student))
    if tokens != of_student:
        differing = len(tokens.items() ^ of_student.items())
        raise UserError(f"teacher and student have different tokenizers: {differing} tokens are not the same")
    smaller = min(model.arch.axis_size("vocab") for model in (teacher, student))
    if (highest := max(tokens.values(), default=0)) >= smaller:
        raise UserError(f"the tokenizer knows token {highest}, one of the models {smaller} tokens only")


def _link_teacher(run: Run, teacher: Checkpoint) -> None:
    link = run.path("teacher")
    if not link.is_symlink():
        link.symlink_to(teacher.folder.absolute(), target_is_directory=True)


def _write_statistics(folder: Path, inputs: Inputs) -> Importance:
    importance = inputs.importance
    sums = {key: value for key, value in inputs.statistics.items() if key != STREAM_MOMENT}  # that goes with the scores
    for name, tensors in (("calibration", sums), ("importance", importance)):
        with whole_file(folder / f"{name}.safetensors") as staging:
            entries = {key: value.contiguous() for key, value in tensors.items()}
            save_file(entries, staging, metadata={"teacher": inputs.teacher.identity()})
    return importance


def _read_importance(path: Path, teacher: Checkpoint) -> Importance:
    path = path / "importance.safetensors" if path.is_dir() else path
    file = open_safetensors(path)
    importance: Importance = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for axis in teacher.arch.prunable_axes:
        found = list(importance[axis].shape) if axis in importance else None
        if found != score_shape(teacher.arch, axis):
            raise UserError(f"{path} is not the importance of this teacher: axis {axis} has shape {found}")
    if (file.metadata() or {}).get("teacher") != teacher.identity():
        raise UserError(f"{path} is not the importance of this teacher: it was measured on other weights")
    return importance


def _write_pruned(inputs: Inputs, arch: Arch, importance: Importance, folder: Path) -> None:
    teacher, recipe = inputs.teacher, inputs.recipe.prune
    if recipe.rounds > 1:
        importance = score_in_rounds(
            teacher, arch, importance, recipe.rounds, inputs.calibration_blocks, inputs.recipe.calibration,
            inputs.device, inputs.dtype, folder.parent,
        )  # fmt: skip
    with whole_folder(folder) as staging:
        write_pruned(
            teacher, cut_to(arch, teacher, importance, recipe),
            lambda cut: mended(teacher, cut, inputs.calibration_blocks, recipe, inputs.device, inputs.dtype), staging,
        )  # fmt: skip


def _distill(inputs: Inputs, teacher: Teacher | None, pruned: Checkpoint, out: Path, work: Path, world: World) -> None:
    distill(
        teacher, pruned, inputs.splits.train, inputs.splits.heldout, inputs.recipe.distill,
        out, work, inputs.recipe.seed, inputs.device, inputs.dtype, world,
    )  # fmt: skip


def _teacher(inputs: Inputs, pruned: Checkpoint, world: World) -> Teacher:
    """The teacher itself, or what was stored of it."""
    recipe, checkpoint = inputs.recipe.distill, inputs.teacher
    where = loading_device(inputs.device)
    if recipe.correction.trains != "nothing":
        # A model of its own: others go on measuring the teacher as it was.
        model = load_model(checkpoint, where, torch.promote_types(inputs.dtype, torch.float32))
        return Learning(model, recipe.correction, inputs.recipe.seed, world)
    if recipe.teacher_states is None:
        return Live(inputs.model if where == inputs.device else load_model(checkpoint, where, inputs.dtype))
    if recipe.stored == "top_k" and pruned.arch.axis_size("vocab") < checkpoint.arch.axis_size("vocab"):
        raise UserError("distill.stored top_k needs a student with all of the teacher's tokens")
    identity = {
        "teacher": checkpoint.fingerprint(),
        "blocks": inputs.splits.train.fingerprint(),
        "dtype": str(inputs.dtype),
    }
    head = read_head(checkpoint, inputs.device, inputs.dtype)
    return stored(Path(recipe.teacher_states), identity, lambda: inputs.model, head, inputs.splits.train, recipe, world)


def _evaluate_run(run: Run, inputs: Inputs) -> dict[str, Any]:
    """Measure teacher, pruned and student on the blocks that no other stage has seen."""
    path = run.path("eval.json")
    results = read_json(path) if path.exists() else {}
    for name in ("teacher", "pruned", "student"):
        if name not in results:
            checkpoint = inputs.teacher if name == "teacher" else open_checkpoint(run.path(name))
            results[name] = _measure(inputs, checkpoint, inputs.splits.evaluation, f"evaluate {name}")
            write_json(path, results)
    return dict(results)


def _measure(inputs: Inputs, checkpoint: Checkpoint, blocks: Blocks, stage: str) -> dict[str, Any]:
    model = inputs.model if checkpoint is inputs.teacher else load_model(checkpoint, inputs.device, inputs.dtype)
    with Progress(stage, blocks.num_tokens) as progress:
        figures = measure_perplexity(model, blocks, progress.advance)
    return {
        "num_parameters": checkpoint.arch.num_parameters,
        "num_non_embedding_parameters": checkpoint.arch.num_non_embedding_parameters,
        **figures.to_dict(),
    }


def _shape(arch: Arch) -> dict[str, Any]:
    return {"num_parameters": arch.num_parameters, "arch": arch.to_dict()}
