"""What it costs to compare how the tables and transformers read a checkpoint, against hashing it once.

    python benchmarks/reading_check.py [--teacher smollm2] [--large FOLDER]

`--large` is a folder for a random model of 6.7 billion parameters with Llama 2's shape, written if it is missing (13.5
GB). Every round is a process of its own; the fingerprint is what each run reads of its teacher in any case.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 3


def peak_memory() -> int:
    """Return the most bytes that this process has held so far, pages of mapped files included."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def measure(teacher: str) -> dict[str, float]:
    """Return the seconds of the check and of the fingerprint, and the peak memory of the check in bytes."""
    from minitron.model.crosscheck import require_one_reading
    from minitron.model.source import open_teacher

    checkpoint = open_teacher(teacher)
    before = peak_memory()
    started = time.perf_counter()
    require_one_reading(checkpoint)
    check = time.perf_counter() - started
    peak = peak_memory()
    started = time.perf_counter()
    checkpoint.fingerprint()
    return {"check": check, "fingerprint": time.perf_counter() - started, "before": before, "peak": peak}


def main() -> None:
    """Measure each teacher in processes of its own and print medians with their spread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", default="smollm2")
    parser.add_argument("--large", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one)))
        return
    teachers = [options.teacher]
    if options.large:
        if not options.large.exists():
            sys.path.insert(0, str(Path(__file__).parent))
            from larger_than_memory import make

            make(options.large)
        teachers.append(str(options.large))
    for teacher in teachers:
        command = [sys.executable, __file__, "--one", teacher]
        rounds = [
            json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
            for _ in range(ROUNDS)
        ]
        for name in ("check", "fingerprint"):
            values = sorted(row[name] for row in rounds)
            print(f"{teacher}: {name} {statistics.median(values):.2f} s ({values[0]:.2f} to {values[-1]:.2f})")
        peaks = [row["peak"] - row["before"] for row in rounds]
        print(f"{teacher}: the check adds {max(peaks) / 1e9:.2f} GB to the peak of the process")


if __name__ == "__main__":
    main()
