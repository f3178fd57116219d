"""Makes the students of arms, measures them, and appends one row of JSON per arm and seed; rows that exist are kept."""

import json
import math
import platform
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import minitron
from benchmarks.papers.arms import Arm, Place, Step
from benchmarks.papers.teachers import CONTEXT, Text
from minitron.distillation import correct, distill
from minitron.evaluation import generation, measure
from minitron.evaluation.agreement import Comparison, TeacherStates
from minitron.files import read_jsonl
from minitron.model.anatomy import AXES
from minitron.model.arch import Arch
from minitron.model.checkpoint import open_checkpoint
from minitron.model.language_model import load_model
from minitron.pruning import measure_importance, prune, write_random
from minitron.recipe import Recipe, recipe_from
from minitron.run import versions
from minitron.session import Session

Row = dict[str, Any]

EVALUATION_TOKENS = 8_192
CORRECTION_UNITS = 1.0
"""Tokens on which a teacher is corrected, in units."""
BASE: dict[str, Any] = {
    # The papers' scores, aggregation and merging of heads; no repair that the papers do not have.
    "calibration": {
        "tokens": 8_192, "batch": "l2", "sequence": "mean", "ffn_scores": "first_linear",
        "head_scores": "aggregate_of_norms",
    },
    "depth": {"score": "block_influence", "removal": "one_shot", "tokens": 2_048},
    "prune": {"rotate": False, "rescale_norms": False, "refit": False, "merge_heads": True},
    "distill": {
        "batch_size": 8, "micro_batch_size": 8, "learning_rate": 4e-3, "loss": "forward_kl", "temperature": 1.0,
        "label_weight": 0.0, "intermediate": {"of": []}, "stored_dtype": "float32",
    },
    "search": {"tokens": 2_048},
    "evaluation": {"tokens": EVALUATION_TOKENS},
}  # fmt: skip
"""Settings of all arms: logits alone teach, by forward KL."""


@dataclass(frozen=True)
class Bench:
    """What all arms share: the folder of rows and caches, the teacher, the texts, and the length of a unit."""

    out: Path
    teacher: Path
    texts: Path
    tokens: int = 60_000
    """Tokens in a unit."""
    context: int = CONTEXT

    @property
    def rows_file(self) -> Path:
        """The file of rows."""
        return self.out / f"{self.teacher.name}.jsonl"

    def rows(self) -> list[Row]:
        """Return the rows that exist."""
        return read_jsonl(self.rows_file)

    def recipe(self, arm: Arm, seed: int, teacher: Path, **settings: Any) -> Recipe:
        """Return the recipe of an arm: the base, the arm's settings, then the given ones."""
        merged = _merged(_merged(BASE, arm.settings), settings)
        return recipe_from(
            None, teacher=teacher, data=str(self.texts / f"{arm.text}.jsonl"), context=self.context, seed=seed, **merged
        )

    @cache  # noqa: B019 - a command has one bench
    def teacher_states(self, text: Text) -> TeacherStates:
        """Return the teacher's states on the blocks of evaluation.

        These are of documents that nothing is trained on, and equal for all seeds.
        """
        data = str(self.texts / f"{text}-kept-out.jsonl")
        session = Session(self.recipe(Arm(()), 0, self.teacher).model_copy(update={"data": data}))
        states = TeacherStates(session.splits.evaluation)
        with session.teacher_model() as teacher:
            measure(teacher, session.teacher, states.blocks, stage="evaluate", observer=states)
        return states


def run(bench: Bench, arms: Mapping[str, Arm], seeds: list[int]) -> None:
    """Append the rows of arms that are missing, seed after seed."""
    bench.out.mkdir(parents=True, exist_ok=True)
    generation.CONTINUATION_TOKENS = 1  # text that students generate on the way is not read here
    for seed in seeds:
        for name, arm in arms.items():
            identity = _identity(bench, name, arm, seed)
            if any(identity.items() <= row.items() for row in bench.rows()):
                continue
            started = time.monotonic()
            with TemporaryDirectory(dir=bench.out, prefix=".arm-") as folder:
                figures = _figures(bench, arm, seed, Path(folder))
            row = identity | figures | {"seconds": round(time.monotonic() - started, 1)} | _circumstances()
            with bench.rows_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
            print(f"{name}, seed {seed}: {figures['before']} → {figures.get('after')}", flush=True)


def _identity(bench: Bench, name: str, arm: Arm, seed: int) -> Row:
    """Return the entries by which a row is found again: the arm as defined, its seed, unit, context and teacher."""
    teacher = {"name": bench.teacher.name, "fingerprint": open_checkpoint(bench.teacher).fingerprint()[:16]}
    made = json.loads(json.dumps(asdict(arm)))
    return {"arm": name, "seed": seed, "unit": bench.tokens, "context": bench.context, "teacher": teacher, "made": made}


def _figures(bench: Bench, arm: Arm, seed: int, folder: Path) -> Row:
    """Make a student step by step; return its shape, its losses before and after the last training, and its curve."""
    teacher, model = _corrected(bench, arm, seed, folder), bench.teacher
    if arm.correction == "is pruned and teaches":
        model = teacher
    figures: Row = {"tokens": round(sum(step.tokens for step in arm.steps) * bench.tokens)}
    for number, step in enumerate(arm.steps):
        # Every step has an order of its own, so that later steps do not read the beginning of the text again.
        session = Session(_recipe(bench, arm, step, seed + 1000 * number, teacher), larger=model)
        pruned, work = folder / f"pruned-{number}", folder / f"work-{number}"
        shape = shape_of(session.teacher.arch, step.shares)
        if arm.random:
            write_random(session, shape, {}, pruned)
        else:
            removed = session.source.arch.axis_size("layer") - shape.axis_size("layer")
            prune(session, shape, measure_importance(session, {removed}), pruned)
        model = pruned
        figures["before"] = _measured(bench, arm, pruned)
        if step.tokens:
            model = _trained(session, step, pruned, work)
            figures["after"] = _measured(bench, arm, model)
            figures["curve"] = [
                [row["tokens"], round(math.log(row["heldout_perplexity"]), 4)]
                for row in read_jsonl(work / "metrics.jsonl")
                if "heldout_perplexity" in row
            ]
    arch = open_checkpoint(model).arch
    return figures | {
        "num_parameters": arch.num_parameters,
        "num_non_embedding_parameters": arch.num_non_embedding_parameters,
        "sizes": dict(arch.sizes),
        "evaluation_tokens": bench.teacher_states(arm.text).blocks.num_tokens,
    }


def _recipe(bench: Bench, arm: Arm, step: Step, seed: int, teacher: Path) -> Recipe:
    tokens = max(1, round(step.tokens * bench.tokens))
    changes: Row = {"tokens": tokens}
    recipe = bench.recipe(arm, seed, teacher, distill=changes)
    distilling = recipe.distill
    if arm.layers:
        arch = open_checkpoint(bench.teacher).arch
        depths = arch.axis_size("layer"), shape_of(arch, step.shares).axis_size("layer")
        pairs = [tuple(map(layer_number, pair, depths)) for pair in arm.layers]
        changes["intermediate"] = {**distilling.intermediate.model_dump(), "layers": pairs}
    elif distilling.correction.trains == "nothing" and arm.correction == "no" and step.loss == "distil":
        # Equal for all arms that read this text in this order.
        changes["teacher_states"] = str(bench.out / ".states" / f"{bench.teacher.name}-{arm.text}-{seed}-{tokens}")
    return bench.recipe(arm, seed, teacher, distill=changes)


def _corrected(bench: Bench, arm: Arm, seed: int, folder: Path) -> Path:
    """Return the teacher of an arm, after its correction on the arm's text if the arm has one."""
    if arm.correction == "no":
        return bench.teacher
    changes = {"tokens": round(CORRECTION_UNITS * bench.tokens), "correction": {"original": {"learning_rate": 2e-3}}}
    session, out = Session(bench.recipe(arm, seed, bench.teacher, distill=changes)), folder / "teacher"
    correct(session, out, folder / "correction")
    return out


def _trained(session: Session, step: Step, pruned: Path, work: Path) -> Path:
    out = work / "student"
    if step.loss == "distil":
        distill(session, open_checkpoint(pruned), out, work)
    else:
        correct(Session(session.recipe.model_copy(update={"teacher": str(pruned)})), out, work)
    return out


def _measured(bench: Bench, arm: Arm, folder: Path) -> dict[str, float]:
    """Return loss and KL to the original teacher, in nats per token of the text that is kept out."""
    states, checkpoint = bench.teacher_states(arm.text), open_checkpoint(folder)
    runtime = Session(bench.recipe(arm, 0, bench.teacher)).runtime
    student = load_model(checkpoint, runtime.device, runtime.dtype)
    figures = measure(student, checkpoint, states.blocks, stage="evaluate", observer=Comparison(states))
    return {"loss": round(math.log(figures["perplexity"]), 5), "kl": round(figures["kl"], 5)}


def shape_of(arch: Arch, shares: Mapping[str, float]) -> Arch:
    """Return a shape whose sizes are shares of those of `arch`; multiples of 8 stay such, groups stay whole."""
    groups = {AXES[axis]: arch.axis_size(group) for axis, group in arch.grouped.items()}
    sizes = {}
    for name, share in shares.items():
        size = arch.sizes[name]
        unit = groups.get(name) or (8 if size % 8 == 0 and size > 32 else 1)
        sizes[name] = max(unit, round(size * share / unit) * unit)
    return arch.resized(**sizes)


def layer_number(place: Place, depth: int) -> int:
    """Return the number of a layer, counted from 0, in a model of some depth."""
    return max(0, depth + place) if isinstance(place, int) else round(place * depth) - 1


def _merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _circumstances() -> Row:
    """Return versions, the kind of machine, and the last commit that changed the package; nothing names the machine."""
    package = Path(minitron.__file__).parent
    last = ["git", "log", "-1", "--format=%h", "--", "."]
    commit = subprocess.run(last, cwd=package, capture_output=True, text=True).stdout.strip()
    return {"versions": versions(), "machine": machine(), "commit": commit}


def machine() -> str:
    """Return the kind of processor, its instruction set, and the number of threads or the GPU."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.machine()} CPU, {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} thread(s)"
