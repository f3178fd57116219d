"""Everything that a GPU has to show, part by part, in one JSON file: `benchmarks/on_gpu.sh`, docs/how-to/gpu.md.

Each part runs in a process of its own, so that one that runs out of memory or time costs no other. Its figures are
written one by one; a run that is cut off leaves those that it has measured.
"""

import argparse
import contextlib
import gc
import importlib.metadata
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "transformers", "triton", "liger-kernel", "flash-attn", "torchao", "nvidia-nccl-cu13", "numpy")
SEED = 0
NAMES = ("teacher", "loss", "accuracy", "step", "attention", "fsdp", "compress", "search", "tests")
"""The parts in the order in which they run."""
GPU_ALONE = "a GPU"
TINY_LIMIT = 180.0
"""Seconds of a part at tiny size."""


@dataclass
class Part:
    """Where a part runs, and the figures that it has measured so far, which are written whenever one is added."""

    name: str
    work: Path
    """A folder that the parts share."""
    is_tiny: bool = False
    figures: list[dict[str, Any]] = field(default_factory=list)

    @property
    def device(self) -> Any:
        """The GPU, or the CPU where there is none or all is tiny."""
        import torch

        return torch.device("cuda", 0) if torch.cuda.is_available() and not self.is_tiny else torch.device("cpu")

    @property
    def on_gpu(self) -> bool:
        """Whether there is a GPU to measure."""
        return bool(self.device.type == "cuda")

    @property
    def dtype(self) -> Any:
        """bfloat16 on a GPU, float32 on a CPU."""
        import torch

        return torch.bfloat16 if self.on_gpu else torch.float32

    @property
    def runtime(self) -> Any:
        """Where models of the part run."""
        from minitron.runtime import Runtime

        return Runtime(self.device, self.dtype, SEED)

    @property
    def teacher(self) -> Path:
        """The folder of the teacher that the part `teacher` made."""
        return self.work / "teacher"

    @property
    def text(self) -> Path:
        """The text that the part `teacher` wrote."""
        return self.work / "text.txt"

    @contextmanager
    def figure(self, name: str, **given: Any) -> Iterator[dict[str, Any]]:
        """Yield a dictionary to fill in; whatever fails within the block becomes its error."""
        row: dict[str, Any] = {
            "name": name, "device": device_in_words(self.device), "dtype": str(self.dtype).removeprefix("torch."),
            "seed": SEED, **given,
        }  # fmt: skip
        try:
            yield row
        except Exception as error:
            row["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:600]
        self.figures.append(row)
        written(self.work / f"{self.name}.json", self.figures)
        gc.collect()
        if self.on_gpu:
            import torch

            torch.cuda.empty_cache()

    def skip(self, name: str) -> None:
        """Add a figure that only a GPU can give."""
        with self.figure(name) as row:
            row["needs"] = GPU_ALONE

    @contextmanager
    def peak(self, row: dict[str, Any]) -> Iterator[None]:
        """Add the most memory that tensors take on the GPU within the block, beyond what they took before it."""
        if not self.on_gpu:
            yield
            row |= {"extra_mb": None, "needs": f"{GPU_ALONE}, for extra_mb"}
            return
        import torch

        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield
        torch.cuda.synchronize()
        row["extra_mb"] = (torch.cuda.max_memory_allocated() - before) / 2**20

    def seconds(self, function: Callable[[], object]) -> float:
        """Return the seconds of a call, with all that it has the GPU do."""
        import torch

        started = time.perf_counter()
        function()
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - started


def device_in_words(device: Any) -> str:
    """Return the name of a device, with that of the chip."""
    import torch

    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    return f"cpu ({processor()}, {torch.get_num_threads()} threads)"


def processor() -> str:
    """Return the name of this machine's processor."""
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def versions() -> dict[str, str | None]:
    """Return the versions of what the figures depend on; None: it is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    shown = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return found | {"minitron": shown.stdout.strip() or None}


def written(path: Path, value: Any) -> None:
    """Write JSON that appears whole or not at all."""
    path.with_suffix(".part").write_text(json.dumps(value, indent=1) + "\n")
    path.with_suffix(".part").replace(path)


def run_alone(name: str, limit: float, work: Path, is_tiny: bool) -> dict[str, Any]:
    """Run a part in a process of its own and return what it measured; one that runs past its limit is ended."""
    command = [sys.executable, "-m", "benchmarks.on_gpu", "--only", name, "--work", str(work)]
    log, started = work / f"{name}.log", time.perf_counter()
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *(["--tiny"] if is_tiny else [])], cwd=ROOT, stdout=output, stderr=output, start_new_session=True
        )
        code: int | None = None
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            for number in (signal.SIGTERM, signal.SIGKILL):  # torchrun ends its own processes at the first one
                os.killpg(process.pid, number)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(3)
                    break
    found, lines = work / f"{name}.json", log.read_text(errors="replace").strip().splitlines()
    row: dict[str, Any] = {"seconds": time.perf_counter() - started, "limit": limit}
    if code != 0:
        reason = f"ended with {code}: {lines[-1] if lines else ''}"[:600]
        row["error"] = f"took longer than {limit:g} seconds" if code is None else reason
    return row | {"figures": json.loads(found.read_text()) if found.exists() else []}


def main() -> None:
    """Run the parts one after the other, or with `--only` one of them in this process."""
    parser = argparse.ArgumentParser(prog="benchmarks/on_gpu.sh")
    parser.add_argument("out", type=Path, nargs="?", default=Path("on_gpu.json"))
    parser.add_argument("--tiny", action="store_true", help="every part at tiny size, on the CPU")
    parser.add_argument("--parts", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--only", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--limits", default="", help="seconds by part: loss=100,step=60")
    given = parser.parse_args()
    if given.only:
        # The process that starts the others never imports torch, which would hold memory of the GPU.
        from benchmarks.gpu_parts import PARTS

        PARTS[given.only](Part(given.only, given.work, given.tiny))
        return
    limits = {name: float(limit) for name, limit in (each.split("=") for each in given.limits.split(",") if each)}
    if given.tiny:  # on a busy CPU, starting Python takes longer than all that follows
        limits = dict.fromkeys(NAMES, TINY_LIMIT)
    report: dict[str, Any] = {"versions": versions(), "is_tiny": given.tiny, "parts": {}}
    with TemporaryDirectory(prefix="minitron-on-gpu-") as folder:
        for name in NAMES:
            if name in given.parts:
                report["parts"][name] = run_alone(name, limits.get(name, 60.0), Path(folder), given.tiny)
                written(given.out, report)
                print(f"{name}: {in_words(report['parts'][name])}", flush=True)
    print(given.out)


def in_words(row: dict[str, Any]) -> str:
    """Return a part's outcome in one line."""
    failed = [each["name"] for each in row["figures"] if "error" in each]
    notes = [row["error"]] if "error" in row else []
    notes += [f"failed: {', '.join(failed)}"] if failed else []
    return f"{len(row['figures'])} figures in {row['seconds']:.0f} s" + "".join(f"; {note}" for note in notes)


if __name__ == "__main__":
    main()
