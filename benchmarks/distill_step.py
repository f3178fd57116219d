"""Tokens a second and peak memory of a distillation step: ours, live and from stored states, and TRL's GKD trainer.

    python benchmarks/distill_step.py [TEACHER] [--batch-size 4] [--steps 4] [--rounds 3] [--ways live stored trl]
        [--ways stored stored-24576 stored-8192]

SmolLM2 teaches a student of about two thirds of its parameters (random weights: time does not depend on them) on the
same blocks of 512 tokens, AdamW, float32. Each way runs in a process of its own, in turn, its first step not counted.
TRL (`pip install trl`) runs its trainer at λ = 0, β = 0: forward KL on given text. Ours takes micro-batches of one
block, TRL all blocks of a step at once, or one by one with --trl-micro-batches. A way with a number trains a student
with that many of the teacher's tokens.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from kd_loss import memory_mb, spread

from minitron.distillation import stored_teacher
from minitron.distillation.objective import Objective
from minitron.distillation.optimizers import make_optimizer, take_step
from minitron.distillation.teacher import Live
from minitron.model.config import student_config
from minitron.model.language_model import Headless, load_model
from minitron.pruning import over_vocabulary
from minitron.recipe import Recipe
from minitron.session import Session

SIZES = {"hidden_size": 448, "intermediate_size": 1152}
CONTEXT = 512


def main() -> None:
    """All ways in turn; medians, spread, and ratios within a round."""
    parser = argparse.ArgumentParser()
    parser.add_argument("teacher", nargs="?", default="smollm2")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trl-micro-batches", action="store_true")
    parser.add_argument("--ways", nargs="+", default=["live", "stored", "trl"])
    parser.add_argument("--only", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(measure(options.only, options)))
        return
    rounds: list[dict[str, dict[str, float]]] = []
    for _ in range(options.rounds):
        rounds.append({way: alone(way) for way in options.ways})
        print(json.dumps(rounds[-1]), flush=True)
    for way in options.ways:
        for key in ("tokens_per_second", "peak_mb"):
            line = f"{way:>13} {key:>18}: {spread([found[way][key] for found in rounds])}"
            base = "trl" if "trl" in options.ways else options.ways[0]
            line += f", {spread([found[way][key] / found[base][key] for found in rounds])} of {base}"
            print(line)


def alone(way: str) -> dict[str, float]:
    """One way in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:], "--only", way]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(way: str, options: argparse.Namespace) -> dict[str, float]:
    """The median rate of the steps behind the first, and peak memory."""
    tokens = CONTEXT * options.batch_size
    session = Session(Recipe.model_validate({
        "teacher": options.teacher, "context": CONTEXT, "dtype": "float32", "calibration": {"tokens": tokens},
        "search": {"tokens": CONTEXT}, "evaluation": {"tokens": CONTEXT},
        "distill": {"tokens": tokens * (options.steps + 1), "batch_size": options.batch_size},
        "vocabulary": {"least_coverage": 0.0},
    }))  # fmt: skip
    way, _, vocab_size = way.partition("-")
    if vocab_size:
        session = over_vocabulary(session, int(vocab_size))
    steps = trl_steps(session, options) if way == "trl" else our_steps(session, way, options)
    seconds, started = [], time.perf_counter()
    for _ in steps:
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
    return {"tokens_per_second": tokens / statistics.median(seconds[1:]), "peak_mb": memory_mb("VmHWM")}


def make_student(session: Session) -> Any:
    """Random, of two thirds of the parameters."""
    from transformers import AutoModelForCausalLM

    arch = session.source.arch.resized(**SIZES)
    torch.manual_seed(0)
    config = student_config(session.source, arch, list(range(arch.axis_size("layer"))))
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32).to(session.runtime.device)


def our_steps(session: Session, way: str, options: argparse.Namespace) -> Iterator[None]:
    """Steps of our loop."""
    student, recipe, blocks = Headless(make_student(session)), session.recipe.distill, session.splits.train
    with TemporaryDirectory() as folder:
        if way == "stored":
            # The model goes when its states are written; how long that takes is not part of a step.
            stated = [json.dumps(session.recipe.model_dump()), folder, str(session.source.arch.axis_size("vocab"))]
            subprocess.run([sys.executable, "-c", STORE, *stated], check=True)
            teacher = stored_teacher(session, Path(folder) / "states", blocks, recipe)
        else:
            teacher = Live(load_model(session.teacher, session.runtime.device, session.runtime.dtype))
        optimizer = make_optimizer(student, recipe)
        for step in range(options.steps + 1):
            numbers = torch.arange(step * options.batch_size, (step + 1) * options.batch_size)
            loss, *_ = Objective(teacher, recipe, session.runtime).accumulate(student, blocks[numbers], numbers)
            take_step(student, optimizer, 1e-4, 1.0, float(loss))
            yield


STORE = """
import json, sys
from pathlib import Path
from minitron.distillation import stored_teacher
from minitron.pruning import over_vocabulary
from minitron.recipe import Recipe
from minitron.session import Session
session = over_vocabulary(Session(Recipe.model_validate(json.loads(sys.argv[1]))), int(sys.argv[3]))
stored_teacher(session, Path(sys.argv[2]) / "states", session.splits.train, session.recipe.distill)
"""


def trl_steps(session: Session, options: argparse.Namespace) -> Iterator[None]:
    """Steps of TRL's trainer, which runs in a thread of its own so that they can be counted from here."""
    import queue
    import threading

    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    from minitron.data.tokens import load_tokenizer

    done: queue.Queue[bool] = queue.Queue()

    class Count(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            done.put(True)

    def collate(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        ids = torch.tensor([row["input_ids"] for row in rows])
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}

    device = session.runtime.device
    teacher = load_model(session.teacher, device, session.runtime.dtype)
    per_device = 1 if options.trl_micro_batches else options.batch_size
    with TemporaryDirectory() as folder:
        trainer = GKDTrainer(
            model=make_student(session), teacher_model=teacher, data_collator=collate, callbacks=[Count()],
            args=GKDConfig(
                output_dir=folder, lmbda=0.0, beta=0.0, temperature=1.0, max_steps=options.steps + 1,
                per_device_train_batch_size=per_device, gradient_accumulation_steps=options.batch_size // per_device,
                learning_rate=1e-4, save_strategy="no", report_to=[], use_cpu=device.type == "cpu", bf16=False,
                gradient_checkpointing=False, disable_tqdm=True,
            ),
            train_dataset=Dataset.from_dict({"input_ids": session.splits.train.ids.tolist()}),
            processing_class=load_tokenizer(session.teacher.folder),
        )  # fmt: skip
        thread = threading.Thread(target=trainer.train, daemon=True)
        thread.start()
        for _ in range(options.steps + 1):
            done.get()
            yield
        thread.join()


if __name__ == "__main__":
    main()
