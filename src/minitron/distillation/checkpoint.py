"""The state of a training run on disk: step, student and optimizer, to continue from at any number of ranks."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor

from minitron.distillation.optimizers import Optimizers, make_state
from minitron.files import empty_folder, partial_path, publish_folder, read_json, recover_folder, write_json
from minitron.model.language_model import Headless
from minitron.runtime import World

CHECKPOINT_FILE_BYTES = 256 * 1024**2


Trained = dict[str, tuple[Headless, Optimizers]]
"""What is trained, by name: the student, and a teacher that learns as well."""


def _state(trained: Trained) -> Iterator[tuple[str, Tensor]]:
    for who, (model, optimizers) in trained.items():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue  # as it was when the run began
            yield f"{who}.{name}", parameter.detach()
            for optimizer in optimizers:
                for key, value in optimizer.state.get(parameter, {}).items():
                    for inner, plain in _plain(value).items():
                        yield f"optimizer.{who}.{name}.{key}{inner}", plain


def _plain(value: Any) -> dict[str, Tensor]:
    """A tensor, or those that one of eight bits is made of."""
    if not hasattr(value, "__tensor_flatten__") or isinstance(value, DTensor):
        return {"": value}
    return {f".{inner}": getattr(value, inner) for inner in value.__tensor_flatten__()[0]}


def save_checkpoint(work: Path, trained: Trained, step: int, weight: float, world: World) -> None:
    """Write `work/checkpoint`, whole or not at all, with the step and the weight of the next step's intermediate loss.

    Every rank must ask.
    """
    # Safetensors within torch's distributed checkpoint: reading one back cannot execute code.
    state = dict(_state(trained))
    staging = partial_path(work / "checkpoint")
    if world.is_main:
        empty_folder(staging)
    world.barrier()
    with warnings.catch_warnings(action="ignore"):  # it warns that one process saves for itself
        writer = HuggingFaceStorageWriter(str(staging), _file_numbers(state), 1, True)  # 1 thread; a shard a rank
        state_dict_saver.save(state, storage_writer=writer, no_dist=world.size == 1)
    if world.is_main:
        write_json(staging / "state.json", {"step": step, "weight": weight})
        publish_folder(staging, work / "checkpoint")
    world.barrier()


def _file_numbers(state: dict[str, Tensor]) -> dict[str, int]:
    """Deal tensors out to files, counted from 1: the writer holds a copy of a whole file while it writes it."""
    numbers, num_bytes = {}, 0
    for name, tensor in state.items():
        numbers[name] = 1 + num_bytes // CHECKPOINT_FILE_BYTES
        num_bytes += tensor.numel() * tensor.element_size()
    return numbers


def load_checkpoint(work: Path, trained: Trained, world: World) -> tuple[int, float] | None:
    """Restore the last checkpoint, if there is one, and return the step it was taken after and that weight."""
    if world.is_main:
        recover_folder(work / "checkpoint")
    world.barrier()
    if not (work / "checkpoint").is_dir():
        return None
    for _, optimizers in trained.values():
        make_state(optimizers)
    with warnings.catch_warnings(action="ignore"):
        reader = HuggingFaceStorageReader(str(work / "checkpoint"))
        state_dict_loader.load(dict(_state(trained)), storage_reader=reader, no_dist=world.size == 1)
    state = read_json(work / "checkpoint" / "state.json")
    return int(state["step"]), float(state["weight"])
