"""Full tuning, adapters, layers in turn and noise: held-out loss, test loss, seconds and peak memory of each.

    python benchmarks/tuning.py STUDENT TRAIN TEST [--ways full:1e-4 lora:5e-4 lisa:1e-4 full:1e-4:5] [--epochs 0.08]
        [--seeds 0] [--results benchmarks/results/tuning.jsonl]

A way is a value of `distill.trains`, a peak learning rate and, if a third part is given, the α of NEFTune. TRAIN and
TEST are files as `minitron tune --data` reads them. Each way runs in a process of its own; a way whose line stands in
the results is not run again.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from minitron.files import read_json, read_jsonl

OPTIONS = ["--context", "512", "--set", "search.tokens=8k", "--dtype", "bfloat16"]


def main() -> None:
    """Run all ways; a line of JSON for each."""
    parser = argparse.ArgumentParser()
    parser.add_argument("student")
    parser.add_argument("train", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--ways", nargs="+", default=["full:1e-4", "lora:5e-4", "lisa:1e-4", "full:1e-4:5"])
    parser.add_argument("--epochs", type=float, default=0.08)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "tuning.jsonl")
    options = parser.parse_args()
    for seed in options.seeds:
        for way in ["none", *options.ways]:
            key = {"way": way, "data": options.train.name, "epochs": options.epochs, "seed": seed}
            done = read_jsonl(options.results) if options.results.exists() else []
            if any(key.items() <= row.items() for row in done):
                continue
            row = key | measure(way, seed, options)
            with options.results.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(json.dumps(row), flush=True)


def measure(way: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Tune in a process of its own and measure the perplexity of the answers in the test file."""
    with TemporaryDirectory() as folder:
        out = Path(folder) / "tuned"
        if way == "none":
            return {"test": evaluated(options.student, options.test)}
        trains, rate, *noise = way.split(":")
        settings = [f"distill.batch_size={options.batch_size}", *(f"distill.neftune_alpha={alpha}" for alpha in noise)]
        command = ["tune", options.student, str(out), "--data", str(options.train), "--epochs", str(options.epochs)]
        command += ["--method", trains, "--learning-rate", rate, "--seed", str(seed), *OPTIONS]
        for setting in settings:
            command += ["--set", setting]
        started = time.monotonic()
        process = subprocess.Popen([sys.executable, "-m", "minitron", *command])
        _, status, used = os.wait4(process.pid, 0)  # of this process alone, unlike getrusage
        if status:
            raise RuntimeError(f"{way} ended with status {status}")
        figures = {"seconds": round(time.monotonic() - started), "peak_mb": used.ru_maxrss // 1024}
        step = read_json(out / "minitron.json")["steps"][-1]
        keys = ("heldout", "tokens", "steps", "dtype", "versions", "answers")
        return figures | {key: step[key] for key in keys} | {"test": evaluated(str(out), options.test)}


def evaluated(model: str, test: Path) -> dict[str, float]:
    """Return perplexity and bits per byte of the answers in a file, of 16 thousand tokens of it."""
    command = ["evaluate", model, "--data", str(test), "--context", "512", "--max-tokens", "16k", "--dtype", "bfloat16"]
    done = subprocess.run([sys.executable, "-m", "minitron", *command, "--json"], stdout=subprocess.PIPE, check=True)
    figures = json.loads(done.stdout)
    return {key: figures[key] for key in ("perplexity", "bits_per_byte")}


if __name__ == "__main__":
    main()
