"""What tensors go through on their way into a GGUF file: reordered, scaled, split or renamed."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from minitron.formats.gguf.source import Source

Change = Callable[[torch.Tensor, Source], torch.Tensor]
Pieces = dict[str, tuple["Piece", ...]]
"""What becomes of tensors, by the end of their names."""


@dataclass(frozen=True)
class Piece:
    """What becomes of a tensor, or of a part of it."""

    change: Change
    """Returns the piece, in float32, from the tensor in float32. It computes shapes too, on the meta device."""
    ending: str | None = None
    """The end of the piece's name, in the place of the tensor's; None leaves the name as it is."""


def same(tensor: torch.Tensor, source: Source) -> torch.Tensor:
    """Return the tensor as it is."""
    return tensor


def _adjacent_pairs(tensor: torch.Tensor, source: Source) -> torch.Tensor:
    """Reorder the rows of queries or keys: llama.cpp rotates pairs of neighbours, transformers the halves of a head."""
    width, rotated = source.arch.axis_size("head_dim"), source.rotated
    heads = tensor.unflatten(0, (-1, width))
    pairs = heads[:, :rotated].unflatten(1, (2, rotated // 2)).transpose(1, 2).flatten(1, 2)
    return torch.cat([pairs, heads[:, rotated:]], 1).flatten(0, 1)


def head_by_head(tensor: torch.Tensor, source: Source) -> torch.Tensor:
    """Reorder rows in which query, key and value of a head are adjacent: all queries, then all keys, all values."""
    heads: torch.Tensor = tensor.unflatten(0, (source.arch.axis_size("query"), 3, -1))
    return heads.transpose(0, 1).flatten(0, 2)


def transposed(tensor: torch.Tensor, source: Source) -> torch.Tensor:
    """Exchange the last two dimensions."""
    return tensor.transpose(-1, -2)


def _plus_one(tensor: torch.Tensor, source: Source) -> torch.Tensor:
    return tensor + 1


def _column(tensor: torch.Tensor, source: Source) -> torch.Tensor:
    return tensor.unsqueeze(1)


def _decay(tensor: torch.Tensor, source: Source) -> torch.Tensor:
    return -tensor.exp().unsqueeze(1)


def _without_middle(tensor: torch.Tensor, source: Source) -> torch.Tensor:
    return tensor.squeeze(1)


def _by_group(tensor: torch.Tensor, source: Source) -> torch.Tensor:
    groups: torch.Tensor = tensor.unflatten(0, (source.arch.axis_size("mgroup"), -1))
    return groups


def times(*entries: str) -> Change:
    """Return a change that multiplies by config entries: `name`, or `name[i]` of a list."""

    def multiply(tensor: torch.Tensor, source: Source) -> torch.Tensor:
        for entry in entries:
            name, _, index = entry.rstrip("]").partition("[")
            value = source.config[name]
            tensor = tensor * (value[int(index)] if index else value)
        return tensor

    return multiply


def scaled_mixer_input(tensor: torch.Tensor, source: Source) -> torch.Tensor:
    """Multiply the rows of z, x, B, C and dt by Falcon-H1's multipliers of each."""
    size = source.arch.axis_size
    wide, state = size("mhead") * size("mchan"), size("mgroup") * size("state")
    parts = tensor.split([wide, wide, state, state, size("mhead")])
    factors = source.config["ssm_multipliers"]
    scaled = [part * factor for part, factor in zip(parts, factors, strict=True)]
    whole: torch.Tensor = torch.cat(scaled) * source.config["ssm_in_multiplier"]
    return whole


def _part(number: int, count: int) -> Change:
    return lambda tensor, source: tensor.chunk(count, 0)[number]


def every_second(first: int) -> Change:
    """Return a change that takes every second entry of the last dimension, from `first` on."""
    return lambda tensor, source: tensor[..., first::2]


def _projection(axis: str, begins_after: tuple[str, ...], change: Change = same) -> Change:
    """Return a change that takes the rows of queries, keys or values from a matrix that holds all of them."""

    def take(tensor: torch.Tensor, source: Source) -> torch.Tensor:
        size, width = source.arch.axis_size, source.arch.axis_size("head_dim")
        return change(tensor.narrow(0, width * sum(map(size, begins_after)), width * size(axis)), source)

    return take


def ends(change: Change, *endings: str) -> Pieces:
    """Return one change for all tensors whose names have one of these ends."""
    return {ending: (Piece(change),) for ending in endings}


PAIRS = ends(_adjacent_pairs, "q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias")
MIXER = {
    ".A_log": (Piece(_decay),),
    ".D": (Piece(_column),),
    ".dt_bias": (Piece(same, ".dt_proj.bias"),),
    **ends(_without_middle, "conv1d.weight"),
    **ends(_by_group, "mixer.norm.weight", "mamba.norm.weight"),
}
NORM_PLUS_ONE = ends(_plus_one, "norm.weight")
EXPERTS = {
    ending: (Piece(same, ending.replace("mixer.experts", "mlp.experts")),)
    for ending in ("mixer.experts.up_proj.weight", "mixer.experts.down_proj.weight")
}
SEPARATE = {  # Phi-3's joint matrices, taken apart
    "qkv_proj.weight": (
        Piece(_projection("query", (), _adjacent_pairs), "q_proj.weight"),
        Piece(_projection("kv", ("query",), _adjacent_pairs), "k_proj.weight"),
        Piece(_projection("kv", ("query", "kv")), "v_proj.weight"),
    ),
    "gate_up_proj.weight": (Piece(_part(0, 2), "gate_proj.weight"), Piece(_part(1, 2), "up_proj.weight")),
}
