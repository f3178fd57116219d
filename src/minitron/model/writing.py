"""Writes model folders: sharded safetensors with a config and the tokenizer files of the model that they come from."""

import json
import shutil
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from minitron.model.checkpoint import Checkpoint
from minitron.model.config import COMPANIONS

MAX_SHARD_BYTES = 2**29


def write_checkpoint(
    folder: Path, config: Any, tensors: Iterable[tuple[str, torch.Tensor]], companions_from: Path
) -> None:
    """Write a stream of tensors into sharded safetensors, with the config and the teacher's tokenizer files.

    `folder` must exist; make it with `files.whole_folder`.
    """
    write_tensors(folder, tensors)
    config.save_pretrained(folder)
    copy_companions(companions_from, folder)


def write_tensors(folder: Path, tensors: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Write a stream of tensors into sharded safetensors, with an index if there are several shards.

    At most two shards are in memory, the one that is being written and the next.
    """
    weight_map: dict[str, int] = {}
    pending: dict[str, torch.Tensor] = {}
    writes: list[Future[None]] = []

    def flush() -> None:
        if writes:
            writes[-1].result()
        number = len(writes)
        weight_map.update(dict.fromkeys(pending, number))
        writes.append(writer.submit(save_file, dict(pending), folder / f"shard-{number}", {"format": "pt"}))
        pending.clear()

    total_bytes = pending_bytes = 0
    with ThreadPoolExecutor(1) as writer:
        for name, tensor in tensors:
            if pending and pending_bytes + tensor.nbytes > MAX_SHARD_BYTES:
                flush()
                pending_bytes = 0
            pending[name] = tensor.contiguous()
            pending_bytes += tensor.nbytes
            total_bytes += tensor.nbytes
        flush()
    writes[-1].result()
    names = [
        "model.safetensors" if len(writes) == 1 else f"model-{i + 1:05}-of-{len(writes):05}.safetensors"
        for i in range(len(writes))
    ]
    for number, name in enumerate(names):
        (folder / f"shard-{number}").rename(folder / name)
    if len(writes) > 1:
        index = {
            "metadata": {"total_size": total_bytes},
            "weight_map": {name: names[number] for name, number in sorted(weight_map.items())},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_model(folder: Path, model: Any, state: dict[str, torch.Tensor], like: Checkpoint) -> None:
    """Write a transformers model, its weights taken from `state`, with the config and tokenizer of `like`.

    transformers itself translates names in memory to names in files.
    """
    model.save_pretrained(folder, state_dict=state, max_shard_size=MAX_SHARD_BYTES)
    like.config.save_pretrained(folder)
    copy_companions(like.folder, folder)


def copy_companions(source: Path, folder: Path) -> None:
    """Copy the tokenizer files, the generation config and the licence of a model folder."""
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)
