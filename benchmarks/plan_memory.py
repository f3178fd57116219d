"""Compares the memory that `minitron plan` predicts with what a distillation takes on this CPU.

    python benchmarks/plan_memory.py [--shapes 20M 60M 135M] [--dtypes float32 bfloat16] [--settings plain …]

Random models, a teacher and a student of each size, are trained for two steps of two micro-batches on blocks of 512
random tokens, each in a process of its own, in one thread. A tiny model is trained first, so that what libraries load
once is not counted. Measured is the highest resident memory (`VmHWM`) less that before the models are loaded; with
--no-reuse, glibc returns every tensor's memory as soon as it is free, so that nothing is lost between tensors. Prints a
row of the table in docs/studies/planning.md for each.
"""

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from minitron.data.blocks import Blocks
from minitron.distillation.teacher import Live
from minitron.distillation.trainer import Trainer
from minitron.evaluation.peak_memory import CLEAR_PEAK, resident
from minitron.model.checkpoint import open_checkpoint
from minitron.model.language_model import load_model
from minitron.planning.layers import Place
from minitron.planning.memory import training_memory
from minitron.progress import disable_progress
from minitron.recipe import DistillRecipe
from minitron.runtime import Runtime, configure_backends

CONTEXT = 512
SMALL = {"vocab_size": 16384, "num_hidden_layers": 8, "num_attention_heads": 6, "num_key_value_heads": 3,
         "head_dim": 64, "tie_word_embeddings": True}  # fmt: skip
MIDDLE = {"vocab_size": 32000, "num_hidden_layers": 10, "num_attention_heads": 8, "num_key_value_heads": 2,
          "head_dim": 64, "tie_word_embeddings": False}  # fmt: skip
SMOLLM2 = {"vocab_size": 49152, "tie_word_embeddings": True, "head_dim": 64}
SHAPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tiny": ({"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
              "num_attention_heads": 2, "num_key_value_heads": 1}, {}),
    "20M": (SMALL | {"hidden_size": 576, "intermediate_size": 1536}, {"hidden_size": 384, "intermediate_size": 1024}),
    "60M": (MIDDLE | {"hidden_size": 768, "intermediate_size": 2304}, {"hidden_size": 512, "intermediate_size": 1536}),
    # The shapes of SmolLM2-360M and SmolLM2-135M.
    "135M": (SMOLLM2 | {"hidden_size": 960, "intermediate_size": 2560, "num_hidden_layers": 32,
                        "num_attention_heads": 15, "num_key_value_heads": 5},
             {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
              "num_key_value_heads": 3}),
}  # fmt: skip
"""A teacher's config, and what is different in the student's."""
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "checkpointing": {"activation_checkpointing": True},
    "micro-batches of 2": {"micro_batch_size": 2, "batch_size": 4},
    "8-bit moments": {"optimizer": "adamw8bit"},
    "jsd with labels": {"loss": "jsd", "label_weight": 0.5},
    "intermediate": {"intermediate": {"of": ["embedding", "block_output"]}},
}


def main() -> None:
    """Measure every combination in a process of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["20M", "60M", "135M"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=["plain"])
    parser.add_argument("--no-reuse", action="store_true")
    parser.add_argument("--only", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only:
        print(json.dumps(compared(*options.only)))
        return
    environment = os.environ | ({"MALLOC_MMAP_THRESHOLD_": "65536"} if options.no_reuse else {})
    print("| student | dtype | settings | parameters | predicted, MB | measured, MB | error |")
    print("|---|---|---|---:|---:|---:|---:|")
    for setting in options.settings:
        for shape in options.shapes:
            for dtype in options.dtypes:
                command = [sys.executable, __file__, "--only", shape, dtype, setting]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
                row = json.loads(done.stdout.splitlines()[-1])
                error = row["predicted"] / row["measured"] - 1
                print(
                    f"| {shape} | {dtype} | {setting} | {row['num_parameters']:,} | {row['predicted'] / 1e6:,.0f} | "
                    f"{row['measured'] / 1e6:,.0f} | {error:+.1%} |",
                    flush=True,
                )


def compared(shape: str, dtype: str, setting: str) -> dict[str, float]:
    """The predicted and the measured bytes of one combination."""
    disable_progress()
    configure_backends()
    torch.set_num_threads(1)
    runtime, place = Runtime(torch.device("cpu"), getattr(torch, dtype)), Place(CONTEXT, dtype, "cpu", attention="sdpa")
    recipe = DistillRecipe(**{"tokens": 4 * CONTEXT, "batch_size": 2, **SETTINGS[setting]})
    recipe = recipe.model_copy(update={"tokens": 2 * recipe.batch_size * CONTEXT})
    with TemporaryDirectory() as folder:
        for name in ("tiny", shape):
            make(Path(folder), name)
        train(Path(folder), "tiny", recipe, runtime)
        gc.collect()
        before = resident("VmRSS")
        CLEAR_PEAK.write_text("5")
        teacher, student = train(Path(folder), shape, recipe, runtime)
        measured = resident("VmHWM") - before
    predicted = training_memory(student, teacher, recipe, place).total
    return {"num_parameters": student.num_parameters, "predicted": predicted, "measured": measured}


def make(folder: Path, name: str) -> None:
    """Write a teacher and a student with random weights, in a process that takes its memory along when it ends."""
    if (pid := os.fork()) == 0:
        teacher, changes = SHAPES[name]
        for role, values in (("teacher", teacher), ("student", teacher | changes)):
            config = AutoConfig.for_model("mistral", sliding_window=None, max_position_embeddings=CONTEXT, **values)
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / name / role)
        os._exit(0)
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError(f"the models of {name} could not be written")


def train(folder: Path, name: str, recipe: DistillRecipe, runtime: Runtime) -> tuple[Any, Any]:
    """Distil the student for all steps; return both shapes."""
    teacher, student = (open_checkpoint(folder / name / role) for role in ("teacher", "student"))
    ids = torch.randint(0, student.arch.axis_size("vocab"), (recipe.tokens // CONTEXT, CONTEXT))
    work = folder / name / "work"
    work.mkdir()
    live = Live(load_model(teacher, runtime.device, runtime.dtype))
    Trainer(live, recipe, Blocks(ids, torch.ones_like(ids)), runtime, work).trained(student)
    return teacher.arch, student.arch


if __name__ == "__main__":
    main()
