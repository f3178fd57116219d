"""A Hugging Face folder of safetensors: opened and checked without reading a weight, and read tensor by tensor."""

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from minitron.errors import UserError
from minitron.model.arch import TIED, Arch
from minitron.model.config import read_config
from minitron.model.families import UnsupportedFamilyError, family_that_fits
from minitron.model.weights import (
    FLOATS,
    is_ambiguous,
    locate_tensors,
    naming,
    open_safetensors,
    require_plain_weights,
    require_unwrapped,
)

COMPARED_ENTRIES = 2**24
"""The number of entries of two matrices that are compared at once."""
MAPPED_BYTES = 2**28
"""Files are closed and opened again after this many bytes have been read."""


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk. `tensors` maps the name of each tensor to its file; nothing is loaded yet."""

    folder: Path
    config: Any
    arch: Arch
    tensors: dict[str, Path]
    stored_names: dict[str, str] = field(default_factory=dict)
    """The names in files of those of the `tensors` that have another name there."""
    _handles: dict[Path, Any] = field(default_factory=dict, repr=False, compare=False)
    _read: list[int] = field(default_factory=list, repr=False, compare=False)

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor, on the CPU, in the dtype in which it is stored."""
        with naming(self.tensors[name]):
            value: torch.Tensor = self._open(self.tensors[name]).get_tensor(self._stored_name(name))
        # Files are mapped into memory: the pages that were read stay there until the file is closed.
        self._read.append(value.nbytes)
        if sum(self._read) > MAPPED_BYTES:
            self._read.clear()
            self._handles.clear()
        return value

    def checked_tensor(self, name: str) -> torch.Tensor:
        """Read one tensor as `tensor` does.

        Raises:
            UserError: the tensor holds NaN or infinity.
        """
        value = self.tensor(name)
        self._require_finite(name, value)
        return value

    def _require_finite(self, name: str, value: torch.Tensor) -> None:
        # Finding the extremes is many times faster than classifying every entry, and NaN propagates to them.
        if value.numel() and not torch.isfinite(torch.stack(value.aminmax())).all():
            raise UserError(f"{self.tensors[name]}: tensor {name} holds NaN or infinity")

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, from the file's header alone."""
        with naming(self.tensors[name]):
            return tuple(self._open(self.tensors[name]).get_slice(self._stored_name(name)).get_shape())

    def stored_dtype(self, name: str) -> str:
        """Return the dtype of a tensor as the file's header names it, such as `BF16`."""
        with naming(self.tensors[name]):
            return str(self._open(self.tensors[name]).get_slice(self._stored_name(name)).get_dtype())

    def holds_equal(self, one: str, other: str) -> bool:
        """Return whether two matrices are equal; some rows are read at a time, up to the first that differ."""
        if self.shape(one) != self.shape(other):
            return False
        rows, columns = self.shape(one)
        with naming(self.tensors[one]), naming(self.tensors[other]):
            slices = [self._open(self.tensors[name]).get_slice(self._stored_name(name)) for name in (one, other)]
            step = max(1, COMPARED_ENTRIES // columns)
            return all(
                torch.equal(slices[0][row : row + step], slices[1][row : row + step]) for row in range(0, rows, step)
            )

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the config states, else the dtype of the first tensor."""
        return self.config.dtype or self.tensor(next(iter(self.tensors))).dtype

    @property
    def num_bytes(self) -> int:
        """The size of the weight files."""
        return sum(path.stat().st_size for path in set(self.tensors.values()))

    def fingerprint(self, advance: Callable[[int], None] = lambda _: None) -> str:
        """Return the SHA-256 of config and weights, read once; `advance` is called with the numbers of bytes read.

        Raises:
            UserError: a tensor holds NaN or infinity.
        """
        digest = sha256(self._config_text().encode())
        for name in sorted(self.tensors):
            tensor = self.tensor(name)
            self._require_finite(name, tensor)
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            advance(tensor.nbytes)
        return digest.hexdigest()

    def identity(self) -> str:
        """Return the SHA-256 of config and the first entries of every tensor, which quickly distinguishes models."""
        digest = sha256(self._config_text().encode())
        for name in sorted(self.tensors):
            with naming(self.tensors[name]):
                part = self._open(self.tensors[name]).get_slice(self._stored_name(name))[:1]
            digest.update(part.flatten()[:16].contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _config_text(self) -> str:
        config = {key: value for key, value in self.config.to_dict().items() if key != "transformers_version"}
        return json.dumps(config, sort_keys=True, default=str)

    def _stored_name(self, name: str) -> str:
        return self.stored_names.get(name, name)

    def _open(self, path: Path) -> Any:
        if path not in self._handles:
            self._handles[path] = open_safetensors(path)
        return self._handles[path]


def open_checkpoint(folder: Path, family: str | None = None) -> Checkpoint:
    """Open a Hugging Face folder and check every tensor against its family's table.

    `family` reads it as another `model_type` than its config states. Which file holds a tensor, which name it has, and
    whether the output matrix is tied to the embeddings, is decided as transformers decides it.

    Raises:
        UserError: the config is missing or not supported, the weights are quantised, pickled, missing or damaged, a
            tensor matches no row or has another shape, or a row has no tensor.
    """
    try:
        config = read_config(folder, family)
    except UnsupportedFamilyError as error:
        if fitting := family_that_fits(set(locate_tensors(folder))):
            hint = f"; its tensors match the table of {fitting.model_type}: try --family {fitting.model_type}"
            raise UnsupportedFamilyError(error.model_type, hint) from error
        raise
    values = config.to_dict()
    require_plain_weights(folder, values)
    files = locate_tensors(folder, values.get("transformers_weights"))
    if is_ambiguous(folder):
        logging.warning("%s holds model.safetensors and an index of other files: the former is read", folder)
    require_unwrapped(folder, files)
    checkpoint = _matched(Checkpoint(folder, config, Arch.from_config(values), files))
    if checkpoint.arch.flags.get(TIED):
        checkpoint = _with_its_own_head(checkpoint)
    _check_against_table(checkpoint)
    return checkpoint


def _matched(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with its tensors under the names of the table.

    Like transformers, it accepts names without the first part that most names of the family have (models saved without
    their output matrix), and names that have it though the table's do not.
    """
    family, folder = checkpoint.arch.family, checkpoint.folder
    names: dict[str, str] = {}
    for stored in checkpoint.tensors:
        variants = (stored, family.prefix + stored, stored.removeprefix(family.prefix))
        name = next((name for name in variants if family.match(name)), stored)
        if name in names:
            raise UserError(f"{folder} holds one tensor under two names: {names[name]} and {stored}")
        names[name] = stored
    renamed = {name: stored for name, stored in names.items() if name != stored}
    return replace(
        checkpoint,
        tensors={name: checkpoint.tensors[stored] for name, stored in names.items()},
        stored_names=renamed,
    )


def _with_its_own_head(checkpoint: Checkpoint) -> Checkpoint:
    """Return a checkpoint whose config ties the output matrix to the embeddings, as transformers loads it.

    An output matrix that is stored too and differs from the embeddings stays, untied. Of the two matrices one may be
    missing, and is the other one then.
    """
    untied = replace(checkpoint.arch, flags={**checkpoint.arch.flags, TIED: False})
    embedding, output = untied.embedding.name, untied.output.name
    if output not in checkpoint.tensors:
        return checkpoint
    if embedding not in checkpoint.tensors:
        tensors = {**checkpoint.tensors, embedding: checkpoint.tensors[output]}
        stored_names = {**checkpoint.stored_names, embedding: checkpoint.stored_names.get(output, output)}
        return replace(checkpoint, tensors=tensors, stored_names=stored_names)
    if checkpoint.holds_equal(embedding, output):
        return checkpoint
    logging.warning(
        "%s: the config ties the output matrix to the embeddings, but the file holds another one (%s), which is kept, "
        "as transformers keeps it",
        checkpoint.folder,
        output,
    )
    checkpoint.config.tie_word_embeddings = False
    return replace(checkpoint, arch=Arch.from_config(checkpoint.config.to_dict()))


def _check_against_table(checkpoint: Checkpoint) -> None:
    arch, folder = checkpoint.arch, checkpoint.folder
    expected = dict(expected_shapes(arch))
    for name in list(checkpoint.tensors):
        if name not in expected and not _is_ignored(arch, name):
            raise UserError(f"{folder}: {_why_unexpected(arch, name)}")
        if name not in expected:
            del checkpoint.tensors[name]
        elif checkpoint.shape(name) != expected[name]:
            raise UserError(
                f"{folder}: tensor {name} has shape {list(checkpoint.shape(name))}, "
                f"the config makes it {list(expected[name])}"
            )
        elif (dtype := checkpoint.stored_dtype(name)) not in FLOATS:
            raise UserError(
                f"{folder}: tensor {name} is stored as {dtype}: quantised weights, which the config does not state; "
                "convert them to bfloat16 first, or take an unquantised checkpoint"
            )
    if missing := sorted(set(expected) - set(checkpoint.tensors)):
        raise UserError(
            f"{folder}: {_why_missing(checkpoint, missing)} ({len(missing)} of {len(expected)} are missing)"
        )


def _why_unexpected(arch: Arch, name: str) -> str:
    place, depth = arch.family.match(name), arch.axis_size("layer")
    if place and place.layer is not None and place.layer >= depth:
        return f"tensor {name} belongs to a layer beyond the {depth} layers that the config states"
    return f"no row of the {arch.model_type} table matches tensor {name}"


def _why_missing(checkpoint: Checkpoint, missing: list[str]) -> str:
    """Name the reason for which tensors are missing: the last layers, the output matrix, or the first such tensor."""
    arch = checkpoint.arch
    layers = {place.layer for name in checkpoint.tensors if (place := arch.match(name)) and place.layer is not None}
    stored, depth = max(layers, default=-1) + 1, arch.axis_size("layer")
    lacking = {place.layer for name in missing if (place := arch.match(name))}
    if stored < depth and lacking == set(range(stored, depth)):
        return f"the config states {depth} layers, the weights hold the first {stored}"
    if missing == [arch.output.name]:
        return f"tensor {missing[0]} is missing: the model was saved without its output matrix, which the config unties"
    return f"tensor {missing[0]} is missing"


def _is_ignored(arch: Arch, name: str) -> bool:
    if arch.family.left_behind and name.startswith(arch.family.left_behind):
        return True
    place = arch.family.match(name)
    # Some writers store the output matrix of a tied model a second time; it is the embedding.
    return place is not None and (place.row.is_ignored or place.row.condition == "not tie_word_embeddings")


def expected_shapes(arch: Arch) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the name and shape of every tensor that a model of this shape stores, in the order of the table."""
    for row, layer, expert in arch.places():
        yield row.tensor_name(layer, expert), row.shape(arch.axis_size)
