"""What is measured of a model, and talking to it, each a verb of the command line."""

import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from minitron.data.blocks import load_tokenizer, read_blocks
from minitron.errors import UserError
from minitron.evaluation.agreement import measure_agreement
from minitron.evaluation.generation import Sampling, Speaker
from minitron.evaluation.peak_memory import peak_memory
from minitron.evaluation.speed import DECODED_TOKENS, alternate, figures_of
from minitron.files import read_json, write_json
from minitron.harness.answers import Answerer
from minitron.harness.benches import run_benches
from minitron.harness.judge import Judge
from minitron.harness.lm_eval_model import load_lm
from minitron.harness.task_files import tasks_data
from minitron.harness.tasks import Plan, fitting, plan_tasks, run_tasks
from minitron.model.language_model import load_model
from minitron.model.source import open_teacher
from minitron.progress import Progress
from minitron.recipe import Recipe, data_in_words
from minitron.reports.chat import serve, talk
from minitron.run import versions
from minitron.session import Session
from minitron.stages import (
    measure,
    require_one_process,
    require_one_vocabulary,
)


def evaluate(
    recipe: Recipe, max_tokens: int | None, stride: int | None = None, against: str | None = None
) -> dict[str, Any]:
    """Perplexity and bits per byte of the recipe's model on its data, the first `max_tokens` in the seed's order.

    With the seed, context and tokens of a run, these are the blocks that the run kept for its evaluation. With a
    `stride`, windows slide over them; with another model, how far the one is from the other is measured too. Of a
    run directory, the student is measured, and how far it is from its teacher.

    Raises:
        UserError: the stride is above the context.
    """
    require_one_process()
    recipe, against = _of_run(recipe, against)
    inputs = Session(recipe)
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
        require_one_vocabulary(other, inputs.teacher)
        with Progress("compare", blocks.num_tokens) as progress:
            teacher = load_model(other, inputs.device, inputs.dtype)
            found |= measure_agreement(inputs.model, teacher, blocks, progress.advance).to_dict()
    return {**found, "stride": stride, "against": against, "data": data_in_words(recipe.data), "seed": recipe.seed}


def evaluate_tasks(
    recipe: Recipe, names: list[str], limit: int | None, data: str | None, runs_code: bool,
    answers: Path | None = None, judge: tuple[str, str] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Benchmarks of the recipe's model, by lm-eval and others; what cannot be had is named with the reason.

    Of a run directory, student and teacher are measured, and `tasks.json` there keeps the figures for its report.
    Answers to chats are kept in the folder `answers`, if one is given, and rated by a `judge`: its endpoint and model.

    Raises:
        UserError: a name is no task, none can be run, or lm-eval is not installed.
    """
    require_one_process()
    folder = tasks_data(data)
    plan = plan_tasks(names, limit, folder, runs_code)
    _say_skipped(plan.skipped)
    rater = Judge(*judge) if judge else None
    run = _run_of(recipe)
    if run is None:
        return _tasks_of(recipe, plan, folder, answers, rater)
    student, teacher = _of_run(recipe, None)
    assert teacher is not None
    places = [answers / name if answers else None for name in ("student", "teacher")]
    record = _tasks_of(student, plan, folder, places[0], rater)
    of_teacher = _tasks_of(recipe.model_copy(update={"teacher": teacher}), plan, folder, places[1], rater)
    record["teacher_tasks"] = of_teacher["tasks"]
    before = read_json(run / "tasks.json") if (run / "tasks.json").exists() else {}
    if all(before.get(key) == record[key] for key in ("limit", "seed", "versions")):  # more of the same
        for key in ("tasks", "teacher_tasks"):
            record[key] = before[key] | record[key]
    write_json(run / "tasks.json", record)
    return record


def _tasks_of(
    recipe: Recipe, plan: Plan, data: Path | None, answers: Path | None, judge: Judge | None
) -> dict[str, Any]:
    inputs, found = Session(recipe), versions() | {"lm_eval": version("lm_eval")}
    dtype = str(inputs.dtype).removeprefix("torch.")
    model = load_lm(inputs.teacher.folder, str(inputs.device), dtype)
    asked, plan = plan, fitting(plan, model.max_length)
    _say_skipped({name: reason for name, reason in plan.skipped.items() if name not in asked.skipped})
    results = run_tasks(model, plan, data, recipe.seed) if plan.tasks else {}
    if plan.benches:
        identity = {"model": inputs.teacher.fingerprint(), "seed": recipe.seed, "dtype": dtype, "versions": found}
        answerer = Answerer(model, "-".join(Path(recipe.teacher).parts[-2:]), recipe.seed)
        results |= run_benches(plan.benches, answerer, data, answers, identity, plan.limit, judge)
    return {"tasks": results, "skipped": dict(plan.skipped), "limit": plan.limit, "seed": recipe.seed,
            "versions": found}  # fmt: skip


def _say_skipped(skipped: Mapping[str, str]) -> None:
    for name, reason in skipped.items():
        print(f"skipped {name}: {reason}", file=sys.stderr)


def bench(recipe: Recipe, against: str | None, batches: list[int], contexts: list[int], repeats: int) -> dict[str, Any]:
    """Speed and peak memory of the recipe's model, beside those of another, at every batch and context.

    A run directory stands for its student, and is compared with its teacher; `bench.json` there keeps the figures for
    its report. The models take turns; ratios are of turns next to each other.

    Raises:
        UserError: a context is above what a model was made for.
    """
    require_one_process()
    run = _run_of(recipe) if against is None else None
    recipe, against = _of_run(recipe, against)
    inputs = Session(recipe)
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
    record = {
        "run": str(run) if run else None, **{name: str(checkpoint.folder) for name, checkpoint in folders.items()},
        "warm_up": 1, "repeats": repeats, "decoded_tokens": DECODED_TOKENS, "device": str(inputs.device),
        "dtype": str(inputs.dtype).removeprefix("torch."), "threads": torch.get_num_threads(), "versions": versions(),
        "rows": rows,
    }  # fmt: skip
    if run is not None:
        write_json(run / "bench.json", record)
    return record


def chat(recipe: Recipe, against: str | None, sampling: Sampling | None, host: str, port: int | None) -> None:
    """Talk to the recipe's model, a run's student beside its teacher, on a page; or with `sampling` on the terminal.

    Raises:
        UserError: a model cannot be read, the page cannot be served, or Gradio is missing.
    """
    require_one_process()
    recipe, against = _of_run(recipe, against)
    inputs = Session(recipe)
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


def _run_of(recipe: Recipe) -> Path | None:
    """The run directory that is given instead of a model."""
    run = Path(recipe.teacher).expanduser()
    return run if (run / "run.json").is_file() else None


def _of_run(recipe: Recipe, against: str | None) -> tuple[Recipe, str | None]:
    """Of a run directory its student, to be held against its teacher."""
    run = _run_of(recipe)
    if run is None:
        return recipe, against
    if not (run / "student").is_dir():
        raise UserError(f"{run} has no student yet")
    return recipe.model_copy(update={"teacher": str(run / "student")}), against or str(run / "teacher")
