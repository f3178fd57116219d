"""A GPU that is not there: tensors are marked as lying on it, and every operation that mixes devices is an error.

Values stay on the CPU, so that whatever depends on them runs to its end: losses that are read, masks, random
initialisers, a whole training. torch's FakeTensorMode, which knows shapes alone, stops at the first of them; its rules
of which operations may mix devices hold here too, and `test_placement.py` compares the two.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")
ATEN = torch.ops.aten
COPIES = {ATEN.copy_.default, ATEN.copy.default, ATEN._to_copy.default, ATEN._foreach_copy_.default}
"""Operations that may read one device and write another."""
INDEXED = {ATEN.index.Tensor, ATEN.index_put.default, ATEN.index_put_.default, ATEN._index_put_impl_.default}
"""Operations whose indices, the second argument, may lie on the CPU wherever the first one lies."""
WIDENED = {ATEN.mm.dtype, ATEN.mm.dtype_out, ATEN.addmm.dtype, ATEN.addmm.dtype_out}
"""Products of halves with a result in float32, which torch has on CUDA alone."""
HALVES = {torch.bfloat16, torch.float16}


DRIVER: dict[str, Any] = {
    "device_count": lambda: 1,
    "get_device_name": lambda *_: "a pretended GPU",
    "mem_get_info": lambda *_: (2**33, 2**34),
    "max_memory_allocated": lambda *_: 0,
    "synchronize": lambda *_: None,
    "get_device_capability": lambda *_: (9, 0),
    "get_rng_state": lambda *_: torch.get_rng_state(),
    "set_rng_state": lambda *_: None,
    "manual_seed_all": lambda *_: None,
}
"""The functions of `torch.cuda` that a driver answers."""


class MixedDevicesError(RuntimeError):
    """An operation reads tensors of several devices."""


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Within the block, `cuda` is a device that tensors can be moved to and made on."""
    marks = _Marks()
    with patch.multiple(torch.cuda, **DRIVER), patch("torch.autocast", _OnTheCpu), _Checks(marks), _Places(marks):
        yield


class _OnTheCpu(torch.autocast):
    def __init__(self, _: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu", *args, **kwargs)


class _Marks:
    """The storages that are marked as lying on the GPU."""

    def __init__(self) -> None:
        self.storages: set[StorageWeakRef] = set()

    def device(self, tensor: Tensor) -> torch.device:
        if tensor.layout != torch.strided:
            return CPU
        with torch._C.DisableTorchFunction():
            if tensor.is_meta:
                return tensor.device
            return GPU if StorageWeakRef(tensor.untyped_storage()) in self.storages else CPU

    def place(self, tensor: Tensor, device: torch.device) -> None:
        with torch._C.DisableTorchFunction():
            if tensor.is_meta:
                return
            storage = StorageWeakRef(tensor.untyped_storage())
        (self.storages.add if device.type == "cuda" else self.storages.discard)(storage)


class _Places(TorchFunctionMode):
    """Reports the marks as devices, and carries out what names a device on the CPU."""

    def __init__(self, marks: _Marks) -> None:
        super().__init__()
        self.marks = marks

    def __torch_function__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func == torch.Tensor.device.__get__:
            return self.marks.device(args[0])
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return self.marks.device(args[0]).type == "cuda"
        if func == torch.Tensor.is_cpu.__get__:  # type: ignore[attr-defined]
            return self.marks.device(args[0]).type == "cpu"
        if func is torch.Tensor.get_device:
            return self.marks.device(args[0]).index if self.marks.device(args[0]).type == "cuda" else -1
        if func in (torch.Tensor.numpy, torch.Tensor.__array__) and self.marks.device(args[0]).type == "cuda":
            raise TypeError("can't convert cuda:0 device type tensor to numpy: use .cpu() first")
        if func in {torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu, torch.Tensor.type_as}:
            return self._moved(func, args, kwargs)
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type in {"cpu", "cuda"}:
            device = torch.device(kwargs.pop("device"))
            result = func(*args, **kwargs, device=CPU)
            self.marks.place(result, device)
            return result
        return func(*args, **kwargs)

    def _moved(self, func: Any, args: Any, kwargs: Mapping[str, Any]) -> Tensor:
        tensor, others = args[0], list(args[1:])
        device: torch.device | None = None
        if func in {torch.Tensor.cuda, torch.Tensor.cpu}:
            device, others, func = GPU if func is torch.Tensor.cuda else CPU, [], torch.Tensor.to
        elif func is torch.Tensor.type_as or (others and isinstance(others[0], Tensor)):
            device, others, func = self.marks.device(others[0]), [others[0].dtype, *others[1:]], torch.Tensor.to
        elif "device" in kwargs:
            device = kwargs["device"]
        elif others and isinstance(others[0], (str, torch.device, int)):
            device = others.pop(0)
        kwargs = {name: value for name, value in kwargs.items() if name not in {"device", "memory_format"}}
        others = [other for other in others if other is not None]
        if others and isinstance(others[0], bool):  # non_blocking follows the device; a dtype would stand before it
            others = []
        if device is None or torch.device(device).type == "meta" or tensor.is_meta:
            return func(*args) if device is not None else func(tensor, *others, **kwargs)  # type: ignore[no-any-return]
        device = torch.device(device)
        if device.type == self.marks.device(tensor).type:
            if not others and not kwargs:
                return tensor  # type: ignore[no-any-return]
            return func(tensor, *others, **kwargs)  # type: ignore[no-any-return]
        dtype = next((each for each in (*others, kwargs.get("dtype")) if isinstance(each, torch.dtype)), None)
        moved: Tensor = func(tensor, dtype=dtype or tensor.dtype, copy=True)
        self.marks.place(moved, device)
        return moved


class _Checks(TorchDispatchMode):
    """Checks the devices of every operation, those of the backward pass too, and marks its results."""

    def __init__(self, marks: _Marks) -> None:
        super().__init__()
        self.marks = marks

    def __torch_dispatch__(self, func: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        device = self._device(func, args, kwargs)
        before = [*_tensors(args), *_tensors(kwargs.values())]
        if func in WIDENED and device == GPU:
            result = _widened_product(func, args, kwargs)
        elif func == ATEN.histc.default and device == GPU:  # that of a GPU takes integers
            result = func(args[0].float(), *args[1:], **kwargs).to(args[0].dtype)
        else:
            result = func(*args, **kwargs)
        known = {StorageWeakRef(each.untyped_storage()) for each in before if each.layout == torch.strided}
        for each in _tensors([result]):
            is_whole = each.layout == torch.strided and not each.is_meta
            if is_whole and StorageWeakRef(each.untyped_storage()) not in known:
                self.marks.place(each, device)
        return result

    def _device(self, func: Any, args: Any, kwargs: Any) -> torch.device:
        """Return where an operation runs: the one device of its tensors but those of the CPU that are a number."""
        read = (args[0], *args[2:]) if func in INDEXED else args
        tensors = [each for each in (*_tensors(read), *_tensors(kwargs.values())) if not each.is_meta]
        devices = {self.marks.device(each) for each in tensors if each.ndim or self.marks.device(each) == GPU}
        if func in COPIES:
            return self.marks.device(tensors[0]) if tensors else CPU
        if func in INDEXED and self.marks.device(args[0]) == CPU:
            devices |= {self.marks.device(each) for each in args[1] if each is not None}
        if len(devices) > 1:
            tensors = [*_tensors(args), *_tensors(kwargs.values())]
            shapes = ", ".join(f"{tuple(each.shape)} on {self.marks.device(each)}" for each in tensors)
            raise MixedDevicesError(f"{func} of {shapes}")
        return next(iter(devices), CPU)


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """Return the tensors among the arguments or results of an operation, which may hold lists of them."""
    found: list[Tensor] = []
    for each in values:
        if isinstance(each, Tensor):
            found.append(each)
        elif isinstance(each, list | tuple):
            found.extend(_tensors(each))
    return found


def _widened_product(func: Any, args: Any, kwargs: Any) -> Tensor:
    """Compute a product of halves in float32, with the checks of torch's CUDA kernels (ATen/native/cuda/Blas.cpp)."""
    *factors, out_dtype = args
    a, b = factors[-2:]
    if a.dtype != b.dtype or a.dtype not in HALVES or out_dtype != torch.float32:
        raise RuntimeError(f"{func} of {a.dtype} and {b.dtype} with a result in {out_dtype}")
    product: Tensor = a.float() @ b.float()
    if len(factors) == 3:
        if factors[0].dtype not in {out_dtype, a.dtype}:
            raise RuntimeError("self dtype must match either out_dtype or mat1 dtype")
        product = product.mul_(kwargs.get("alpha", 1)).add_(factors[0], alpha=kwargs.get("beta", 1))
    out: Tensor | None = kwargs.get("out")
    if out is None:
        return product
    if out.dtype != out_dtype or out.shape != product.shape:
        raise RuntimeError(f"{func} into {out.dtype} of shape {tuple(out.shape)}")
    return out.copy_(product)
