"""How near to the teacher a cut model starts, and what is left of that after equal distillation.

    python benchmarks/prune_quality.py [TEACHER] [--wikitext FILE] [--tokens 100k] [--shapes ffn hidden ...]

Cuts the teacher (by default the built-in smollm2) to each shape of `SHAPES` by each method of `METHODS`, everything
measured on the same calibration tokens, and prints a line each: parameters, seconds, and perplexity on held-out wiki
text and on WikiText-2 validation (in its tokenised form, which is put back to plain text here), in contexts of 512.
With `--tokens`, each is then distilled on the same blocks in the same order and measured again; the teacher's states
are kept in `--teacher-states` for other runs over the same tokens.
"""

import argparse
import json
import re
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from minitron.data.blocks import Blocks, read_blocks
from minitron.distillation.teacher import Teacher, stored
from minitron.distillation.trainer import distill
from minitron.evaluation.perplexity import measure_perplexity
from minitron.files import whole_folder
from minitron.model.checkpoint import open_checkpoint
from minitron.model.language_model import load_model, read_head
from minitron.pruning.cut import cut_to, write_pruned
from minitron.pruning.repair import mended
from minitron.recipe import PLAIN, PruneRecipe, Recipe, parse_count
from minitron.runtime import World
from minitron.session import Session

SHAPES = {
    "ffn": {"intermediate_size": 768},
    "hidden": {"hidden_size": 448, "intermediate_size": 1152},
    "heads": {"num_attention_heads": 6, "intermediate_size": 1024},
    "depth": {"intermediate_size": 960, "num_hidden_layers": 26},
    "half": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 28},
}
METHODS = {
    "plain": PLAIN,
    "rescale": PruneRecipe(rotate=False, refit=False),
    "rotate": PruneRecipe(rotate=True, refit=False),
    "refit": PruneRecipe(rotate=False, rescale_norms=False, refit=True),
    "all": PruneRecipe(refit=True),
}
"""A rotation is measured with the norms rescaled: its directions carry most of the stream by themselves."""
ADDITIONS = set(METHODS) - {"plain", "all"}
"""Looked at one by one where hidden is cut; elsewhere the refit is all there is."""


def main() -> None:
    """A line a shape and method."""
    parser = argparse.ArgumentParser()
    parser.add_argument("teacher", nargs="?", default="smollm2")
    parser.add_argument("--wikitext", type=Path)
    parser.add_argument("--tokens", type=parse_count)
    parser.add_argument("--calibration", type=parse_count, default=16_384)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--teacher-states", type=Path)
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    options = parser.parse_args()
    recipe = Recipe.model_validate({
        "teacher": options.teacher, "context": 512, "dtype": options.dtype, "search": {"tokens": 2048},
        "evaluation": {"tokens": 8192}, "calibration": {"tokens": options.calibration},
        "distill": {"tokens": options.tokens or options.calibration, "learning_rate": options.learning_rate,
                    "batch_size": options.batch_size, "optimizer": options.optimizer},
    })  # fmt: skip
    inputs = Session(recipe)
    texts = {"wiki": inputs.splits.evaluation}
    if options.wikitext:
        texts["wikitext-2"] = read_wikitext(options.wikitext, inputs)
    show(shape="whole", num_parameters=inputs.teacher.arch.num_parameters, **measured(inputs.model, texts))
    with TemporaryDirectory() as states:
        word = teacher_of(inputs, options.teacher_states or Path(states)) if options.tokens else None
        for name in options.shapes:
            for method in options.methods:
                if method not in ADDITIONS or "hidden_size" in SHAPES[name]:
                    with TemporaryDirectory() as folder:
                        study(inputs, texts, name, method, Path(folder), word)


def teacher_of(inputs: Session, folder: Path) -> Teacher:
    """All students see the same blocks, so the teacher runs over each of them once."""
    head = read_head(inputs.teacher, inputs.device, inputs.dtype)
    return stored(folder, {}, lambda: inputs.model, head, inputs.splits.train, inputs.recipe.distill, World())


def study(
    inputs: Session, texts: dict[str, Blocks], name: str, method: str, folder: Path, word: Teacher | None
) -> None:
    """Cut, measure, and if there is a teacher to say it, distil and measure again."""
    teacher, recipe, started = inputs.teacher, METHODS[method], time.monotonic()
    arch = teacher.arch.resized(**SHAPES[name])
    with whole_folder(folder / "pruned") as staging:
        write_pruned(
            teacher, cut_to(arch, teacher, inputs.importance(), recipe),
            lambda cut: mended(teacher, cut, inputs.calibration_blocks, recipe, inputs.device, torch.float32), staging,
        )  # fmt: skip
    seconds, pruned = time.monotonic() - started, open_checkpoint(folder / "pruned")
    about = {"shape": name, "method": method, "num_parameters": arch.num_parameters}
    figures = measured(load_model(pruned, inputs.device, torch.float32), texts)
    show(**about, tokens=0, seconds=round(seconds, 1), **figures)
    if word:
        started = time.monotonic()
        distill(word, pruned, inputs.splits.train, inputs.splits.heldout, inputs.recipe.distill,
                folder / "student", folder, inputs.recipe.seed, inputs.device, inputs.dtype, World())  # fmt: skip
        seconds, student = time.monotonic() - started, open_checkpoint(folder / "student")
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        curve = [round(row["heldout_perplexity"], 1) for row in rows if "heldout_perplexity" in row]
        figures = measured(load_model(student, inputs.device, torch.float32), texts)
        show(**about, tokens=rows[-1]["tokens"], seconds=round(seconds, 1), **figures, along_the_way=curve)


def measured(model: Any, texts: dict[str, Blocks]) -> dict[str, float]:
    """Perplexity by text."""
    return {name: round(measure_perplexity(model, blocks).perplexity, 2) for name, blocks in texts.items()}


def read_wikitext(path: Path, inputs: Session) -> Blocks:
    """The first 8,192 tokens, detokenised."""
    with TemporaryDirectory() as folder:
        plain = Path(folder) / "wikitext.txt"
        plain.write_text("\n".join(detokenised(path)), encoding="utf-8")
        return read_blocks(str(plain), replace(inputs.packing(), context=512, seed=0), 8192)


def detokenised(path: Path) -> Iterator[str]:
    """Lines without the spaces that the tokenised form puts around punctuation."""
    for line in path.read_text(encoding="utf-8").splitlines():
        line = re.sub(r" @([-,.])@ ", r"\1", line.strip())
        line = re.sub(r" ([,.;:!?)\]'%]|n't|'s)", r"\1", line)
        line = re.sub(r"([(\[$]) ", r"\1", line)
        yield re.sub(r'" (.*?) "', r'"\1"', line)


def show(**row: Any) -> None:
    """One line of JSON."""
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
