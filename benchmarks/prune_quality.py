"""Measures how near to its teacher a cut model starts, and what is left of the differences after equal distillation.

    python benchmarks/prune_quality.py [TEACHER] [--wikitext FILE] [--tokens 100k] [--shapes ffn hidden ...]

Cuts the teacher (by default the built-in smollm2) to each shape of `SHAPES` by each method of `METHODS`, calibrated on
equal tokens, and prints a line each: parameters, seconds, and perplexity on held-out wiki text and on WikiText-2
validation (read in its tokenised form and turned back into plain text), in contexts of 512. With `--tokens`, each is
then distilled on equal blocks in equal order and measured again; the teacher's outputs are stored in
`--teacher-states` for other runs over these tokens.
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

from minitron.data.blocks import Blocks
from minitron.data.packing import read_blocks
from minitron.distillation import distill
from minitron.evaluation.perplexity import measure_perplexity
from minitron.files import whole_folder
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.model.language_model import load_model
from minitron.pruning import Importance, measure_importance
from minitron.pruning.cut import cut_to, write_pruned
from minitron.pruning.repair import repaired
from minitron.quantities import parse_count
from minitron.recipe import BASELINES, recipe_from
from minitron.session import Session

SHAPES = {
    "ffn": {"intermediate_size": 768},
    "hidden": {"hidden_size": 448, "intermediate_size": 1152},
    "heads": {"num_attention_heads": 6, "intermediate_size": 1024},
    "depth": {"intermediate_size": 960, "num_hidden_layers": 26},
    "half": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 28},
    "width": {
        "hidden_size": 384,
        "intermediate_size": 1152,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
}
CUT_ALONE = {"prune.rotate": False, "prune.rescale_norms": False, "prune.refit": False}
METHODS: dict[str, dict[str, Any]] = {
    "plain": CUT_ALONE,
    "rescale": CUT_ALONE | {"prune.rescale_norms": True},
    "rotate": {"prune.rotate": True, "prune.refit": False},
    "refit": CUT_ALONE | {"prune.refit": True},
    "all": {"prune.refit": True},
    **BASELINES,
}
"""The settings of each method. A rotation is measured with the norms rescaled: its directions carry most of the stream
by themselves. `papers` and `modelopt` are what `--plain` names, with scores of their own."""
ADDITIONS = set(METHODS) - {"plain", "all", *BASELINES}
"""Methods that are measured alone only where hidden is cut; elsewhere the refit is the only repair."""


def main() -> None:
    """Print a line for each shape and method."""
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
    with TemporaryDirectory() as folder:
        training = {name: getattr(options, name) for name in ("learning_rate", "batch_size", "optimizer")}
        training |= {"tokens": options.tokens or options.calibration}
        recipe = recipe_from(
            None,
            teacher=options.teacher,
            context=512,
            dtype=options.dtype,
            search={"tokens": 2048},
            evaluation={"tokens": 8192},
            calibration={"tokens": options.calibration},
            distill=training | {"teacher_states": str(options.teacher_states or folder)},
        )
        session = Session(recipe)
        texts = {"wiki": session.splits.evaluation}
        if options.wikitext:
            texts["wikitext-2"] = read_wikitext(options.wikitext, session)
        with session.teacher_model() as model:
            show(shape="whole", num_parameters=session.teacher.arch.num_parameters, **measured(model, texts))
        for method in options.methods:
            session = Session(recipe_from(recipe, **METHODS[method]))
            importance = measure_importance(session)
            for name in options.shapes:
                if method not in ADDITIONS or "hidden_size" in SHAPES[name]:
                    with TemporaryDirectory() as work:
                        about: dict[str, Any] = {"shape": name, "method": method}
                        pruned = study_pruned(session, importance, texts, Path(work), about)
                        if options.tokens:
                            study_distilled(session, pruned, texts, Path(work), about)


def study_pruned(
    session: Session, importance: Importance, texts: dict[str, Blocks], work: Path, about: dict[str, Any]
) -> Checkpoint:
    """Cut the teacher by the shape and method in `about`, and print the student's figures before training."""
    teacher, recipe, started = session.teacher, session.recipe.prune, time.monotonic()
    runtime = replace(session.runtime, dtype=torch.float32)
    cut = cut_to(teacher.arch.resized(**SHAPES[about["shape"]]), teacher, importance, recipe)
    tensors = repaired(teacher, cut, blocks=session.calibration_blocks, recipe=recipe, runtime=runtime)
    with whole_folder(work / "pruned") as staging:
        write_pruned(teacher, cut, tensors, staging)
    seconds, pruned = time.monotonic() - started, open_checkpoint(work / "pruned")
    figures = measured(load_model(pruned, runtime.device, torch.float32), texts)
    show(**about, num_parameters=pruned.arch.num_parameters, tokens=0, seconds=round(seconds, 1), **figures)
    return pruned


def study_distilled(
    session: Session, pruned: Checkpoint, texts: dict[str, Blocks], work: Path, about: dict[str, Any]
) -> None:
    """Distil a pruned model and print the student's figures."""
    started = time.monotonic()
    distill(session, pruned, work / "student", work)
    seconds, student = time.monotonic() - started, open_checkpoint(work / "student")
    rows = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    curve = [round(row["heldout_perplexity"], 1) for row in rows if "heldout_perplexity" in row]
    about = about | {"num_parameters": student.arch.num_parameters, "tokens": rows[-1]["tokens"]}
    figures = measured(load_model(student, session.runtime.device, torch.float32), texts)
    show(**about, seconds=round(seconds, 1), **figures, along_the_way=curve)


def measured(model: Any, texts: dict[str, Blocks]) -> dict[str, float]:
    """Return the perplexity on each text."""
    return {name: round(measure_perplexity(model, blocks).perplexity, 2) for name, blocks in texts.items()}


def read_wikitext(path: Path, session: Session) -> Blocks:
    """Return the first 8,192 tokens of the detokenised text."""
    with TemporaryDirectory() as folder:
        plain = Path(folder) / "wikitext.txt"
        plain.write_text("\n".join(detokenised(path)), encoding="utf-8")
        return read_blocks(str(plain), replace(session.packing(), context=512, seed=0), 8192)


def detokenised(path: Path) -> Iterator[str]:
    """Yield lines without the spaces that the tokenised form puts around punctuation."""
    for line in path.read_text(encoding="utf-8").splitlines():
        line = re.sub(r" @([-,.])@ ", r"\1", line.strip())
        line = re.sub(r" ([,.;:!?)\]'%]|n't|'s)", r"\1", line)
        line = re.sub(r"([(\[$]) ", r"\1", line)
        yield re.sub(r'" (.*?) "', r'"\1"', line)


def show(**row: Any) -> None:
    """Print one line of JSON."""
    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
