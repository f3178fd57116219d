"""A Hugging Face folder of safetensors: opened and checked without reading a weight, read and written by tensor."""

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from minitron.errors import UserError
from minitron.files import read_json
from minitron.model.arch import Arch
from minitron.model.config import COMPANIONS, PICKLES, read_config
from minitron.model.families import UnsupportedFamilyError, family_that_fits

MAX_SHARD_BYTES = 2**29
MAPPED_BYTES = 2**28
"""Files are closed and opened again after this many bytes have been read."""


@dataclass(frozen=True)
class Checkpoint:
    """A model on disk. `tensors` maps the name of each tensor to its file; nothing is loaded yet."""

    folder: Path
    config: Any
    arch: Arch
    tensors: dict[str, Path]
    is_unprefixed: bool = False
    """Whether the names on disk lack the family's prefix, which `tensors` has."""
    _handles: dict[Path, Any] = field(default_factory=dict, repr=False, compare=False)
    _read: list[int] = field(default_factory=list, repr=False, compare=False)

    def tensor(self, name: str) -> torch.Tensor:
        """Read one tensor, on the CPU, in the dtype in which it is stored."""
        with _named(self.tensors[name]):
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
        with _named(self.tensors[name]):
            return tuple(self._open(self.tensors[name]).get_slice(self._stored_name(name)).get_shape())

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
            with _named(self.tensors[name]):
                part = self._open(self.tensors[name]).get_slice(self._stored_name(name))[:1]
            digest.update(part.flatten()[:16].contiguous().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _config_text(self) -> str:
        config = {key: value for key, value in self.config.to_dict().items() if key != "transformers_version"}
        return json.dumps(config, sort_keys=True, default=str)

    def _stored_name(self, name: str) -> str:
        return name.removeprefix(self.arch.family.prefix) if self.is_unprefixed else name

    def _open(self, path: Path) -> Any:
        if path not in self._handles:
            self._handles[path] = open_safetensors(path)
        return self._handles[path]


def open_checkpoint(folder: Path, family: str | None = None) -> Checkpoint:
    """Open a Hugging Face folder and check every tensor against its family's table.

    `family` reads it as another `model_type` than its config states.

    Raises:
        UserError: the config is missing or not supported, the weights are quantised, pickled, missing or damaged, a
            tensor matches no row or has another shape, or a row has no tensor.
    """
    try:
        config = read_config(folder, family)
    except UnsupportedFamilyError as error:
        hint = ""
        if fitting := family_that_fits(set(_locate_tensors(folder))):
            hint = f"; its tensors match the table of {fitting.model_type}: try --family {fitting.model_type}"
        raise UserError(f"{error}{hint}") from error
    if quantization := getattr(config, "quantization_config", None):
        raise UserError(
            f"{folder} holds quantised weights ({dict(quantization).get('quant_method', 'of unknown method')}); "
            "convert them to bfloat16 first, or take an unquantised checkpoint"
        )
    arch = Arch.from_config(config.to_dict())
    stored, prefix = _locate_tensors(folder), arch.family.prefix
    is_unprefixed = bool(prefix) and not any(name.startswith(prefix) for name in stored)
    tensors = {prefix + name: path for name, path in stored.items()} if is_unprefixed else stored
    checkpoint = Checkpoint(folder, config, arch, tensors, is_unprefixed)
    _check_against_table(checkpoint)
    return checkpoint


def write_checkpoint(
    folder: Path, config: Any, tensors: Iterable[tuple[str, torch.Tensor]], companions_from: Path
) -> None:
    """Write a stream of tensors into sharded safetensors, with the config and the teacher's tokenizer files.

    At most two shards are in memory, the one that is being written and the next. `folder` must exist; make it with
    `files.whole_folder`.
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
    config.save_pretrained(folder)
    _copy_companions(companions_from, folder)


def write_model(folder: Path, model: Any, state: dict[str, torch.Tensor], like: Checkpoint) -> None:
    """Write a transformers model, its weights taken from `state`, with the config and tokenizer of `like`.

    transformers itself translates names in memory to names in files.
    """
    model.save_pretrained(folder, state_dict=state, max_shard_size=MAX_SHARD_BYTES)
    like.config.save_pretrained(folder)
    _copy_companions(like.folder, folder)


def _copy_companions(source: Path, folder: Path) -> None:
    for pattern in COMPANIONS:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, folder / path.name)


def open_safetensors(path: Path) -> Any:
    """Open a safetensors file.

    Raises:
        UserError: the file is missing, truncated or corrupt.
    """
    with _named(path):
        return safe_open(path, framework="pt")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is missing, truncated or corrupt: {error}") from error


def _locate_tensors(folder: Path) -> dict[str, Path]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        values = read_json(index)
        weight_map = values.get("weight_map") if isinstance(values, dict) else None
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            raise UserError(f"{index} has no weight_map of tensor names to files")
        return {name: folder / file for name, file in weight_map.items()}
    single = folder / "model.safetensors"
    if single.is_file():
        return dict.fromkeys(open_safetensors(single).keys(), single)
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise UserError(
            f"{folder} holds pickled weights ({pickles[0]}), which can execute code when loaded; "
            "convert them to safetensors first (save_pretrained writes them)"
        )
    raise UserError(f"{folder} holds no model.safetensors and no model.safetensors.index.json")


def _check_against_table(checkpoint: Checkpoint) -> None:
    arch, folder = checkpoint.arch, checkpoint.folder
    expected = dict(expected_shapes(arch))
    for name in list(checkpoint.tensors):
        if name not in expected and not _is_ignored(arch, name):
            raise UserError(f"{folder}: no row of the {arch.model_type} table matches tensor {name}")
        if name not in expected:
            del checkpoint.tensors[name]
        elif checkpoint.shape(name) != expected[name]:
            raise UserError(
                f"{folder}: tensor {name} has shape {list(checkpoint.shape(name))}, "
                f"the config makes it {list(expected[name])}"
            )
    if missing := sorted(set(expected) - set(checkpoint.tensors)):
        raise UserError(f"{folder}: tensor {missing[0]} is missing ({len(missing)} of {len(expected)} are)")


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
