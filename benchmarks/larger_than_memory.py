"""Measures calibrating and pruning a model larger than memory: peak memory, and time against a copy of the bytes.

    python benchmarks/larger_than_memory.py FOLDER [--sizes 2 7] [--layers 8] [--repairs] [--rounds N]

Makes random bfloat16 checkpoints of about 2 and 7 billion parameters in FOLDER (once; 4 and 14 GB), then, each in a
process of its own: calibrates on 16 blocks of 512 random tokens; then, round after round, prunes to about 4/7 by the
plain method and copies the bytes that pruning reads and writes; and with --repairs prunes once with rotation, rescaled
norms and refit. Prints a line of JSON for each: seconds and peak memory, in all (`VmHWM`) and without the pages of
mapped files (`RssAnon`); and at the end the ratio of the time of pruning to that of the copy: median, lowest, highest.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

SHAPES: dict[tuple[str, int], dict[str, int]] = {
    ("llama", 2): {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24, "num_attention_heads": 32,
                   "num_key_value_heads": 8, "head_dim": 64},
    ("llama", 7): {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
                   "num_key_value_heads": 32, "head_dim": 128},
    ("nemotron", 2): {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 32,
                      "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
    ("nemotron", 7): {"hidden_size": 4096, "intermediate_size": 16384, "num_hidden_layers": 32,
                      "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
}  # fmt: skip
CUTS = {
    2: {"hidden_size": 1536, "intermediate_size": 6144},
    7: {"hidden_size": 3072},
}
CUT_FFN = {("llama", 7): 8192, ("nemotron", 7): 10240}
VOCABULARY = 32_000


def main() -> None:
    """Make checkpoints and start a process for each measurement."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--families", nargs="+", default=["llama", "nemotron"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[2, 7])
    parser.add_argument("--layers", type=int, help="number of layers, instead of those of the size")
    parser.add_argument("--repairs", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--stage", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stage:
        stage(options.stage, options.folder)
        return
    for family in options.families:
        for size in options.sizes:
            folder = options.folder / (f"{family}-{size}b" + (f"-{options.layers}" if options.layers else ""))
            if not folder.exists():
                alone("make", folder)
            if not folder.with_name(f"{folder.name}.importance").exists():
                alone("calibrate", folder)
            if options.repairs:
                alone("repair", folder)
            ratios = [alone("prune", folder) / alone("copy", folder) for _ in range(options.rounds)]
            spread = statistics.median(ratios), min(ratios), max(ratios)
            print(json.dumps({"model": folder.name, "prune_to_copy": [round(r, 2) for r in spread]}), flush=True)


def alone(name: str, folder: Path) -> float:
    """Run one stage in a process of its own; return its seconds."""
    command = [sys.executable, __file__, str(folder), "--stage", name]
    line = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    print(line, end="", flush=True)
    return float(json.loads(line)["seconds"])


def stage(name: str, folder: Path) -> None:
    """Run a stage and print its time and memory, without the imports."""
    import minitron.pipeline  # noqa: F401

    anonymous = AnonymousPeak()
    started = time.monotonic()
    stages = {"make": make, "calibrate": calibrated, "prune": pruned, "repair": pruned_and_repaired, "copy": copied}
    details = stages[name](folder)
    seconds = time.monotonic() - started
    peak = status("VmHWM")
    print(json.dumps({"model": folder.name, "stage": name, "seconds": round(seconds, 1),
                      "peak_gb": round(peak / 1e9, 2), "peak_anonymous_gb": round(anonymous.stop() / 1e9, 2),
                      **details}), flush=True)  # fmt: skip


def status(entry: str) -> int:
    """Return a size that the kernel reports of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(entry)).split()[1]) * 1024


class AnonymousPeak:
    """Watches the anonymous memory, which belongs to no file and which the kernel cannot take back."""

    def __init__(self) -> None:
        self.peak, self.done = 0, threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _watch(self) -> None:
        while not self.done.wait(0.02):
            self.peak = max(self.peak, status("RssAnon"))

    def stop(self) -> int:
        """Stop watching; return the peak in bytes."""
        self.done.set()
        self.thread.join()
        return self.peak


def named(folder: Path) -> tuple[str, int, int]:
    """Return the family, billions of parameters and number of layers (0 for all) in a folder's name."""
    family, size, *layers = folder.name.split("-")
    return family, int(size.removesuffix("b")), int(layers[0]) if layers else 0


def make(folder: Path) -> dict[str, Any]:
    """Write a random checkpoint, tensor by tensor."""
    from transformers import AutoConfig

    from minitron.files import whole_folder
    from minitron.model.arch import Arch
    from minitron.model.checkpoint import expected_shapes
    from minitron.model.writing import write_checkpoint

    family, size, layers = named(folder)
    sizes = SHAPES[family, size] | ({"num_hidden_layers": layers} if layers else {})
    config = AutoConfig.for_model(family, vocab_size=VOCABULARY, max_position_embeddings=4096,
                                  tie_word_embeddings=False, **sizes)  # fmt: skip
    config.dtype = torch.bfloat16
    config.architectures = [{"llama": "LlamaForCausalLM", "nemotron": "NemotronForCausalLM"}[family]]
    arch, generator = Arch.from_config(config.to_dict()), torch.Generator().manual_seed(0)

    def tensor(shape: tuple[int, ...]) -> torch.Tensor:
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.bfloat16)
        return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)

    with whole_folder(folder) as staging:
        write_checkpoint(staging, config, ((name, tensor(shape)) for name, shape in expected_shapes(arch)), folder)
    return {"num_parameters": arch.num_parameters}


def inputs(folder: Path) -> tuple[Any, Any]:
    """Return the checkpoint, and 16 blocks of 512 random tokens."""
    from minitron.data.blocks import Blocks
    from minitron.model.checkpoint import open_checkpoint

    ids = torch.randint(0, VOCABULARY, (16, 512), generator=torch.Generator().manual_seed(1))
    return open_checkpoint(folder), Blocks(ids, torch.ones_like(ids, dtype=torch.int32))


def calibrated(folder: Path) -> dict[str, Any]:
    """Measure scores, block influence and the moment of the stream."""
    from safetensors.torch import save_file

    from minitron.pruning.calibrate import calibrate
    from minitron.pruning.scores import score
    from minitron.recipe import CalibrationRecipe
    from minitron.runtime import Runtime

    teacher, blocks = inputs(folder)
    recipe, runtime = CalibrationRecipe(), Runtime(torch.device("cpu"), torch.bfloat16)
    statistics = calibrate(teacher, blocks, recipe=recipe, runtime=runtime, others=blocks[:1])
    scores = {name: value.contiguous() for name, value in score(statistics, teacher, recipe).items()}
    save_file(scores, folder.parent / f"{folder.name}.importance")
    return {"tokens": blocks.num_tokens}


def pruned(folder: Path, repairs: bool = False) -> dict[str, Any]:
    """Cut the checkpoint to about 4/7, without repairs or with all of them."""
    from safetensors.torch import load_file

    from minitron.files import whole_folder
    from minitron.pruning.cut import cut_to, write_pruned
    from minitron.pruning.repair import repaired
    from minitron.recipe import CUT_ONLY, PruneRecipe
    from minitron.runtime import Runtime

    teacher, blocks = inputs(folder)
    family, size, _ = named(folder)
    sizes = dict(CUTS[size])
    if ffn := CUT_FFN.get((family, size)):
        sizes["intermediate_size"] = ffn
    student, recipe = teacher.arch.resized(**sizes), PruneRecipe(refit=True) if repairs else CUT_ONLY
    importance = load_file(folder.parent / f"{folder.name}.importance")
    out = folder.parent / f"{folder.name}-pruned"
    cut = cut_to(student, teacher, importance, recipe)
    runtime = Runtime(torch.device("cpu"), torch.bfloat16)
    tensors = repaired(teacher, cut, blocks=blocks, recipe=recipe, runtime=runtime)
    with whole_folder(out) as staging:
        write_pruned(teacher, cut, tensors, staging)
    return {"num_parameters": student.num_parameters, "read_gb": round(teacher.num_bytes / 1e9, 2),
            "written_gb": round(2 * student.num_parameters / 1e9, 2)}  # fmt: skip


def pruned_and_repaired(folder: Path) -> dict[str, Any]:
    """Cut the checkpoint to about 4/7 with rotation, rescaled norms and refit."""
    return pruned(folder, repairs=True)


def copied(folder: Path) -> dict[str, Any]:
    """Read the teacher once and write the student once, which pruning cannot do without."""
    buffer, student = bytearray(64 * 2**20), folder.parent / f"{folder.name}-pruned"
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    scratch = folder.parent / "copy"
    for path in sorted(student.glob("*.safetensors")):
        with path.open("rb") as source, scratch.open("wb") as target:
            shutil.copyfileobj(source, target, 64 * 2**20)
    scratch.unlink()
    return {}


if __name__ == "__main__":
    main()
