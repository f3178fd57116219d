"""What training with simulated rounding is worth in a scheme, compared with rounding alone and with plain training.

    python benchmarks/quantised_distillation.py FOLDER TEACHER STUDENT [--scheme int4] [--tokens 40k] [--rates 1e-4]
        [--ways before plain quantized] [--seeds 0] [--skip-tokens 40k]

The ways are the student before any further training, trained further as `plain` distillation, and trained further on
equal blocks with `distill.quantize`. Each model is measured as it is saved and with its matrices rounded, on the
evaluation blocks of seed 0; `--seeds` change the order of the training blocks alone. Printed are lines of JSON; a
student that exists in FOLDER is measured without being trained again.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from minitron.distillation import stored_teacher
from minitron.distillation.rounding import simulate_rounding
from minitron.distillation.trainer import Trainer
from minitron.evaluation import measure
from minitron.evaluation.agreement import Comparison, TeacherStates
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.model.language_model import load_model
from minitron.quantities import parse_count
from minitron.recipe import Recipe
from minitron.runtime import configure_backends
from minitron.session import Session

WAYS = ("before", "plain", "quantized")


def main() -> None:
    """Print a line of JSON per model that is measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("teacher")
    parser.add_argument("student", type=Path)
    parser.add_argument("--scheme", default="int4")
    parser.add_argument("--data", default="wiki")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--tokens", type=parse_count, default=40_000)
    parser.add_argument("--skip-tokens", type=int, default=40_000)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--micro-batch-size", type=int, default=1)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-4])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=WAYS)
    options = parser.parse_args()
    configure_backends()
    study = Study(options)
    if "before" in options.ways:
        study.show(study.student, way="before")
    for rate in options.rates:
        for seed in options.seeds:
            for way in WAYS[1:]:
                if way in options.ways:
                    study.train(way, rate, seed)


class Study:
    """One teacher and student, the text, and the teacher's states on the evaluation blocks."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.recipe = Recipe.model_validate(
            {
                "teacher": options.teacher, "data": options.data, "context": options.context,
                "calibration": {"tokens": options.context}, "evaluation": {"tokens": 16_384},
                "search": {"tokens": 2_048, "distill_tokens": 0},
                "distill": {"tokens": options.tokens, "batch_size": options.batch_size,
                            "micro_batch_size": options.micro_batch_size,
                            "skip_tokens": options.skip_tokens, "teacher_states": "states"},
            }
        )  # fmt: skip
        self.session = Session(self.recipe)
        self.student = open_checkpoint(options.student)
        self.states = TeacherStates(self.session.splits.evaluation)
        options.folder.mkdir(parents=True, exist_ok=True)
        with self.session.teacher_model() as model:
            figures = measure(
                model, self.session.teacher, self.states.blocks, stage="evaluate teacher", observer=self.states
            )
        print(json.dumps({"model": "teacher", "perplexity": figures["perplexity"]}), flush=True)

    def train(self, way: str, rate: float, seed: int) -> None:
        """Train the student in a way, unless that was done before, and measure it."""
        options = self.options
        scheme = options.scheme if way == "quantized" else None
        name = "-".join([way, *filter(None, [scheme]), f"{options.tokens}-rate{rate:g}-seed{seed}"])
        out, started = options.folder / name, time.monotonic()
        if not (out / "config.json").exists():
            distill = self.recipe.distill.model_copy(update={"learning_rate": rate, "quantize": scheme})
            place = f"states-{options.skip_tokens}-{options.tokens}"
            blocks = self.session.splits.train
            teacher = stored_teacher(self.session, options.folder / place, blocks, distill)
            work = options.folder / f"{name}-work"
            work.mkdir(exist_ok=True)
            runtime = replace(self.session.runtime, seed=seed)
            Trainer(teacher, distill, blocks, runtime, work, self.session.splits.heldout).distill(self.student, out)
        seconds = round(time.monotonic() - started)
        self.show(open_checkpoint(out), way=way, rate=rate, seed=seed, tokens=options.tokens, seconds=seconds)

    def show(self, checkpoint: Checkpoint, **about: Any) -> None:
        """Print the figures of a model as it is saved, and rounded."""
        row = {"student": str(self.options.student), "scheme": self.options.scheme, **about}
        for key, scheme in (("", None), ("rounded_", self.options.scheme)):
            runtime = self.session.runtime
            model = load_model(checkpoint, runtime.device, runtime.weights_dtype, runtime.attention)
            if scheme:
                simulate_rounding(model, checkpoint, scheme)
            comparison = Comparison(self.states)
            with runtime.autocast():
                figures = measure(model, checkpoint, self.states.blocks, stage=f"evaluate {key}", observer=comparison)
            row |= {key + name: round(figures[name], 5) for name in ("perplexity", "kl", "top1")}
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
