"""CPU time of what people run first: --help of every verb, inspect of a config, prune --dry-run, docs from Python.

    python benchmarks/start_up.py [--runs 5]

Each command runs in a process of its own; printed are medians (lowest to highest) of user and system seconds.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

CONFIG = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip
VERBS = ("compress", "calibrate", "search", "prune", "distill", "correct", "inspect", "evaluate", "bench", "chat",
         "report", "push")  # fmt: skip


def main() -> None:
    """Print one line per command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    with TemporaryDirectory() as folder:
        config = Path(folder) / "config.json"
        config.write_text(json.dumps(CONFIG))
        minitron = [sys.executable, "-m", "minitron"]
        commands = {
            "--help": [*minitron, "--help"],
            **{f"{verb} --help": [*minitron, verb, "--help"] for verb in VERBS},
            "inspect config.json": [*minitron, "inspect", str(config)],
            "prune --dry-run": [*minitron, "prune", str(config), "--dry-run", "--hidden-size", "3072"],
            "compress.__doc__": [sys.executable, "-c", "import minitron; print(minitron.compress.__doc__)"],
        }
        for name, command in commands.items():
            seconds = [cpu_seconds(command) for _ in range(options.runs)]
            low, high = min(seconds), max(seconds)
            print(f"{name:20} {statistics.median(seconds):.2f} s ({low:.2f} to {high:.2f})", flush=True)


def cpu_seconds(command: list[str]) -> float:
    """Return the user and system seconds of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime


if __name__ == "__main__":
    main()
