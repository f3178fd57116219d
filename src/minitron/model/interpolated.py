"""Two models of one shape and their weights in between (linear merging)."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from minitron.errors import UserError
from minitron.files import require_space
from minitron.model.checkpoint import Checkpoint
from minitron.model.writing import write_checkpoint
from minitron.progress import Progress


def require_mergeable(one: Checkpoint, other: Checkpoint) -> None:
    """Check that two models have equal tensors.

    Raises:
        UserError: they have not; the message names what differs.
    """
    if one.arch.model_type != other.arch.model_type:
        raise UserError(
            f"{other.folder} is a {other.arch.model_type} model, {one.folder} a {one.arch.model_type} model"
        )
    if differing := sorted(set(one.tensors) ^ set(other.tensors)):
        raise UserError(f"{one.folder} and {other.folder} differ in their tensors: only one of them has {differing[0]}")
    for name in one.tensors:
        if one.shape(name) != other.shape(name):
            raise UserError(
                f"{name} is {list(one.shape(name))} in {one.folder} and {list(other.shape(name))} in {other.folder}: "
                "only models of one shape can be merged"
            )


def interpolate(one: Checkpoint, other: Checkpoint, weight: float, folder: Path) -> None:
    """Write (1 − w)·one + w·other, tensor by tensor, with the config and tokenizer files of `one`.

    Sums are computed in float32 and stored in the dtype of `one`. Nemotron Nano 2 ends with such a merge (arXiv
    2508.14444), at weight 0.5.
    """

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in one.tensors:
            ours, theirs = one.checked_tensor(name), other.checked_tensor(name)
            yield name, torch.lerp(ours.float(), theirs.float(), weight).to(ours.dtype)
            progress.advance(ours.nbytes)

    require_space(folder, one.num_bytes)
    with Progress("merge", one.num_bytes, "bytes") as progress:
        write_checkpoint(folder, one.config, tensors(), one.folder)
