"""Rewrites lm-eval's definitions of tasks so that they read local files instead of the hub."""

import csv
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from minitron.errors import UserError
from minitron.files import write_jsonl
from minitron.harness.local_files import find_path, read_rows


@dataclass(frozen=True)
class Task:
    """A task of lm-eval, with the number of shots that the papers give it."""

    name: str
    shots: int = 0
    files: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By split, the endings that the path of its local file may have: jsonl, jsonl.gz, or a folder of arrow files."""
    rows: Callable[[Path], list[dict[str, Any]]] | None = None
    """Reads a local file that has another format than lm-eval's."""
    longest_answer: int = 0
    """The most tokens of an answer; 0: the task compares likelihoods."""
    requirement: Callable[[], str | None] = lambda: None
    """Returns the reason why the task would fail with any data, or None."""
    has_examples: bool = True
    """Whether prompts may hold examples; where its own definition states 0, lm-eval ignores any other number."""
    is_chat: bool = False
    """Whether its prompts are written by the tokenizer's chat template, if there is one."""


def find_split(data: Path, task: Task, split: str) -> Path | None:
    """Return the local file of a task's split, or the folder of its arrow files."""
    if task.name == "mmlu" and (arrow := data / "hf_datasets" / "hails" / "mmlu_no_train").is_dir():
        return arrow
    return find_path(data, *task.files[split])


@contextmanager
def local_definitions(tasks: Sequence[Task], data: Path | None, index: Mapping[str, Any]) -> Iterator[Path | None]:
    """Yield a temporary folder of definitions that include lm-eval's own and read local files; None without `data`.

    `index` maps the names of lm-eval's tasks to its entries, which know the paths of the definitions.
    """
    if data is None:
        yield None
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for task in tasks:
            if task.name == "mmlu":
                for name, subject, builtin in _mmlu_subjects(index):
                    files = {split: _subject_files(data, task, split, subject, folder) for split in task.files}
                    _write_definition(folder, name, builtin, files)
            else:
                paths = {split: find_split(data, task, split) for split in task.files}
                files = {split: _files(path) for split, path in paths.items() if path is not None}
                if task.rows is not None:
                    files = {split: [_convert(task, split, Path(path), folder)] for split, [path] in files.items()}
                _write_definition(folder, task.name, index[task.name].yaml_path, files)
        yield folder


def _files(path: Path) -> list[str]:
    return sorted(map(str, path.glob("*.arrow"))) if path.is_dir() else [str(path)]


def _convert(task: Task, split: str, path: Path, folder: Path) -> str:
    assert task.rows is not None
    write_jsonl(target := folder / f"{task.name}.{split}.jsonl", task.rows(path))
    return str(target)


def _mmlu_subjects(index: Mapping[str, Any]) -> Iterator[tuple[str, str, Path]]:
    """Yield the task, the subject and the definition of each subject of MMLU in its default variant."""
    for name, entry in index.items():
        if name.startswith("mmlu_") and entry.yaml_path and entry.yaml_path.parent.name == "default":
            subject = name.removeprefix("mmlu_")
            if f"mmlu_{subject}.yaml" == entry.yaml_path.name:
                yield name, subject, entry.yaml_path


def _subject_files(data: Path, task: Task, split: str, subject: str, folder: Path) -> list[str]:
    """Return MMLU's files of one subject: its own arrow files, or its rows of the common file, written to `folder`."""
    path = find_split(data, task, split)
    assert path is not None
    if path.is_dir():
        return _files(path / subject / split)
    subjects = _rows_by_subject(path)
    if subject not in subjects:
        raise UserError(f"{path} holds no rows of the subject {subject}")
    write_jsonl(target := folder / f"{subject}.{split}.jsonl", subjects[subject])
    return [str(target)]


@lru_cache(maxsize=2)
def _rows_by_subject(path: Path) -> dict[str, list[dict[str, Any]]]:
    subjects: dict[str, list[dict[str, Any]]] = {}
    for row in read_rows(path):
        subjects.setdefault(row["subject"], []).append(row)
    return subjects


def _write_definition(folder: Path, name: str, builtin: Path, files: dict[str, list[str]]) -> None:
    import yaml

    is_arrow = all(path.endswith(".arrow") for paths in files.values() for path in paths)
    measured = next(split for split in ("test", "validation", "train") if split in files)
    others = {split: split if split in files and split != measured else None for split in ("train", "validation")}
    definition: dict[str, Any] = {
        "include": str(builtin),
        "task": name,
        "dataset_path": "arrow" if is_arrow else "json",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": files},
        # Where examples come from the measured split, lm-eval leaves an item out of its own prompt only if that is the
        # test split. IFEval's only split is named train.
        "training_split": others["train"],
        "validation_split": others["validation"],
        "test_split": measured,
        "fewshot_split": next(split for split in ("dev", "train", "validation", "test") if split in files),
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(definition), encoding="utf-8")


def truthful_rows(path: Path) -> list[dict[str, Any]]:
    """Read TruthfulQA's own CSV file as the rows of lm-eval's multiple-choice task."""
    rows = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        for row in csv.DictReader(file):
            right, wrong = (_choices(row[f"{kind} Answers"]) for kind in ("Correct", "Incorrect"))
            labels = [1] * len(right) + [0] * len(wrong)
            rows.append({"question": row["Question"], "mc2_targets": {"choices": right + wrong, "labels": labels}})
    return rows


def _choices(cell: str) -> list[str]:
    return [choice.strip() for choice in cell.split(";") if choice.strip()]
