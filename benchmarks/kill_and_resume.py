"""Kill `minitron compress` (SIGKILL) in each stage, run it again, and compare the student bit for bit.

    python benchmarks/kill_and_resume.py FOLDER TEACHER [options of compress]
    python benchmarks/kill_and_resume.py FOLDER TEACHER --random 20 [options of compress]

FOLDER receives one uninterrupted run and one for each kill. A run is killed a little after a stage first shows
itself in its progress lines, the later kills of the distillation after its first checkpoint. With `--random`, runs are
killed at moments drawn at random over their length instead, each continued and killed again until it is done.
"""

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

STAGES = ["check teacher", "calibrate", "probe", "search", "prune", "distill", "evaluate teacher", "evaluate student"]


def start(program: list[str], out: Path, arguments: list[str]) -> subprocess.Popen[str]:
    """The program's compress at work."""
    return subprocess.Popen(
        [sys.executable, *program, "compress", arguments[0], str(out), *arguments[1:]],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip


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
    process = start(["-c", code], out, arguments)
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


def kill_at_random(folder: Path, arguments: list[str], count: int, seconds: float, expected: str) -> bool:
    """Whether all runs that were killed, `count` times altogether, came to the same bits."""
    rng, killed, runs = random.Random(0), 0, 0
    while killed < count:
        out, kills = folder / f"random-{runs}", []
        while killed < count:
            moment = rng.uniform(0, seconds)
            process = start(["-m", "minitron"], out, arguments)
            try:
                process.wait(moment)
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                killed += 1
                kills.append(f"{moment:.1f}")
        compress(out, arguments)
        same = weights_hash(out) == expected
        print(f"{out.name}: killed after {', '.join(kills)} s: {'same bits' if same else 'OTHER BITS'}", flush=True)
        if not same:
            return False
        runs += 1
    return True


def main() -> None:
    """Print a line a kill."""
    folder, arguments = Path(sys.argv[1]), sys.argv[2:]
    count = None
    if "--random" in arguments:
        where = arguments.index("--random")
        count = int(arguments[where + 1])
        del arguments[where : where + 2]
    started = time.monotonic()
    compress(folder / "whole", arguments)
    seconds, expected = time.monotonic() - started, weights_hash(folder / "whole")
    print(f"uninterrupted, {seconds:.0f} s: {expected}", flush=True)
    if count is not None:
        sys.exit(not kill_at_random(folder, arguments, count, seconds, expected))
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
