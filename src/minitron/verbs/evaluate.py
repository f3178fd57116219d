"""Measure how good a model is: perplexity on text, or benchmarks."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron.errors import UserError
from minitron.verbs.results import Measured

if TYPE_CHECKING:
    from minitron.recipe import RecipeSource


def evaluate(
    model: str | Path,
    *,
    max_tokens: str | int | None = None,
    stride: int | None = None,
    against: str | Path | None = None,
    recipe: "RecipeSource" = None,
    **settings: Any,
) -> Measured:
    """Return perplexity and bits per byte of a model on the first `max_tokens` of its data, in the seed's order.

    With the seed, context and tokens of a run, these are the blocks that the run kept for its evaluation. With a
    `stride`, windows slide over the text. With another model `against`, also the KL to that model and how often both
    predict one token; of its tokens, those that the model has count. For a run directory, the student is measured
    against its teacher.

    Raises:
        UserError: the stride is above the context, the model has tokens that the other one lacks, or there is nothing
            to measure.
    """
    from minitron.data.packing import read_blocks
    from minitron.evaluation import measure
    from minitron.evaluation.agreement import Comparison, TeacherStates
    from minitron.model.language_model import load_model
    from minitron.quantities import option_count
    from minitron.recipe import data_in_words, recipe_from
    from minitron.session import Session
    from minitron.verbs.workspace import student_of

    given, other = student_of(recipe_from(recipe, teacher=model, **settings), str(against) if against else None)
    session = Session(given)
    session.validate()
    checkpoint, runtime, limit = session.teacher, session.runtime, option_count("--max-tokens", max_tokens)
    if other is not None:  # a teacher may have more tokens, and reads the text with its own
        session = Session(given.model_copy(update={"teacher": other, "family": None})).over(checkpoint)
    blocks = read_blocks(given.data, session.packing(), limit)
    if stride is not None:
        if not 0 < stride < session.context:
            raise UserError(f"--stride {stride}: accepted: 1 to {session.context - 1}, below the context")
        if blocks.whole is not None:
            raise UserError("--stride with --against needs two models with the same tokens")
        blocks = blocks.sliding(stride)
        blocks.require_targets(f"--stride {stride}")
    comparison = None
    if other is not None:
        states = TeacherStates(blocks, session.pieces)
        read = blocks if blocks.whole is None else blocks.whole.blocks
        loaded = load_model(session.teacher, runtime.device, runtime.dtype, runtime.attention)
        measure(loaded, session.teacher, read, stage="evaluate teacher", observer=states)
        del loaded
        comparison = Comparison(states)
    with session.source_model() as model_in_memory:
        figures = measure(model_in_memory, checkpoint, blocks, stage="evaluate", observer=comparison)
    conditions = {"stride": stride, "against": other, "data": data_in_words(given.data), "seed": given.seed}
    return Measured(figures | conditions)


def evaluate_tasks(
    model: str | Path,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    shots: int | None = None,
    samples: int | None = None,
    tasks_data_folder: str | None = None,
    runs_code: bool = False,
    answers: str | Path | None = None,
    judge: tuple[str, str] | None = None,
    recipe: "RecipeSource" = None,
    **settings: Any,
) -> Measured:
    """Return benchmarks of a model, by lm-eval and others; a task that cannot be run is named with the reason.

    The numbers of `shots`, and of `samples` for an item of HumanEval and MBPP, are the papers' unless they are given.
    For a run directory, student and teacher are measured, and `tasks.json` in it keeps the figures for its report.
    Answers to chats are kept in the folder `answers`, if one is given, and rated by a `judge`: its endpoint and model.

    Raises:
        UserError: a name is not a task, none of the tasks can be run, or lm-eval is not installed.
    """
    from minitron.files import read_json, write_json
    from minitron.harness import measure_tasks, warn_of_skipped
    from minitron.harness.interface import Inputs
    from minitron.harness.judge import Judge
    from minitron.harness.local_files import tasks_data
    from minitron.harness.plan import plan_tasks
    from minitron.recipe import recipe_from
    from minitron.session import Session, require_one_process
    from minitron.verbs.workspace import run_directory, student_of

    require_one_process()
    given = recipe_from(recipe, teacher=model, **settings)
    data, rater = tasks_data(tasks_data_folder), Judge(*judge) if judge else None
    inputs = Inputs(data, limit, shots=shots, samples=samples, judge=rater)
    plan = plan_tasks(list(tasks), inputs, runs_code=runs_code)
    warn_of_skipped(plan.skipped)
    run, cache = run_directory(given), Path(answers) if answers else None
    if run is None:
        return _as_result(measure_tasks(Session(given), plan, inputs, answers=cache))
    student, teacher = student_of(given, None)
    record = measure_tasks(Session(student), plan, inputs, answers=cache / "student" if cache else None)
    whole = Session(given.model_copy(update={"teacher": teacher}))
    measured = measure_tasks(whole, plan, inputs, answers=cache / "teacher" if cache else None)
    record["teacher_tasks"] = measured["tasks"]
    before = read_json(run / "tasks.json") if (run / "tasks.json").exists() else {}
    if all(before.get(key) == record[key] for key in ("limit", "seed", "versions")):  # further tasks of one measurement
        for key in ("tasks", "teacher_tasks"):  # a task whose data could not be read keeps its earlier figures
            measured_now = {name: result for name, result in record[key].items() if result["items"]}
            record[key] = record[key] | before[key] | measured_now
    write_json(run / "tasks.json", record)
    return _as_result(record)


def _as_result(record: dict[str, Any]) -> Measured:
    from minitron.reports.figures import tasks_conditions, tasks_table

    return Measured(record, tasks_table(record), tasks_conditions(record))
