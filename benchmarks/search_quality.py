"""Whether the search finds better shapes: shapes of one budget, all distilled equally, over several seeds.

    python benchmarks/search_quality.py OUT --shapes shapes.json [TEACHER] [--tokens 100k] [--seeds 0 1 2]

`shapes.json` holds a mapping from a name to sizes, such as `{"depth only": {"num_hidden_layers": 17}}`. Each shape is
cut out of the teacher (by default the built-in smollm2), with the repairs that are the default, and distilled on the
same blocks in the same order, those of the seed. A line of JSON each goes to `OUT/results.jsonl`, with the perplexity
on text that nothing else has seen and the KL to the teacher there. What is in that file is not done again; the teacher
runs once over the text of each seed.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

from minitron.alone import prune
from minitron.data.blocks import Blocks
from minitron.distillation.fused import States, logit_loss
from minitron.distillation.losses import forward_kl
from minitron.distillation.teacher import stored
from minitron.distillation.trainer import distill
from minitron.evaluation.perplexity import measure_perplexity
from minitron.files import read_jsonl
from minitron.model.checkpoint import open_checkpoint
from minitron.model.language_model import Headless, load_model, read_head
from minitron.recipe import Recipe, parse_count
from minitron.runtime import World
from minitron.session import Session


def main() -> None:
    """A line a seed and shape."""
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("teacher", nargs="?", default="smollm2")
    parser.add_argument("--shapes", type=Path, required=True)
    parser.add_argument("--tokens", type=parse_count, default=102_400)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    done = {(row["seed"], row["shape"]) for row in read_jsonl(options.out / "results.jsonl")}
    for seed in options.seeds:
        shapes = json.loads(options.shapes.read_text(encoding="utf-8"))
        if missing := {name: sizes for name, sizes in shapes.items() if (seed, name) not in done}:
            _study(options.teacher, seed, options.tokens, missing, options.out)


def _study(teacher: str, seed: int, tokens: int, shapes: dict[str, dict[str, int]], out: Path) -> None:
    recipe = Recipe.model_validate({
        "teacher": teacher, "seed": seed, "context": 512, "search": {"tokens": 4096}, "evaluation": {"tokens": 16_384},
        "calibration": {"tokens": 16_384}, "distill": {"tokens": tokens, "batch_size": 2, "learning_rate": 5e-4},
    })  # fmt: skip
    inputs = Session(recipe)
    head = read_head(inputs.teacher, inputs.device, inputs.dtype)
    states = out / f"states-{seed}"
    word = stored(states, {}, lambda: inputs.model, head, inputs.splits.train, recipe.distill, World())
    for name, sizes in shapes.items():
        folder, started = out / f"seed-{seed}" / name, time.monotonic()
        prune(recipe, sizes, None, _importance(inputs, out), folder / "pruned", overwrite=True)
        pruned = open_checkpoint(folder / "pruned")
        distill(word, pruned, inputs.splits.train, inputs.splits.heldout, recipe.distill, folder / "student", folder,
                seed, inputs.device, inputs.dtype, World())  # fmt: skip
        model = load_model(open_checkpoint(folder / "student"), inputs.device, inputs.dtype)
        _add(out, seed=seed, shape=name, sizes=sizes, num_parameters=pruned.arch.num_parameters, tokens=tokens,
             perplexity=round(measure_perplexity(model, inputs.splits.evaluation).perplexity, 3),
             kl=round(_kl(model, inputs.model, inputs.splits.evaluation), 5),
             seconds=round(time.monotonic() - started))  # fmt: skip
        shutil.rmtree(folder / "pruned")
        shutil.rmtree(folder / "checkpoint", ignore_errors=True)


def _importance(inputs: Session, out: Path) -> Path:
    from minitron.stages import write_statistics

    folder = out / f"importance-{inputs.recipe.seed}"
    if not (folder / "importance.safetensors").exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_statistics(folder, inputs)
    return folder


def _kl(student: Any, teacher: Any, blocks: Blocks) -> float:
    """Forward KL to the teacher, nats a token."""
    import torch

    total = 0.0
    with torch.no_grad():
        for block in blocks.split(1):
            said = Headless(teacher)(block.ids, lambda hidden, head: States(hidden, head))
            total += float(Headless(student)(
                block.ids, lambda hidden, head, said=said: logit_loss(hidden, head, said, forward_kl, 1)
            ))  # fmt: skip
    return total / blocks.num_tokens


def _add(out: Path, **row: Any) -> None:
    with (out / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
