"""Saves and loads the state of a training: step, models and optimizers; any number of ranks can continue from it."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from minitron.distillation.optimizers import make_state
from minitron.files import empty_folder, partial_path, publish_folder, read_json, recover_folder, write_json
from minitron.model.language_model import Headless
from minitron.runtime import World

CHECKPOINT_FILE_BYTES = 256 * 1024**2

PROJECTION = "student.projection."
"""The beginning of the names of the projection that losses within the layers add."""
Models = dict[str, tuple[Headless, Optimizer]]
"""The models that are trained, by name, each with its optimizer: the student, and a teacher that learns as well."""


def _state(models: Models) -> Iterator[tuple[str, Tensor]]:
    for role, (model, optimizer) in models.items():
        # Those that are frozen now may have trained before; others are as they were when the run began.
        trains = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, parameter in model.named_parameters():
            if id(parameter) not in trains:
                continue
            yield f"{role}.{name}", parameter.detach()
            for key, value in optimizer.state.get(parameter, {}).items():
                for inner, plain in _plain(value).items():
                    yield f"optimizer.{role}.{name}.{key}{inner}", plain


def _plain(value: Any) -> dict[str, Tensor]:
    """Return a tensor, or the tensors that a tensor of eight bits consists of."""
    if not hasattr(value, "__tensor_flatten__") or isinstance(value, DTensor):
        return {"": value}
    return {f".{inner}": getattr(value, inner) for inner in value.__tensor_flatten__()[0]}


def save_checkpoint(work: Path, models: Models, step: int, world: World, *, is_trial: bool = False) -> None:
    """Write `work/checkpoint`, complete or not at all, with the step; every rank must call this function.

    The checkpoint of a trial may lack what is trained besides the student from then on: a projection to the teacher.
    """
    # Safetensors within torch's distributed checkpoint: reading it cannot execute code.
    state = dict(_state(models))
    staging = partial_path(work / "checkpoint")
    if world.is_main:
        empty_folder(staging)
    world.barrier()
    with warnings.catch_warnings(action="ignore"):  # torch warns that one process saves without others
        writer = HuggingFaceStorageWriter(str(staging), _file_numbers(state), 1, True)  # 1 thread; one shard per rank
        state_dict_saver.save(state, storage_writer=writer, no_dist=world.size == 1)
    if world.is_main:
        write_json(staging / "state.json", {"step": step, "is_trial": is_trial})
        publish_folder(staging, work / "checkpoint")
    world.barrier()


def _file_numbers(state: dict[str, Tensor]) -> dict[str, int]:
    """Return the file of every tensor, counted from 1: the writer holds a copy of a whole file while it writes."""
    numbers, num_bytes = {}, 0
    for name, tensor in state.items():
        numbers[name] = 1 + num_bytes // CHECKPOINT_FILE_BYTES
        num_bytes += tensor.numel() * tensor.element_size()
    return numbers


def saved_step(work: Path, world: World) -> int:
    """Return the step of the last checkpoint, or 0 if there is none."""
    if world.is_main:
        recover_folder(work / "checkpoint")
    world.barrier()
    return int(read_json(work / "checkpoint" / "state.json")["step"]) if (work / "checkpoint").is_dir() else 0


def load_checkpoint(work: Path, models: Models, world: World) -> int:
    """Restore the last checkpoint, if there is one, and return its step; without one return 0."""
    if not saved_step(work, world):
        return 0
    for _, optimizer in models.values():
        make_state(optimizer)
    record, state = read_json(work / "checkpoint" / "state.json"), dict(_state(models))
    with warnings.catch_warnings(action="ignore"):
        reader = HuggingFaceStorageReader(str(work / "checkpoint"))
        if record.get("is_trial"):
            held = reader.read_metadata().state_dict_metadata
            state = {name: tensor for name, tensor in state.items() if name in held or PROJECTION not in name}
        state_dict_loader.load(state, storage_reader=reader, no_dist=world.size == 1)
    return int(record["step"])
