"""One process or many: what the training loop needs to know about torchrun, and FSDP2 around the student."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from minitron.model.arch import Arch
from minitron.model.causal import Headless
from minitron.recipe import DistillRecipe

Item = TypeVar("Item")
LONGEST_WAIT = timedelta(days=1)
"""For other ranks, which may be calibrating, or training a candidate that takes longer than one's own."""


@dataclass(frozen=True)
class World:
    """This process among those that torchrun started; rank 0 of 1 when none did."""

    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes files."""
        return self.rank == 0

    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks."""
        if self.size > 1:
            dist.all_reduce(value)
        return value

    def agree(self, value: bool) -> bool:
        """The main process's decision, on every rank."""
        if self.size == 1:
            return value
        decision = [value]
        dist.broadcast_object_list(decision, src=0)
        return decision[0]

    def gather(self, value: Any) -> list[Any]:
        """What every rank has, by rank, on every rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def share_out(self, items: list[Item], do: Callable[[Item], Any]) -> Iterator[list[tuple[Item, Any]]]:
        """Ranks take items in turn, one each a round; yields, on every rank, what a round of them came to."""
        for start in range(0, len(items), self.size):
            part = items[start : start + self.size]
            mine = part[self.rank : self.rank + 1]
            yield [pair for found in self.gather([(item, do(item)) for item in mine]) for pair in found]

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()


def num_ranks() -> int:
    """How many processes torchrun started; 1 when none did."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def loading_device(device: torch.device, world: World) -> torch.device:
    """Where a model is loaded that `shard` then moves to the device, which need not hold it whole."""
    return device if world.size == 1 else torch.device("cpu")


@contextmanager
def joined_world(device: torch.device) -> Iterator[World]:
    """Join the process group that torchrun set up, if it did, and leave it afterwards."""
    size = num_ranks()
    if size == 1:
        yield World()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=LONGEST_WAIT)
    try:
        yield World(dist.get_rank(), size)
        # Gloo's threads must have let go of the last tensors before Python ends; else the process may abort.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def shard(
    model: Headless, arch: Arch, world: World, device: torch.device, dtype: torch.dtype, is_teacher: bool = False
) -> None:
    """Shard parameters, gradients and optimizer state over the ranks, layer by layer (FSDP2); `device` gets the shards.

    Where a forward pass is in bfloat16, layers are gathered in it and their gradients summed in float32; what stands
    outside the layers, the output matrix among it, is gathered as it is. A teacher's output matrix stays gathered,
    since the student's loss reads it.
    """
    if world.size == 1:
        return
    mesh = init_device_mesh(device.type, (world.size,))
    policy = MixedPrecisionPolicy()
    if dtype == torch.bfloat16:
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers_of(model, arch):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # A student is resharded after every forward: after an evaluation, which has no backward, the optimizer must still
    # find its sharded parameters.
    fully_shard(model, mesh=mesh, reshard_after_forward=not is_teacher)


def lighten(model: Headless, arch: Arch, recipe: DistillRecipe) -> None:
    """Before `shard`: layers keep but their input for the backward pass, or are compiled, as the recipe says."""
    for layer in layers_of(model, arch):
        if recipe.activation_checkpointing:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)  # type: ignore[method-assign]
        if recipe.compile:
            layer.compile()


def layers_of(model: Headless, arch: Arch) -> list[nn.Module]:
    """The modules of the layers."""
    names = (arch.family.layer.replace("{i}", str(layer)) for layer in range(arch.axis_size("layer")))
    return [model.model.get_submodule(name) for name in names]


def whole(parameter: nn.Parameter | Tensor) -> Tensor:
    """A parameter as one plain tensor on this rank; every rank must ask."""
    value = parameter.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value
