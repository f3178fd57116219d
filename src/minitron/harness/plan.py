"""Decides which benchmarks of a list of names can be run, and names the reason for each that cannot."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from minitron.errors import UserError, nearest
from minitron.harness.benchmarks import BENCHMARKS
from minitron.harness.interface import Benchmark, Inputs
from minitron.harness.lm_eval_definitions import Task, find_split
from minitron.harness.lm_eval_model import task_manager
from minitron.harness.lm_eval_tasks import TASKS

GROUPS: dict[str, dict[str, int | None]] = {
    "minitron-base": {
        **dict.fromkeys(("mmlu", "hellaswag", "winogrande", "arc_easy", "arc_challenge", "piqa", "gsm8k")),
        **dict.fromkeys(("truthfulqa_mc2", "xlsum", "humaneval", "mbpp")),
    },
    "minitron-8b-card": {
        "mmlu": 5,
        **dict.fromkeys(("hellaswag", "winogrande", "gsm8k", "arc_challenge", "xlsum", "humaneval"), 0),
    },
    "minitron-instruct": dict.fromkeys(("ifeval", "mt_bench", "chatrag", "bfcl")),
    "quick": dict.fromkeys(("hellaswag", "winogrande", "arc_easy", "piqa"), 0),
}
"""Groups of benchmarks by name, each with its shots; None: the shots of `TASKS`.

`minitron-base` holds the tasks of Minitron's tables 2 and 3 (arXiv 2407.14679), with ARC-Easy and PIQA of its
successors; `minitron-8b-card` holds those of the model card of Minitron-8B-Base, with its shots; `minitron-instruct`
holds those of the tables 5 to 8; `quick` is for a CPU.
"""
QUICK_ITEMS = 50
"""The number of items of each task of `quick`, if no limit is given."""


@dataclass(frozen=True)
class Plan:
    """The benchmarks to run, and those that are skipped."""

    tasks: tuple[Task, ...]
    """Tasks that lm-eval runs."""
    benchmarks: tuple[str, ...]
    """Names of benchmarks that lm-eval lacks."""
    skipped: Mapping[str, str]
    """By name, the reason why a benchmark cannot be run."""
    limit: int | None
    """Use only the first `limit` items of each task."""


def plan_tasks(names: list[str], inputs: Inputs, *, runs_code: bool) -> Plan:
    """Find out which benchmarks of some names and groups can be run; `runs_code` permits those that execute programs.

    Raises:
        UserError: a name is unknown, lm-eval is not installed, or no benchmark can be run.
    """
    selected: dict[str, Task | None] = {}
    for name in names:
        if name not in TASKS and name not in GROUPS and name not in BENCHMARKS:
            raise UserError(f"unknown task '{name}': {nearest(name, [*GROUPS, *TASKS, *BENCHMARKS])}")
        for member, group_shots in GROUPS.get(name, {name: None}).items():
            task, shots = TASKS.get(member), group_shots if inputs.shots is None else inputs.shots
            selected[member] = task if task is None or shots is None else replace(task, shots=shots)
    index = task_manager().task_index
    reasons = {
        name: _task_obstacle(task, index, inputs.data)
        if task
        else _benchmark_obstacle(BENCHMARKS[name], inputs, runs_code)
        for name, task in selected.items()
    }
    skipped = {name: reason for name, reason in reasons.items() if reason}
    if skipped.keys() == selected.keys():
        raise UserError(f"no task can be run: {'; '.join(f'{name}: {reason}' for name, reason in skipped.items())}")
    runnable = {name: task for name, task in selected.items() if name not in skipped}
    return Plan(
        tasks=tuple(task for task in runnable.values() if task),
        benchmarks=tuple(name for name, task in runnable.items() if not task),
        skipped=skipped,
        limit=QUICK_ITEMS if inputs.limit is None and names == ["quick"] else inputs.limit,
    )


def fitting(plan: Plan, context: int) -> Plan:
    """Return the plan without the benchmarks whose answers may be longer than a model's context."""
    longest = {task.name: task.longest_answer for task in plan.tasks}
    longest |= {name: BENCHMARKS[name].longest_answer for name in plan.benchmarks}
    too_long = {
        name: f"its answers of up to {num_tokens:,} tokens do not fit in a context of {context:,}"
        for name, num_tokens in longest.items()
        if num_tokens >= context
    }
    tasks = tuple(task for task in plan.tasks if task.name not in too_long)
    benchmarks = tuple(name for name in plan.benchmarks if name not in too_long)
    return replace(plan, tasks=tasks, benchmarks=benchmarks, skipped={**plan.skipped, **too_long})


def _task_obstacle(task: Task, index: Mapping[str, Any], data: Path | None) -> str | None:
    if task.name not in index:
        return "lm-eval has no such task"
    if data is not None:
        if not task.files:
            return "its data can be read from the hub only, not from a folder"
        for split in task.files:
            if find_split(data, task, split) is None:
                return f"{data} holds no file for its {split} split"
    if task.shots and not task.has_examples:
        return f"{task.shots} shots: lm-eval's definition has no examples"
    return task.requirement()


def _benchmark_obstacle(benchmark: Benchmark, inputs: Inputs, runs_code: bool) -> str | None:
    if benchmark.runs_code and not runs_code:
        return "it executes programs that the model writes: allow it with --run-code"
    if (inputs.shots or 0) > benchmark.examples:
        return f"{inputs.shots} shots: the benchmark has {benchmark.examples or 'no'} examples"
    return benchmark.obstacle(inputs)
