"""Lists the tasks that lm-eval runs, with the papers' shots, and runs them on data of the hub or of local files."""

import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from typing import Any

from minitron.harness import summaries
from minitron.harness.interface import Inputs
from minitron.harness.lm_eval_definitions import Task, local_definitions, truthful_rows
from minitron.harness.lm_eval_model import defined_in, lm_eval, task_manager
from minitron.harness.local_files import in_one_line


def _ifeval_requirement() -> str | None:
    """Return the reason why IFEval's checker, which counts sentences with nltk, would fail, or None."""
    try:
        import immutabledict  # noqa: F401
        import langdetect  # noqa: F401
        import nltk
    except ImportError as error:
        return f"it needs {error.name}: pip install 'minitron[eval]'"
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        with redirect_stderr(StringIO()):
            is_fetched = nltk.download("punkt_tab", quiet=True)
        if not is_fetched:
            return "nltk's punkt_tab is missing and cannot be downloaded: put it into a folder that NLTK_DATA names"
    return None


def _validation(*endings: str) -> dict[str, tuple[str, ...]]:
    return {"validation": endings}


_TASKS = (
    Task("mmlu", 5, {"test": ("mmlu.test.jsonl",), "dev": ("mmlu.dev.jsonl",)}),
    Task("hellaswag", 10, _validation("hellaswag.validation.jsonl", "hellaswag/none/validation")),
    Task("winogrande", 5, _validation("winogrande.validation.jsonl", "winogrande_xl/validation")),
    Task("arc_easy", 0, _validation("arc_easy.validation.jsonl", "ARC-Easy/validation")),
    Task("arc_challenge", 25, _validation("arc_challenge.validation.jsonl", "ARC-Challenge/validation")),
    Task("piqa", 0, _validation("piqa.validation.jsonl", "piqa/plain_text/validation")),
    Task("boolq", 0, _validation("boolq.validation.jsonl", "hf_datasets/boolq/none/validation")),
    Task("openbookqa", 0, _validation("openbookqa.validation.jsonl", "openbookqa/main/validation")),
    Task("gsm8k", 5, {"train": ("gsm8k/train.jsonl",), "test": ("gsm8k/test.jsonl",)}, longest_answer=256),
    Task("truthfulqa_mc2", 0, _validation("truthfulqa/TruthfulQA.csv"), rows=truthful_rows, has_examples=False),
    Task(
        "xlsum",
        3,
        {"test": ("english_test.jsonl",), "validation": ("english_val.jsonl",)},
        longest_answer=summaries.LONGEST_SUMMARY,
        requirement=summaries.requirement,
    ),
    Task(
        "ifeval",
        0,
        {"train": ("ifeval/input_data.jsonl",)},
        longest_answer=1280,
        requirement=_ifeval_requirement,
        has_examples=False,
        is_chat=True,
    ),
)
TASKS = {task.name: task for task in _TASKS}
"""The tasks by name, with the shots of the papers' tables 2 and 3 (arXiv 2407.14679) and 1 (arXiv 2408.11796).

Where the papers have a task in no such table, it has no shots. Of XL-Sum the tables state 3, and the text 0.
"""


def run_tasks(model: Any, tasks: Sequence[Task], inputs: Inputs, seed: int) -> dict[str, Any]:
    """Run tasks on a model of `load_lm`; return by task its metrics, shots, number of items, and source of data.

    A task whose data cannot be read from the hub has no metrics but a note, and costs no other figure.

    Raises:
        UserError: lm-eval is not installed.
    """
    results: dict[str, Any] = {}
    if not tasks:
        return results
    with (
        local_definitions(tasks, inputs.data, task_manager().task_index) as folder,
        defined_in(folder) as manager,
        warnings.catch_warnings(action="ignore"),
    ):
        for task in tasks:
            source = str(inputs.data) if inputs.data else "hub"
            result = {"metrics": {}, "items": 0, "shots": task.shots, "data": source}
            if obstacle := None if inputs.data else _hub_obstacle(task, manager):
                results[task.name] = {**result, "note": f"not run: {obstacle}"}
                continue
            model.num_cut, notes = 0, []
            results[task.name] = result | _run(model, task, inputs.limit, seed, manager)
            if task.shots and inputs.data and len(task.files) == 1:
                notes.append("the examples are other items of the measured split")
            if model.num_cut:
                notes.append(f"{model.num_cut} prompts lost their beginning to fit a context of {model.max_length:,}")
            if notes:
                results[task.name]["note"] = ", ".join(notes)
    return results


def _hub_obstacle(task: Task, manager: Any) -> str | None:
    """Return the reason why a task's data cannot be read from the hub, or None."""
    try:
        manager.load([task.name])
    except Exception as error:  # of several libraries, which share no class of errors
        return f"its data cannot be read from the hub ({in_one_line(error)}); from a folder: --tasks-data"
    return None


def _run(model: Any, task: Task, limit: int | None, seed: int, manager: Any) -> dict[str, Any]:
    """Run one task; return its metrics and the number of items."""
    model.stage = task.name
    evaluated = lm_eval().simple_evaluate(
        model=model,
        tasks=[task.name],
        num_fewshot=task.shots,
        limit=limit,
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=False,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
        apply_chat_template=task.is_chat and bool(model.tokenizer.chat_template),
    )
    metrics = evaluated["results"][task.name]
    return {
        "metrics": {_name(key): float(value) for key, value in metrics.items() if _is_metric(key, value)},
        "items": sum(counts["effective"] for counts in evaluated["n-samples"].values()),
    }


def _name(key: str) -> str:
    """Return lm-eval's `metric,filter` as a name, without the filter `none`."""
    return key.removesuffix(",none").replace(",", " ")


def _is_metric(key: str, value: Any) -> bool:
    return "," in key and isinstance(value, (int, float)) and "stderr" not in key
