"""One process or many: what the training loop needs to know about torchrun, and FSDP2 around the student."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from minitron.model.arch import Arch
from minitron.model.causal import Headless


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

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier()


def num_ranks() -> int:
    """How many processes torchrun started; 1 when none did."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def joined_world(device: torch.device) -> Iterator[World]:
    """Join the process group that torchrun set up, if it did, and leave it afterwards."""
    size = num_ranks()
    if size == 1:
        yield World()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield World(dist.get_rank(), size)
    finally:
        dist.destroy_process_group()


def shard(student: Headless, arch: Arch, world: World) -> None:
    """Shard parameters, gradients and optimizer state over the ranks, layer by layer (FSDP2)."""
    if world.size == 1:
        return
    for layer in range(arch.axis_size("layer")):
        fully_shard(student.model.get_submodule(arch.family.layer.replace("{i}", str(layer))))
    # Resharded after every forward: after an evaluation, which has no backward, the optimizer must still find
    # its sharded parameters.
    fully_shard(student, reshard_after_forward=True)


def whole(parameter: nn.Parameter | Tensor) -> Tensor:
    """A parameter as one plain tensor on this rank; every rank must ask."""
    value = parameter.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value
