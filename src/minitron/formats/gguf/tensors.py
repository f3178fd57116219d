"""The tensors of a GGUF file: which of a checkpoint's tensors each is made of, its shape and its type."""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type

from minitron.errors import UserError
from minitron.formats.gguf.architectures import Architecture
from minitron.formats.gguf.pieces import Piece
from minitron.formats.gguf.rope import rope_factors
from minitron.formats.gguf.source import Source
from minitron.model.anatomy import in_backbone
from minitron.model.arch import TIED
from minitron.model.checkpoint import Checkpoint

ALWAYS_FLOAT32 = ("_norm.weight", "ffn_gate_inp.weight", "position_embd.weight", "ssm_conv1d.weight")
"""The ends of the names of matrices that llama.cpp reads in float32, as it does vectors."""
SUFFIXES = (".weight", ".bias")
WHOLE = Piece(lambda tensor, source: tensor)


@dataclass(frozen=True)
class Planned:
    """A tensor of the file, before it is read."""

    name: str
    """Its name in the file."""
    parts: tuple[str, ...]
    """The checkpoint's tensors that it is made of; several are stacked, as those of experts are."""
    piece: Piece
    shape: tuple[int, ...]
    type: Type

    def value(self, checkpoint: Checkpoint, source: Source) -> torch.Tensor:
        """Read and change the tensor, on the CPU, in float32.

        Raises:
            UserError: it holds NaN or infinity.
        """
        pieces = [self.piece.change(checkpoint.checked_tensor(part).float(), source) for part in self.parts]
        return torch.stack(pieces) if len(pieces) > 1 else pieces[0]


def plan_tensors(source: Source, architecture: Architecture, type: Type) -> list[Planned]:
    """Return the tensors of a model's file, matrices in the type that is asked for where their rows fit its blocks.

    Names come from gguf's own map.

    Raises:
        UserError: the map has no name for a tensor, so that llama.cpp has no place for it.
    """
    names = gguf.get_tensor_name_map(_known_architecture(architecture.name), source.arch.axis_size("layer"))
    planned = []
    for name, parts, shape in _sources(source, architecture):
        for piece in next((found for end, found in architecture.pieces.items() if name.endswith(end)), (WHOLE,)):
            changed = piece.change(torch.empty(shape, device="meta"), source)
            stacked = (len(parts), *changed.shape) if len(parts) > 1 else tuple(changed.shape)
            renamed = _renamed(name, piece, architecture)
            # The map knows some tensors of `backbone.layers` as tensors of `model.layers` only.
            variants = (renamed, f"model.{in_backbone(renamed)}")
            found = next(filter(None, (names.get_name(each, try_suffixes=SUFFIXES) for each in variants)), None)
            if found is None:
                raise UserError(f"llama.cpp has no place for the tensor {name} in a {architecture.name} model")
            planned.append(Planned(found, parts, piece, stacked, stored_type(found, stacked, type)))
    return planned


def extra_tensors(source: Source) -> dict[str, np.ndarray]:
    """Return tensors that no checkpoint holds, in float32: the factors of rotary frequencies."""
    return {name: factors.numpy() for name, factors in rope_factors(source).items()}


def stored_type(name: str, shape: tuple[int, ...], type: Type) -> Type:
    """Return the type in which a tensor is stored: the wanted one, or float32 or float16 where it cannot be."""
    if len(shape) < 2 or name.endswith(ALWAYS_FLOAT32) or not name.endswith(".weight"):
        return Type.F32
    block = gguf.GGML_QUANT_SIZES[type][0]
    return type if shape[-1] % block == 0 else Type.F16


def encoded(value: torch.Tensor, planned: Planned) -> np.ndarray:
    """Return the bytes of a tensor in its type.

    Raises:
        UserError: a number is beyond the range of float16.
    """
    if planned.type == Type.F16 and value.numel() and float(value.abs().max()) > torch.finfo(torch.float16).max:
        raise UserError(f"{planned.parts[0]} holds numbers beyond the range of float16: choose bf16 or f32")
    if planned.type == Type.BF16:
        return value.to(torch.bfloat16).contiguous().view(torch.uint8).numpy()
    data = gguf.quants.quantize(value.contiguous().numpy(), planned.type)
    return np.ascontiguousarray(data)


def num_bytes(planned: Planned) -> int:
    """Return the bytes that a tensor takes in the file."""
    block, size = gguf.GGML_QUANT_SIZES[planned.type]
    total: int = prod(planned.shape) // block * size
    return total


def _sources(source: Source, architecture: Architecture) -> Iterator[tuple[str, tuple[str, ...], tuple[int, ...]]]:
    """Yield names in files, the tensors that make each up, and the shape of one of them; experts are taken together."""
    arch = source.arch
    for row in arch.rows:
        shape = row.shape(arch.axis_size)
        experts = range(arch.axis_size("expert")) if row.is_per_expert else None
        for layer in arch.layer_numbers(row.kind) if row.is_per_layer else [None]:
            if experts is None:
                name = row.tensor_name(layer)
                yield name, (name,), shape
            else:
                parts = tuple(row.tensor_name(layer, expert) for expert in experts)
                yield row.tensor_name(layer).replace("experts.None.", "experts."), parts, shape
    if architecture.has_own_output and arch.flags.get(TIED):
        output = next(row for row in reversed(arch.family.rows) if row.axes == {"vocab", "hidden"})
        yield output.name, (arch.embedding.name,), arch.embedding.shape(arch.axis_size)


def _renamed(name: str, piece: Piece, architecture: Architecture) -> str:
    end = next((end for end in architecture.pieces if name.endswith(end)), "")
    return name if piece.ending is None else name.removesuffix(end) + piece.ending


def _known_architecture(name: str) -> gguf.MODEL_ARCH:
    try:
        return next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
    except StopIteration:
        raise UserError(f"this version of the gguf package knows no {name}: pip install --upgrade gguf") from None
