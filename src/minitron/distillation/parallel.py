"""Shards models over the processes of torchrun with FSDP2, and lightens their layers."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from minitron.distillation.rounding import rounds_from
from minitron.model.arch import Arch
from minitron.model.language_model import Headless
from minitron.recipe import DistillRecipe
from minitron.runtime import Runtime


def shard(model: Headless, arch: Arch, runtime: Runtime, *, is_teacher: bool = False) -> None:
    """Shard a model over the ranks where there are several; see `shard_over_ranks`."""
    if runtime.world.size > 1:
        shard_over_ranks(model, arch, runtime, is_teacher=is_teacher)


def shard_over_ranks(model: Headless, arch: Arch, runtime: Runtime, *, is_teacher: bool = False) -> None:
    """Shard parameters, gradients and optimizer state over the ranks, layer by layer (FSDP2), on the runtime's device.

    With a forward pass in bfloat16, layers are gathered in bfloat16 and their gradients summed in float32; tensors
    outside the layers, such as the output matrix, are gathered in their own dtype, and so are layers whose matrices are
    rounded from values of another dtype. A teacher's output matrix stays gathered, since the student's loss reads it.
    """
    mesh = init_device_mesh(runtime.device.type, (runtime.world.size,))
    policy = MixedPrecisionPolicy()
    if runtime.dtype == torch.bfloat16 and rounds_from(model) in {None, torch.bfloat16}:
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for layer in layers_of(model, arch):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    # A student is resharded after every forward: after an evaluation, which has no backward, the optimizer must still
    # find its sharded parameters.
    fully_shard(model, mesh=mesh, reshard_after_forward=not is_teacher)


def lighten(model: Headless, arch: Arch, recipe: DistillRecipe) -> None:
    """Let layers keep only their input for the backward pass, or compile them, as the recipe says; before `shard`."""
    for layer in layers_of(model, arch):
        if recipe.activation_checkpointing:
            layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)  # type: ignore[method-assign]
        if recipe.compile:
            layer.compile()


def layers_of(model: Headless, arch: Arch) -> list[nn.Module]:
    """Return the modules of the layers, in order."""
    names = (arch.family.layer_module(layer) for layer in range(arch.axis_size("layer")))
    return [model.model.get_submodule(name) for name in names]


def whole(parameter: nn.Parameter | Tensor) -> Tensor:
    """Return a parameter as one plain tensor on this rank; every rank must call this function."""
    value = parameter.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value
