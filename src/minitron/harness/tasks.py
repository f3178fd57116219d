"""Benchmarks through lm-eval, from the hub or from local files, by the groups that the papers report."""

import warnings
from collections.abc import Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

from minitron.errors import UserError, nearest
from minitron.harness.benches import BENCHES, Bench
from minitron.harness.lm_eval_model import lm_eval, manager
from minitron.harness.task_files import Task, find_file, redirected, truthful_rows


def _lacks_words() -> str | None:
    """Why IFEval's checker, which counts sentences, would fail."""
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
            return "nltk's punkt_tab is not there and cannot be fetched: put it where NLTK_DATA says"
    return None


MMLU_FILES = {"test": ("mmlu.test.jsonl",), "dev": ("mmlu.dev.jsonl",)}
TASKS = {
    task.name: task
    for task in (
        Task("mmlu", 5, MMLU_FILES),
        Task("hellaswag", 10, {"validation": ("hellaswag.validation.jsonl", "hellaswag/none/validation")}),
        Task("winogrande", 5, {"validation": ("winogrande.validation.jsonl", "winogrande_xl/validation")}),
        Task("arc_easy", 0, {"validation": ("arc_easy.validation.jsonl", "ARC-Easy/validation")}),
        Task("arc_challenge", 25, {"validation": ("arc_challenge.validation.jsonl", "ARC-Challenge/validation")}),
        Task("piqa", 0, {"validation": ("piqa.validation.jsonl", "piqa/plain_text/validation")}),
        Task("boolq", 0, {"validation": ("boolq.validation.jsonl", "hf_datasets/boolq/none/validation")}),
        Task("openbookqa", 0, {"validation": ("openbookqa.validation.jsonl", "openbookqa/main/validation")}),
        Task("gsm8k", 5, {"train": ("gsm8k/train.jsonl",), "test": ("gsm8k/test.jsonl",)}, longest_answer=256),
        Task("truthfulqa_mc2", 0, {"validation": ("truthfulqa/TruthfulQA.csv",)}, rows=truthful_rows),
        Task("xlsum", 3, longest_answer=256),
        Task("ifeval", 0, {"train": ("ifeval/input_data.jsonl",)}, longest_answer=1280,
             lacks=_lacks_words, is_chat=True),
    )
}  # fmt: skip
GROUPS = {
    "minitron-base": ("mmlu", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "piqa", "gsm8k",
                      "truthfulqa_mc2", "xlsum", "humaneval", "mbpp"),
    "minitron-instruct": ("ifeval", "mt_bench", "chatrag", "bfcl"),
    "quick": ("hellaswag", "winogrande", "arc_easy", "piqa"),
}  # fmt: skip
"""`minitron-base` are the tasks of Minitron's tables 2 and 3 (arXiv 2407.14679) with ARC-Easy and PIQA of its
successors, `minitron-instruct` those of its tables 5 to 8; `quick` is for a CPU, without shots."""
QUICK_ITEMS = 50


@dataclass(frozen=True)
class Plan:
    """What is to be run, and what is not, with the reason."""

    tasks: tuple[Task, ...]
    """Of lm-eval."""
    benches: tuple[str, ...]
    """Of `harness.benches`."""
    skipped: Mapping[str, str]
    limit: int | None


def plan_tasks(names: list[str], limit: int | None, data: Path | None, runs_code: bool) -> Plan:
    """The tasks of these names and groups that can be run.

    Raises:
        UserError: a name is none, or nothing is left.
    """
    index = manager().task_index
    chosen: dict[str, Task | None] = {}
    for name in names:
        if name not in TASKS and name not in GROUPS and name not in BENCHES:
            raise UserError(f"unknown task '{name}': {nearest(name, [*GROUPS, *TASKS, *BENCHES])}")
        for part in GROUPS.get(name, (name,)):
            task = TASKS.get(part)
            chosen[part] = replace(task, shots=0) if task and name == "quick" else task
    reasons = {
        name: _obstacle(task, index, data) if task else _obstacle_of_bench(BENCHES[name], data, runs_code)
        for name, task in chosen.items()
    }
    skipped = {name: reason for name, reason in reasons.items() if reason}
    if skipped.keys() == chosen.keys():
        raise UserError(f"no task can be run: {'; '.join(f'{name}: {reason}' for name, reason in skipped.items())}")
    left = {name: task for name, task in chosen.items() if name not in skipped}
    return Plan(
        tuple(task for task in left.values() if task), tuple(name for name, task in left.items() if not task),
        skipped, QUICK_ITEMS if limit is None and names == ["quick"] else limit,
    )  # fmt: skip


def fitting(plan: Plan, context: int) -> Plan:
    """The plan without the tasks whose answers may be longer than a model's context."""
    longest = {task.name: task.longest_answer for task in plan.tasks}
    longest |= {name: BENCHES[name].longest_answer for name in plan.benches}
    long = {
        name: f"its answers of up to {tokens:,} tokens do not fit in a context of {context:,}"
        for name, tokens in longest.items()
        if tokens >= context
    }
    tasks = tuple(task for task in plan.tasks if task.name not in long)
    benches = tuple(name for name in plan.benches if name not in long)
    return replace(plan, tasks=tasks, benches=benches, skipped={**plan.skipped, **long})


def _obstacle_of_bench(bench: Bench, data: Path | None, runs_code: bool) -> str | None:
    if bench.runs_code and not runs_code:
        return "it runs the model's programs: ask for that with --run-code"
    return bench.missing(data)


def _obstacle(task: Task, index: Mapping[str, Any], data: Path | None) -> str | None:
    """Why a task cannot be run."""
    if task.name not in index:
        return "lm-eval has no such task"
    if data is not None and not task.files:
        return "its data is on the hub alone"
    if data is not None and (missing := [split for split in task.files if find_file(data, task, split) is None]):
        return f"{data} holds no file of its split {missing[0]}"
    return task.lacks()


def run_tasks(model: Any, plan: Plan, data: Path | None, seed: int) -> dict[str, Any]:
    """What lm-eval gives for a model of `load_lm`: by task its metrics, items, shots, and where the data came from.

    Raises:
        UserError: lm-eval is not installed.
    """
    with redirected(plan.tasks, data, manager().task_index) as include, warnings.catch_warnings(action="ignore"):
        local = manager(include)
        results: dict[str, Any] = {}
        for task in plan.tasks:
            model.stage = task.name
            found = lm_eval().simple_evaluate(
                model=model, tasks=[task.name], num_fewshot=task.shots, limit=plan.limit, task_manager=local,
                bootstrap_iters=0, log_samples=False, random_seed=seed, numpy_random_seed=seed,
                torch_random_seed=seed, fewshot_random_seed=seed,
                apply_chat_template=task.is_chat and bool(model.tokenizer.chat_template),
            )  # fmt: skip
            metrics = found["results"][task.name]
            results[task.name] = {
                "metrics": {_name(key): float(value) for key, value in metrics.items() if _is_figure(key, value)},
                "shots": task.shots,
                "items": sum(counts["effective"] for counts in found["n-samples"].values()),
                "data": str(data) if data else "hub",
            }
    return results


def _name(key: str) -> str:
    """lm-eval's `metric,filter` without a filter that does nothing."""
    return key.removesuffix(",none").replace(",", " ")


def _is_figure(key: str, value: Any) -> bool:
    return "," in key and isinstance(value, (int, float)) and "stderr" not in key
