"""Compares the metrics of the tasks of `quick` with those of lm-eval's own command on the same files.

    python benchmarks/quick_tasks.py DATA MODEL... [--limit 50]

`DATA` is a folder with hellaswag, winogrande, arc_easy and piqa `.validation.jsonl.gz`. lm-eval's own command runs on
definitions written by hand. Prints one line per model and task, and at the end whether all metrics were equal.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

TASKS = ("hellaswag", "winogrande", "arc_easy", "piqa")
DEFINITION = """\
include: {builtin}
task: {task}_by_hand
dataset_path: json
dataset_name: null
dataset_kwargs:
  data_files:
    validation: {file}
training_split: null
validation_split: validation
test_split: null
fewshot_split: validation
"""


def main() -> None:
    """Measure each model both ways and print the comparison."""
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--limit", type=int, default=50)
    options = parser.parse_args()
    differing = 0
    for model in options.models:
        ours, our_seconds = _ours(model, options.data, options.limit)
        theirs, their_seconds = _theirs(model, options.data, options.limit)
        for task in TASKS:
            metrics = ours[task]["metrics"]
            direct = {name: theirs[f"{task}_by_hand"][f"{name},none"] for name in metrics}
            differing += metrics != direct
            row = {"model": model, "task": task, "items": ours[task]["items"], "ours": metrics, "lm-eval": direct}
            print(json.dumps({**row, "same": metrics == direct}), flush=True)
        print(json.dumps({"model": model, "seconds": our_seconds, "lm-eval seconds": their_seconds}), flush=True)
    print("all the same" if not differing else f"{differing} differ")
    sys.exit(bool(differing))


def _ours(model: str, data: Path, limit: int) -> tuple[dict[str, Any], float]:
    started = time.monotonic()
    options = f"--tasks quick --limit {limit} --dtype float32 --json".split()
    command = [sys.executable, "-m", "minitron", "evaluate", model, "--tasks-data", str(data), *options]
    process = subprocess.run(command, capture_output=True, text=True, check=True)
    tasks: dict[str, Any] = json.loads(process.stdout)["tasks"]
    return tasks, round(time.monotonic() - started, 1)


def _theirs(model: str, data: Path, limit: int) -> tuple[dict[str, Any], float]:
    from lm_eval.tasks import TaskManager

    from minitron.model.source import resolve_teacher

    index, folder = TaskManager().task_index, resolve_teacher(model)
    with tempfile.TemporaryDirectory() as temporary:
        for task in TASKS:
            definition = DEFINITION.format(
                builtin=index[task].yaml_path, task=task, file=next(data.rglob(f"{task}.validation.jsonl.gz"))
            )
            Path(temporary, f"{task}.yaml").write_text(definition, encoding="utf-8")
        started = time.monotonic()
        tasks = ",".join(f"{temporary}/{task}.yaml" for task in TASKS)
        command = [sys.executable, *f"-m lm_eval run --model hf --limit {limit} --batch_size 8 --device cpu".split()]
        command += ["--model_args", f"pretrained={folder},dtype=float32"]
        command += ["--tasks", tasks, "--output_path", f"{temporary}/out"]
        subprocess.run(command, capture_output=True, check=True)
        [result] = Path(temporary, "out").rglob("results_*.json")
        results: dict[str, Any] = json.loads(result.read_text(encoding="utf-8"))["results"]
    return results, round(time.monotonic() - started, 1)


if __name__ == "__main__":
    main()
