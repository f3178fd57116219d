"""Three ways to several students at equal tokens: one nested training, a chain, and separate runs.

    python benchmarks/nested.py WORK [TEACHER] [--targets 0.8,0.6,0.4] [--tokens 25600] [--seeds 0 1 2]
        [--wikitext wikitext-2/valid.txt] [--results benchmarks/results/nested.jsonl]

The nested training of the first seed searches for the shapes, which all other runs take. Each of its students gets a
share of the tokens, falling as `WEIGHTS`, and the run of that student in a chain (each cut out of the one before), or
by itself, gets as many: so all ways process equal tokens of each size. `whole` runs each student by itself on all of
the tokens, and `nested:1,1,1` is a nested training with other weights, from which the tokens of each student follow.
Each way and seed gives one line of JSON, with figures on held-out wiki text and, where it is given, on WikiText-2
validation.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from prune_quality import read_wikitext

import minitron
from minitron.evaluation.perplexity import measure_perplexity
from minitron.files import read_json, read_jsonl
from minitron.model.checkpoint import open_checkpoint
from minitron.model.language_model import load_model
from minitron.model.work import forward_flops, training_flops
from minitron.recipe import LineageRecipe, recipe_from
from minitron.run import versions
from minitron.session import Session

CONTEXT = 512
WAYS = ("nested", "chain", "separate", "whole")
WEIGHTS = (3.0, 2.0, 1.0)
"""Shares of the steps, and of the tokens, unless a way names others."""


def main() -> None:
    """Make and measure what the results lack."""
    minitron.configure_backends()
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("teacher", nargs="?", default="smollm2")
    parser.add_argument("--targets", default="0.8,0.6,0.4")
    parser.add_argument("--tokens", type=int, default=25_600)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--ways", nargs="+", default=WAYS[:3])
    parser.add_argument("--wikitext", type=Path)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "nested.jsonl")
    options = parser.parse_args()
    for seed in options.seeds:
        for way in options.ways:
            key = {"way": way, "targets": options.targets, "tokens": options.tokens, "seed": seed}
            done = read_jsonl(options.results) if options.results.exists() else []
            if not any(key.items() <= row.items() for row in done):
                row = key | students_of(way, options, seed) | {"versions": versions()}
                with options.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


def students_of(way: str, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Make the students of one way, and return their figures by target, with seconds and operations."""
    names, base = options.targets.split(","), settings(seed)
    out = options.work / f"{way}-{options.tokens}-{seed}"
    way, _, given = way.partition(":")
    if way not in WAYS:
        raise SystemExit(f"way {way}; accepted: {', '.join(WAYS)}")
    shapes, first = options.work / f"shapes-{options.targets}.json", {"distill.tokens": options.tokens}
    lineage = LineageRecipe(nested=way == "nested", weights=tuple(map(float, given.split(","))) if given else WEIGHTS)
    weights = lineage.shares(len(names))
    tokens = [options.tokens if way == "whole" else round(weight * options.tokens) for weight in weights]
    started = time.monotonic()
    if way == "nested" and not shapes.exists():
        minitron.compress(
            options.teacher, out, target_params=options.targets, **base, **first, lineage=lineage.model_dump()
        )
        shapes.write_text(json.dumps({name: open_checkpoint(out / name / "pruned").arch.sizes for name in names}))
    else:
        sizes = pruned_sizes(read_json(shapes), options.teacher)
        stages = [{"name": name, "shape": sizes[name]} for name in names]
        if way == "nested":
            minitron.compress(options.teacher, out, stages=stages, **base, **first, lineage=lineage.model_dump())
        elif way == "chain":
            for stage, number in zip(stages, tokens, strict=True):
                stage["distill"] = {"tokens": number}
            minitron.compress(options.teacher, out, stages=stages, **base)
        else:
            for stage, number in zip(stages, tokens, strict=True):
                own = {"shape": stage["shape"], "distill.tokens": number}
                minitron.compress(options.teacher, out / stage["name"], **base, **own)
    seconds, session = round(time.monotonic() - started), Session(recipe_from(None, teacher=options.teacher, **base))
    students = {name: figures(out / name, session, options.wikitext) for name in names}
    of_teacher = forward_flops(session.teacher.arch, CONTEXT)
    flops = sum(
        number * (of_teacher + training_flops(open_checkpoint(out / name / "student").arch, CONTEXT))
        for name, number in zip(names, tokens, strict=True)
    )
    return {"students": students, "tokens_of_each": tokens, "seconds": seconds, "flops": flops}


def settings(seed: int) -> dict[str, Any]:
    """Return the settings that all ways share."""
    return {
        "seed": seed, "context": CONTEXT, "dtype": "bfloat16", "calibration.tokens": 16_384,
        "evaluation.tokens": 4_096, "search.tokens": 1_024, "distill.batch_size": 1, "distill.checkpoint_seconds": 1e6,
    }  # fmt: skip


def pruned_sizes(shapes: dict[str, dict[str, int]], teacher: str) -> dict[str, dict[str, int]]:
    """Return of each shape the sizes that differ from the teacher's."""
    whole = Session(recipe_from(None, teacher=teacher)).teacher.arch.sizes
    return {name: {key: size for key, size in sizes.items() if size != whole[key]} for name, sizes in shapes.items()}


def figures(run: Path, session: Session, wikitext: Path | None) -> dict[str, Any]:
    """Return what a student's run measured, before and after its training, and its figures on far text."""
    measured = read_json(run / "eval.json")
    row = {"num_parameters": measured["student"]["num_parameters"]}
    for when, name in (("before", "pruned"), ("near", "student")):
        row[when] = {key: measured[name][key] for key in ("perplexity", "bits_per_byte")}
    if wikitext:
        model = load_model(open_checkpoint(run / "student"), session.runtime.device, session.runtime.dtype)
        far = measure_perplexity(model, read_wikitext(wikitext, session))
        row["far"] = {"perplexity": far.perplexity, "bits_per_byte": far.bits_per_byte}
    return row


if __name__ == "__main__":
    main()
