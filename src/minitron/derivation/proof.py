"""The proof of a table: what must hold of every axis before it is offered, on a tiny random model."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron.derivation.specimens import Specimen, in_general
from minitron.model.anatomy import AXES
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint, expected_shapes, open_checkpoint
from minitron.model.config import student_config
from minitron.model.families.table_files import known
from minitron.model.family import Family
from minitron.model.language_model import build_model
from minitron.pruning.cut import Cut, write_pruned
from minitron.pruning.rotate import Rotated, obstacle, untied
from minitron.pruning.selection import Kept, score_shape, select

CPU = torch.device("cpu")
TOLERANCE = 5e-4
"""Of logits, which are a few units large: rounding adds a tenth of it, a wrong row a thousand times as much."""
NUM_TOKENS = 21


@contextmanager
def checkpoint_of(one: Specimen, family: Family) -> Iterator[Checkpoint]:
    """Yield a specimen as a checkpoint that is read by a table.

    Raises:
        UserError: the table has other tensors or shapes than the checkpoint.
    """
    with known(family), tempfile.TemporaryDirectory(prefix="minitron-proof-") as folder:
        one.save(Path(folder))
        yield open_checkpoint(Path(folder))


def random_importance(arch: Arch, seed: int = 0) -> dict[str, Tensor]:
    """Return random scores of every prunable axis."""
    generator = torch.Generator().manual_seed(seed)
    return {axis: torch.rand(score_shape(arch, axis), generator=generator) for axis in arch.prunable_axes}


def permuted(arch: Arch, axis: str) -> Kept:
    """Return all entries of every axis, those of one axis moved on by one: within their group, groups with theirs."""
    kept = select(random_importance(arch), arch, arch)
    groups = arch.axis_size(arch.grouped[axis]) if axis in arch.grouped else 1
    for entries in kept[axis].view(-1, groups, arch.axis_size(axis) // groups).unbind():
        for group in entries:
            group.copy_(group.roll(1))
    for inner, outer in arch.grouped.items():
        if outer == axis:
            count = arch.entries(inner)
            kept[inner] = (kept[axis][..., None] * count + torch.arange(count)).flatten(-2)
    return kept


def moves_with(teacher: Checkpoint, axis: str) -> bool:
    """Return whether a permutation of an axis leaves the logits as they are, and one that a tensor misses does not."""
    cut = dict(Cut(teacher.arch, teacher.arch, permuted(teacher.arch, axis), teacher.tensor))
    whole = _logits(_whole(teacher))
    if not _agree(_logits(_built(teacher, teacher.arch, list(range(_depth(teacher.arch))), cut)), whole):
        return False
    moved = [name for name, value in cut.items() if not torch.equal(value, teacher.tensor(name))]
    missed = {
        name: teacher.tensor(name) if in_general(name) == in_general(moved[-1]) else value
        for name, value in cut.items()
    }
    return not _agree(_logits(_built(teacher, teacher.arch, list(range(_depth(teacher.arch))), missed)), whole)


def is_its_masked_teacher(teacher: Checkpoint, axis: str, size: int) -> bool:
    """Return whether a student with fewer entries of an axis is its teacher with the others switched off at the tap."""
    arch = teacher.arch.resized(**_sizes(teacher.arch, axis, size))
    kept = select(random_importance(teacher.arch), teacher.arch, arch)
    student = _built(teacher, arch, kept["layer"].tolist(), dict(Cut(teacher.arch, arch, kept, teacher.tensor)))
    if sum(parameter.numel() for parameter in student.parameters()) != arch.num_parameters:
        return False
    model = _whole(teacher)
    for layer in range(_depth(teacher.arch)):
        for tap in teacher.arch.layer_taps(layer):
            if tap.axes == (axis,) and tap.side == "input":
                mask = torch.zeros(teacher.arch.axis_size(axis))
                mask[kept[axis][layer]] = 1.0
                module = model.get_submodule(tap.module.replace("{i}", str(layer)))
                module.register_forward_pre_hook(_masking(mask))
    return _agree(_logits(student), _logits(model))


def survives_without_layers(teacher: Checkpoint) -> bool:
    """Return whether a student with fewer layers is its teacher whose other layers pass the stream on."""
    arch = teacher.arch.resized(num_hidden_layers=_depth(teacher.arch) - 1)
    kept = select(random_importance(teacher.arch), teacher.arch, arch)
    student = _built(teacher, arch, kept["layer"].tolist(), dict(Cut(teacher.arch, arch, kept, teacher.tensor)))
    model = _whole(teacher)
    for layer in set(range(_depth(teacher.arch))) - set(kept["layer"].tolist()):
        model.get_submodule(teacher.arch.family.layer_module(layer)).register_forward_hook(_pass_over, with_kwargs=True)
    return _agree(_logits(student), _logits(model))


@torch.no_grad()
def narrows(teacher: Checkpoint) -> bool:
    """Return whether a student with fewer tokens computes the logits that its teacher has for them."""
    size = teacher.arch.axis_size("vocab")
    arch = replace(teacher.arch, sizes={**teacher.arch.sizes, AXES["vocab"]: size - 7})
    tokens = torch.arange(size - 7) + 7 * (torch.arange(size - 7) > size // 2)
    kept = select(random_importance(arch), teacher.arch, teacher.arch) | {"vocab": tokens}
    cut = dict(Cut(teacher.arch, arch, kept, teacher.tensor))
    ids = torch.linspace(size // 3, size - 8, NUM_TOKENS).long()
    narrow = _built(teacher, arch, kept["layer"].tolist(), cut)(input_ids=ids[None], use_cache=False).logits
    whole = _whole(teacher)(input_ids=tokens[ids][None], use_cache=False).logits
    return _agree(narrow, whole[..., tokens])


@torch.no_grad()
def turns(teacher: Checkpoint) -> bool:
    """Return whether a rotation of the stream leaves the logits as they are, or is refused for a stated reason."""
    arch = teacher.arch
    size = arch.axis_size("hidden")
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
    if obstacle(untied(arch)):
        return True
    if arch.family.is_centred:
        inner = torch.randn(size, size, generator=generator, dtype=torch.float64)
        inner[:, 0] = 1.0
        frame = torch.linalg.qr(inner).Q
        basis = (
            frame @ torch.block_diag(torch.ones(1, 1, dtype=torch.float64), torch.linalg.qr(basis[1:, 1:]).Q) @ frame.T
        )
    read = Rotated(arch, basis, lambda name: teacher.tensor(name).double())
    tensors = {name: read(name).float() for name, _ in expected_shapes(untied(arch))}
    turned = _built(teacher, untied(arch), list(range(_depth(arch))), tensors)
    return _agree(_logits(turned), _logits(_whole(teacher)))


def reloads(teacher: Checkpoint, arch: Arch) -> bool:
    """Return whether a student that is written to a folder computes what the one in memory does."""
    kept = select(random_importance(teacher.arch), teacher.arch, arch)
    cut = Cut(teacher.arch, arch, kept, teacher.tensor)
    with tempfile.TemporaryDirectory(prefix="minitron-proof-") as folder:
        write_pruned(teacher, cut, cut, Path(folder))
        return _agree(
            _logits(_whole(open_checkpoint(Path(folder)))),
            _logits(_built(teacher, arch, kept["layer"].tolist(), dict(cut))),
        )


def _whole(teacher: Checkpoint) -> Any:
    return build_model(teacher.config, ((name, teacher.tensor(name)) for name in teacher.tensors), CPU)


def _built(teacher: Checkpoint, arch: Arch, layers: list[int], tensors: dict[str, Tensor]) -> Any:
    return build_model(student_config(teacher, arch, layers), tensors.items(), CPU)


def _depth(arch: Arch) -> int:
    return arch.axis_size("layer")


def _sizes(arch: Arch, axis: str, size: int) -> dict[str, int]:
    if axis == "kv":
        return {AXES["kv"]: size, AXES["query"]: size * arch.entries("query")}
    return {AXES[axis]: size}


@torch.no_grad()
def _logits(model: Any) -> Tensor:
    vocab = model.get_input_embeddings().weight.shape[0]
    ids = torch.linspace(3, vocab - 1, NUM_TOKENS).long()[None]
    return model(input_ids=ids, use_cache=False).logits  # type: ignore[no-any-return]


def _agree(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, atol=TOLERANCE, rtol=1e-3)


def _masking(mask: Tensor) -> Callable[..., Any]:
    return lambda _, args: (args[0] * mask.repeat_interleave(args[0].shape[-1] // len(mask)), *args[1:])


def _pass_over(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
    before = args[0] if args else kwargs["hidden_states"]
    return (before, *output[1:]) if isinstance(output, tuple) else before
