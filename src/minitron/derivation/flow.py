"""Where the residual stream of a model goes: which module reads which norm's output, found in one forward pass."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minitron.derivation.specimens import Specimen, UnderivableError

TOKENS = torch.arange(5, 16)[None]
"""What specimens read."""


@dataclass(frozen=True)
class Call:
    """One call of a module in a forward pass: its name, and what entered and left."""

    name: str
    entered: Tensor | None
    left: Tensor | None


@dataclass(frozen=True)
class Flow:
    """What a forward pass shows. Modules of layers are named with `{i}` in place of the number of the layer."""

    layers: str
    """The name of the list of layers."""
    calls: tuple[Call, ...]
    order: Mapping[str, int]
    """The place of each module among the calls of its layer; of a module outside layers, among all calls."""
    norms: tuple[str, ...]
    """The modules that normalise the residual stream, in the order in which a layer passes them; the final one last."""
    readers: Mapping[str, tuple[str, ...]]
    """The modules with matrices that multiply each norm's output."""
    plain_readers: tuple[str, ...]
    """The modules of layers that read the stream without a norm between."""

    def general(self, module: str) -> str:
        """Return the name of a module with `{i}` in place of the number of its layer."""
        return general(self.layers, module)


def general(layers: str, module: str) -> str:
    """Return the name of a module with `{i}` in place of the number of its layer, where it is in the list of layers."""
    return re.sub(rf"^{re.escape(layers)}\.\d+\b", f"{layers}.{{i}}", module)


def flow_of(specimen: Specimen, kinds: Sequence[str]) -> Flow:
    """Run a specimen once and return which modules read what; `kinds` holds the kind of each layer.

    Raises:
        UnderivableError: the model has no list of layers, or no norm after the last layer.
    """
    model, hidden = specimen.model, specimen.sizes["hidden"]
    modules = dict(model.named_modules())
    depth = specimen.sizes["layer"]
    lists = [name for name, module in modules.items() if isinstance(module, nn.ModuleList) and len(module) == depth]
    if not lists:
        raise UnderivableError("its layers are not the entries of one list of modules")
    layers = lists[0]
    calls = _calls(model, modules)
    shown = [f"{layers}.{kinds.index(kind)}" for kind in dict.fromkeys(kinds)]
    normed = [call for call in calls if _normalises(modules[call.name], hidden)]
    last = max(place for place, call in enumerate(calls) if call.name == f"{layers}.{depth - 1}")
    final = [call for call in calls[last:] if any(call is norm for norm in normed)]
    if not final:
        raise UnderivableError("no norm follows its last layer")
    readers: dict[str, tuple[str, ...]] = {}
    for layer in shown:
        for norm in normed:
            if norm.name.startswith(f"{layer}."):
                name = general(layers, norm.name)
                found = [
                    general(layers, each)
                    for each in _readers(norm.left, calls, modules)
                    if each.startswith(f"{layer}.")
                ]
                readers[name] = tuple(dict.fromkeys((*readers.get(name, ()), *found)))
    order = _order(calls, layers)
    kept = [
        name
        for name in sorted(readers, key=order.__getitem__)
        if readers[name] or name.count(".") == layers.count(".") + 2
    ]
    kept += [final[-1].name]
    readers[final[-1].name] = ()
    plain = [
        general(layers, name)
        for layer in shown
        for call in calls
        if call.name == layer
        for name in _readers(call.entered, calls, modules)
        if name.startswith(f"{layer}.")
    ]
    return Flow(layers, calls, order, tuple(kept), readers, tuple(dict.fromkeys(plain)))


def _order(calls: Sequence[Call], layers: str) -> dict[str, int]:
    order: dict[str, int] = {}
    begun: dict[str, int] = {}
    for place, call in enumerate(calls):
        layer = re.match(rf"{re.escape(layers)}\.\d+\b", call.name)
        start = begun.setdefault(layer[0], place) if layer else 0
        order.setdefault(general(layers, call.name), place - start)
    return order


def _calls(model: Any, modules: Mapping[str, nn.Module]) -> tuple[Call, ...]:
    calls: list[Call] = []
    handles = []

    def watch(name: str) -> Any:
        def took(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            entered = next((value for value in (*args, *kwargs.values()) if _is_float(value)), None)
            left = output[0] if isinstance(output, tuple) and output else output
            calls.append(Call(name, entered, left if _is_float(left) else None))

        return took

    for name, module in modules.items():
        if name:
            handles.append(module.register_forward_hook(watch(name), with_kwargs=True))
    try:
        with torch.no_grad():
            model(input_ids=TOKENS, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return tuple(calls)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _normalises(module: nn.Module, hidden: int) -> bool:
    own = dict(module.named_parameters(recurse=False))
    sizes = {tuple(value.shape) for value in own.values()}
    return "norm" in type(module).__name__.lower() and (sizes == {(hidden,)} or not own) and not list(module.children())


def _readers(output: Tensor | None, calls: tuple[Call, ...], modules: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Return the modules with matrices of their own that a value enters, as it is or with its tokens in one row."""
    if output is None:
        return ()
    found = []
    for call in calls:
        own = [value for value in modules[call.name].parameters(recurse=False) if value.ndim > 1]
        if own and call.entered is not None and _is_one(call.entered, output):
            found.append(call.name)
    return tuple(dict.fromkeys(found))


def _is_one(value: Tensor, other: Tensor) -> bool:
    """Whether two values are equal, however their tokens are laid out."""
    has_equal_size = value.shape[-1] == other.shape[-1] and value.numel() == other.numel()
    return has_equal_size and torch.equal(value.flatten(), other.flatten())
