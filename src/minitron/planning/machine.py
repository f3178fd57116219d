"""The machine that a plan is for: GPUs by the figures of their data sheets, others as described, or this machine."""

import re
import time
from dataclasses import dataclass
from typing import NamedTuple

from minitron.errors import UserError, nearest
from minitron.quantities import parse_bytes, parse_count


class Gpu(NamedTuple):
    """Figures of a vendor's data sheet; operations are dense, those of bfloat16 summed in float32."""

    memory_gb: float
    bfloat16: float
    """10¹² operations of bfloat16 per second."""
    float32: float
    """10¹² operations of float32 per second, without tensor cores, which would round operands."""
    source: str


AMPERE, ADA = "NVIDIA Ampere GA102 whitepaper", "NVIDIA Ada GPU architecture whitepaper"
GPUS = {
    "A100-40": Gpu(40, 312, 19.5, "NVIDIA A100 data sheet"),
    "A100-80": Gpu(80, 312, 19.5, "NVIDIA A100 data sheet"),
    "H100": Gpu(80, 989, 67, "NVIDIA H100 data sheet, SXM5"),
    "H100-PCIe": Gpu(80, 756, 51, "NVIDIA H100 data sheet, PCIe"),
    "H200": Gpu(141, 989, 67, "NVIDIA H200 data sheet, SXM"),
    "B200": Gpu(180, 2250, 75, "NVIDIA DGX B200 data sheet, an eighth"),
    "L4": Gpu(24, 121, 30.3, "NVIDIA L4 data sheet"),
    "L40S": Gpu(48, 362, 91.6, "NVIDIA L40S data sheet"),
    "A10": Gpu(24, 125, 31.2, "NVIDIA A10 data sheet"),
    "A10G": Gpu(24, 70, 35, "NVIDIA A10G data sheet"),
    "RTX3090": Gpu(24, 71, 35.6, AMPERE),
    "RTX4090": Gpu(24, 165, 82.6, ADA),
    "RTX5090": Gpu(32, 209, 104.8, "NVIDIA RTX Blackwell GPU architecture whitepaper"),
}
"""GPUs by name. A card's own report of its memory is a little higher than the 10⁹ bytes taken for each GB."""
PRODUCT_SIZE = 2048
"""Rows and columns of the product that is timed on a CPU."""


@dataclass(frozen=True)
class Machine:
    """Devices of one kind, one process on each."""

    name: str
    device: str
    """cuda or cpu."""
    num_devices: int
    memory: float | None
    """Bytes of one device."""
    flops: float | None
    """Operations per second that one device has at most, in the plan's dtype."""
    source: str
    """Where memory and operations per second are from."""

    def in_words(self) -> str:
        """Return the devices with their figures and the source of these."""
        figures = [
            f"{self.memory / 1e9:.0f} GB" if self.memory else "memory unknown",
            f"{self.flops / 1e12:.3g}·10¹² operations/s" if self.flops else "operations/s unknown",
        ]
        return f"{self.num_devices} × {self.name}, each {', '.join(figures)} ({self.source})"


def described_machine(gpus: str, memory: str | None, flops: str | None, dtype: str) -> Machine:
    """Return GPUs that are named or counted, such as `8xH100` or `8`, with memory and operations per second if given.

    Raises:
        UserError: the text is not understood, no such GPU is known, or a GPU is only counted and figures are missing.
    """
    match = re.fullmatch(r"(?:([1-9]\d*)(?:x|$))?([^x].*)?", gpus.strip(), re.IGNORECASE)
    if not match or not gpus.strip():
        raise UserError(f"--gpus '{gpus}' is not understood; accepted: such as 8xH100, or 8 with --gpu-memory")
    count, name = int(match[1] or 1), match[2]
    known = {key.lower(): key for key in GPUS}
    if name and (key := known.get(name.strip().lower().replace(" ", ""))):
        gpu = GPUS[key]
        operations = (gpu.bfloat16 if dtype == "bfloat16" else gpu.float32) * 1e12
        return Machine(
            key, "cuda", count, _bytes(memory) or gpu.memory_gb * 1e9, _operations(flops) or operations,
            gpu.source if memory is None and flops is None else "as given",
        )  # fmt: skip
    if name and not (memory and flops):
        raise UserError(
            f"--gpus: GPU '{name}' is not known: {nearest(name, list(GPUS))}; or give --gpu-memory and --gpu-flops"
        )
    if memory is None:
        raise UserError(f"--gpus {gpus} names no GPU: give --gpu-memory, and --gpu-flops for times")
    return Machine(name or "GPU", "cuda", count, _bytes(memory), _operations(flops), "as given")


def this_machine(device: str, flops: str | None, dtype: str) -> Machine:
    """Return the device that a recipe would run on here, of a CPU with the speed of one product, timed now.

    `device` and `dtype` are as in the recipe.

    Raises:
        UserError: see `runtime.resolve_device` and `runtime.resolve_dtype`.
    """
    import torch

    from minitron.runtime import Runtime, configure_backends, resolve_device, resolve_dtype, rounds_products

    configure_backends()
    place = resolve_device(device)
    runtime = Runtime(place, resolve_dtype(dtype, place), rounds=rounds_products(dtype, place))
    if place.type == "cuda":
        properties = torch.cuda.get_device_properties(place)
        gpu = _sheet_of(properties.name)
        operations = None if gpu is None else (gpu.float32 if runtime.dtype == torch.float32 else gpu.bfloat16) * 1e12
        source = "this machine" if gpu is None else f"this machine, {gpu.source}"
        return Machine(properties.name, "cuda", 1, properties.total_memory, _operations(flops) or operations, source)
    free = runtime.free_memory
    with runtime.training():
        timed = _operations(flops) or _timed_product(runtime.dtype)
    source = "free memory of this machine" + (", a product timed now" if flops is None else "")
    return Machine("CPU", "cpu", 1, free, timed, source)


def _sheet_of(name: str) -> Gpu | None:
    """Return the figures of a GPU that its driver names, such as `NVIDIA A100-SXM4-80GB`."""
    words = name.lower().replace(" ", "")
    fitting = [key for key in GPUS if all(part in words for part in key.lower().split("-"))]
    return GPUS[max(fitting, key=len)] if fitting else None


def _timed_product(dtype: object) -> float:
    import torch

    a, b = (torch.ones(PRODUCT_SIZE, PRODUCT_SIZE, dtype=dtype) for _ in range(2))  # type: ignore[call-overload]
    a @ b
    started = time.perf_counter()
    a @ b
    return float(2 * PRODUCT_SIZE**3 / (time.perf_counter() - started))


def _bytes(text: str | None) -> float | None:
    try:
        return None if text is None else float(parse_bytes(text))
    except ValueError as error:
        raise UserError(f"--gpu-memory: {error}") from error


def _operations(text: str | None) -> float | None:
    try:
        return None if text is None else float(parse_count(text))
    except ValueError as error:
        raise UserError(f"--gpu-flops: {error}") from error
