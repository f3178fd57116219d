"""Measures whether the search finds better shapes: distils shapes of one budget equally, over several seeds.

    python benchmarks/search_quality.py OUT --shapes shapes.json [TEACHER] [--tokens 100k] [--seeds 0 1 2]
        [--set calibration.tokens=8k distill.batch_size=1]

`shapes.json` maps a name to sizes, such as `{"depth only": {"num_hidden_layers": 17}}`. Each shape is cut out of the
teacher (by default the built-in smollm2), with the default repairs, and distilled on equal blocks in equal order, those
of the seed. `OUT/results.jsonl` receives one line of JSON per shape and seed, with perplexity and KL to the teacher on
the evaluation blocks, which no other stage has seen. Lines that are there are not computed again; the teacher runs once
over the text of each seed.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

from minitron.distillation import distill
from minitron.distillation.teacher import Live
from minitron.evaluation.perplexity import measure_perplexity
from minitron.files import read_jsonl
from minitron.model.checkpoint import open_checkpoint
from minitron.model.language_model import load_model
from minitron.nas.zero_shot import divergence
from minitron.pruning import Importance, prune, read_importance, write_importance
from minitron.quantities import parse_count
from minitron.recipe import Recipe, recipe_from
from minitron.session import Session


def main() -> None:
    """Add a line per seed and shape."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("teacher", nargs="?", default="smollm2")
    parser.add_argument("--shapes", type=Path, required=True)
    parser.add_argument("--tokens", type=parse_count, default=102_400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="keys of the recipe")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    done = {(row["seed"], row["shape"]) for row in read_jsonl(options.out / "results.jsonl")}
    shapes = json.loads(options.shapes.read_text(encoding="utf-8"))
    for seed in options.seeds:
        if missing := {name: sizes for name, sizes in shapes.items() if (seed, name) not in done}:
            recipe = _recipe(options.teacher, seed, options.tokens, options.out)
            settings = dict(item.split("=", 1) for item in options.set)
            _study(Session(recipe_from(recipe, **settings)), missing, options.out)


def _recipe(teacher: str, seed: int, tokens: int, out: Path) -> Recipe:
    return Recipe.model_validate({
        "teacher": teacher, "seed": seed, "context": 512, "search": {"tokens": 4096}, "evaluation": {"tokens": 16_384},
        "calibration": {"tokens": 16_384},
        "distill": {
            "tokens": tokens, "batch_size": 2, "learning_rate": 5e-4, "teacher_states": str(out / f"states-{seed}"),
        },
    })  # fmt: skip


def _study(session: Session, shapes: dict[str, dict[str, int]], out: Path) -> None:
    runtime, seed, importance = session.runtime, session.recipe.seed, _importance(session, out)
    for name, sizes in shapes.items():
        folder, started = out / f"seed-{seed}" / name, time.monotonic()
        prune(session, session.teacher.arch.resized(**sizes), importance, folder / "pruned")
        pruned = open_checkpoint(folder / "pruned")
        distill(session, pruned, folder / "student", work=folder)
        student = load_model(open_checkpoint(folder / "student"), runtime.device, runtime.dtype)
        with session.teacher_model() as teacher:
            kl = divergence(student, session.splits.evaluation, Live(teacher))
        row = {"seed": seed, "shape": name, "sizes": sizes, "num_parameters": pruned.arch.num_parameters}
        row |= {"tokens": session.recipe.distill.tokens}
        row |= {"perplexity": round(measure_perplexity(student, session.splits.evaluation).perplexity, 3)}
        row |= {"kl": round(kl, 5), "seconds": round(time.monotonic() - started)}
        _add(out, row)
        shutil.rmtree(folder / "pruned")
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)


def _importance(session: Session, out: Path) -> Importance:
    folder = out / f"importance-{session.recipe.seed}"
    if (folder / "importance.safetensors").exists():
        return read_importance(folder, session)
    folder.mkdir(parents=True, exist_ok=True)
    return write_importance(folder, session)


def _add(out: Path, row: dict[str, Any]) -> None:
    with (out / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
