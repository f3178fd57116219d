"""Kill `minitron compress` (SIGKILL) in each stage, run it again, and compare the student bit for bit.

    python benchmarks/kill_and_resume.py FOLDER TEACHER [options of compress]

FOLDER receives one uninterrupted run and one for each kill. A run is killed a little after a stage first shows
itself in its progress lines, the later kills of the distillation after its first checkpoint.
"""

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

STAGES = ["check teacher", "calibrate", "probe", "search", "prune", "distill", "evaluate teacher", "evaluate student"]


def compress(out: Path, arguments: list[str], kill_in: str | None = None, after_checkpoint: bool = False) -> bool:
    """Run compress; with `kill_in`, kill it once that stage is at work. Returns whether it was killed."""
    code = (
        # The stage is announced when it is entered, so that even the shortest can be hit.
        "from minitron import progress, cli\n"
        "enter = progress.Progress.__enter__\n"
        "def announced(self):\n"
        "    print('ENTER', self.stage, flush=True)\n"
        "    return enter(self)\n"
        "progress.Progress.__enter__ = announced\n"
        "cli.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, "compress", arguments[0], str(out), *arguments[1:]],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        if kill_in and line.strip() == f"ENTER {kill_in}":
            if after_checkpoint:
                while not (out / "checkpoint").is_dir() and process.poll() is None:
                    time.sleep(0.05)
            threading.Event().wait(0.3 if kill_in in {"distill", "calibrate", "evaluate student"} else 0.02)
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
            break
    process.stdout.read()
    return process.wait() == -signal.SIGKILL


def weights_hash(out: Path) -> str:
    """SHA-256 of the student's weights."""
    return hashlib.sha256((out / "student" / "model.safetensors").read_bytes()).hexdigest()


def main() -> None:
    """Print a line a kill."""
    folder, arguments = Path(sys.argv[1]), sys.argv[2:]
    compress(folder / "whole", arguments)
    expected = weights_hash(folder / "whole")
    print(f"uninterrupted: {expected}")
    failed = False
    for stage, after_checkpoint in [*((stage, False) for stage in STAGES), ("distill", True)]:
        out = folder / f"{stage.replace(' ', '-')}{'-after-checkpoint' if after_checkpoint else ''}"
        killed = compress(out, arguments, kill_in=stage, after_checkpoint=after_checkpoint)
        compress(out, arguments)
        same = weights_hash(out) == expected
        failed |= not (same and killed)
        print(
            f"{out.name}: {'killed' if killed else 'NOT KILLED'}, {'same bits' if same else 'OTHER BITS'}", flush=True
        )
    sys.exit(failed)


if __name__ == "__main__":
    main()
