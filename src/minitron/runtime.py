"""Where and how a run computes: device, dtype, seed, the processes that torchrun started, and stopping on signals."""

import ctypes
import os
import platform
import re
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from minitron.errors import StoppedError, UserError

Item = TypeVar("Item")
Result = TypeVar("Result")
LONGEST_WAIT = timedelta(days=1)
"""How long a process waits for the others, which may be calibrating or training a longer candidate."""
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's `mallopt`, by the numbers of its header malloc.h."""


@dataclass(frozen=True)
class World:
    """This process among those that torchrun started: rank 0 of 1 when torchrun started none."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def agree(self, value: bool) -> bool:
        """Return the main process's decision on every rank."""
        if self.size == 1:
            return value
        decision = [value]
        dist.broadcast_object_list(decision, src=0)
        return decision[0]

    def gather(self, value: Any) -> list[Any]:
        """Return every rank's value, in the order of ranks, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def map_in_rounds(
        self, function: Callable[[Item], Result], items: list[Item]
    ) -> Iterator[list[tuple[Item, Result]]]:
        """Apply a function to items, one item per rank and round; yield each round's (item, result) on every rank."""
        for start in range(0, len(items), self.size):
            part = items[start : start + self.size]
            mine = part[self.rank : self.rank + 1]
            yield [pair for pairs in self.gather([(item, function(item)) for item in mine]) for pair in pairs]

    def barrier(self) -> None:
        """Wait until all ranks have come this far."""
        if self.size > 1:
            dist.barrier()


@dataclass(frozen=True)
class Runtime:
    """Where and how models run: the device, the dtype of forward passes, the seed, the processes of torchrun, and
    transformers' name for how attention is computed (None: as transformers chooses)."""

    device: torch.device
    dtype: torch.dtype
    seed: int = 0
    world: World = World()
    attention: str | None = None
    rounds: bool = False
    """Whether `training` rounds the operands of float32 products; see `rounds_products`."""

    @property
    def loading_device(self) -> torch.device:
        """Where a model is loaded: the device, or the CPU where FSDP2 moves shards to a device too small for it all."""
        return self.device if self.world.size == 1 else torch.device("cpu")

    @property
    def weights_dtype(self) -> torch.dtype:
        """The dtype of weights that are trained: at least float32."""
        return torch.promote_types(self.dtype, torch.float32)

    @property
    def free_memory(self) -> int | None:
        """The bytes of the device's memory that are free, or that the system can free; None where it does not say."""
        if self.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.device)[0])
        release_memory()
        table = Path("/proc/meminfo")
        entries = dict(line.split(":", 1) for line in table.read_text().splitlines()) if table.exists() else {}
        return int(entries["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in entries else None

    @property
    def dtype_name(self) -> str:
        """`float32` and the like."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def training_dtype(self) -> str:
        """In what trainings compute, as records name it: `float32, operands of products in bfloat16` and the like."""
        return self.dtype_name + (", operands of products in bfloat16" if self.rounds else "")

    @contextmanager
    def training(self) -> Iterator[None]:
        """Compute matrix products as trainings do, in forward and backward passes, while the block runs.

        Where the runtime rounds, oneDNN rounds the operands of float32 products to bfloat16 and adds up in float32;
        everything else stays in float32. The setting is the process's: no other thread may rely on exact products.
        """
        if not self.rounds:
            yield
            return
        matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        before = matmul.fp32_precision
        matmul.fp32_precision = "bf16"
        try:
            yield
        finally:
            matmul.fp32_precision = before

    def autocast(self) -> torch.autocast:
        """Compute in `dtype` with float32 weights, where `dtype` is bfloat16."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype == torch.bfloat16)


def configure_backends() -> None:
    """Set up products and memory as the command line does, for the whole process.

    **Products.** On AMD processors with AVX-512, oneDNN multiplies float32. MKL, which PyTorch uses by default, takes
    about twice the time there. PyTorch gives products to oneDNN where these may round their operands to bfloat16.
    oneDNN rounds only with tile registers (AMX); without them its products are float32 with MKL's errors
    (docs/studies/processors.md). On other processors products stay as they are. Results with and without differ in
    their last bits: a run that was begun on the command line continues to equal bits only after this call.

    **Memory.** glibc's malloc keeps what is freed, for the next tensors of the process: fresh pages of the system are
    slower than many operations that fill them. `release_memory` returns it. Where the environment sets up malloc
    (`MALLOC_…`), that stays.
    """
    processor = _processor()
    if "AMD" in processor.get("cpu_name", "") and processor.get("avx512_f") and not processor.get("amx_tile"):
        torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
    is_set_up = any(name.startswith("MALLOC_") for name in os.environ)
    libc = None if is_set_up else _glibc()
    if libc is not None and libc.mallopt(M_MMAP_MAX, 0):  # large tensors come from the heap,
        libc.mallopt(M_TRIM_THRESHOLD, -1)  # whose end is not returned by itself


def release_memory() -> None:
    """Return freed memory, which malloc keeps, to the system; where the C library is not glibc, do nothing."""
    if (libc := _glibc()) is not None:
        libc.malloc_trim(0)


def rounds_products(dtype: str, device: torch.device) -> bool:
    """Return whether a name of a dtype lets trainings round the operands of float32 products to bfloat16.

    `auto` does on CPUs with tile registers for bfloat16 (AMX), where such products take a quarter to a half of the time
    (docs/studies/processors.md); `float32` never does.
    """
    processor = _processor()
    return dtype == "auto" and device.type == "cpu" and bool(processor.get("amx_tile") and processor.get("amx_bf16"))


def _processor() -> dict[str, Any]:
    """Return what torch knows of the processor; nothing in versions of torch that cannot say."""
    return getattr(torch.cpu, "get_capabilities", dict)()  # type: ignore[no-any-return]


def _glibc() -> Any:
    """Return the C library, or None where it is not glibc."""
    return ctypes.CDLL(None) if platform.libc_ver()[0] == "glibc" else None


def resolve_device(device: str) -> torch.device:
    """Return the device of a name: `auto` is CUDA where there is a GPU, else the CPU; torchrun gives each process one.

    Raises:
        UserError: the name is not auto, cpu, cuda or cuda:N, or torch does not see that GPU.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"unknown device '{device}'; accepted: auto, cpu, cuda, cuda:N")
    resolved = torch.device(device)
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device '{device}' asked for, but torch sees {torch.cuda.device_count()} CUDA devices")
    return resolved


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the dtype of a name: `auto` is bfloat16 on CUDA and float32 elsewhere; see also `rounds_products`.

    Raises:
        UserError: the name is not auto, float32, bfloat16, float16 or float64.
    """
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    resolved = getattr(torch, dtype, None)
    if resolved not in {torch.float32, torch.bfloat16, torch.float16, torch.float64}:
        raise UserError(f"unknown dtype '{dtype}'; accepted: auto, float32, bfloat16, float16, float64")
    return resolved  # type: ignore[no-any-return]


def num_ranks() -> int:
    """Return how many processes torchrun started; 1 when torchrun started none."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Return whether this is the first of the processes that torchrun started, also before they have joined."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def joined_world(device: torch.device) -> Iterator[World]:
    """Join the process group that torchrun set up, if there is one, and leave it afterwards."""
    size = num_ranks()
    if size == 1:
        yield World()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=LONGEST_WAIT)
    try:
        yield World(dist.get_rank(), size)
        # Gloo's threads must have released the last tensors before Python ends; else the process may abort.
        dist.barrier()
    finally:
        dist.destroy_process_group()


class StopRequest:
    """Whether SIGINT or SIGTERM has arrived, and which of them."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def stop(self) -> None:
        """End the run, once everything is saved.

        Raises:
            StoppedError: always.
        """
        raise StoppedError(self.signal_number or signal.SIGTERM)


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Turn SIGINT and SIGTERM into a clean stop: finish the step, save, exit. A second signal acts as usual."""
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield request
        return
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def remember(number: int, _: Any) -> None:
        request.signal_number = number
        restore()

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    for number in STOP_SIGNALS:
        signal.signal(number, remember)
    try:
        yield request
    finally:
        restore()
