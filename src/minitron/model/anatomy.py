"""The grammar in which a family is written: one row per tensor, one axis per dimension.

    model.embed_tokens.weight                  vocab hidden
    model.layers.{i}.self_attn.q_proj.weight   (query head_dim) hidden
    model.layers.{i}.self_attn.q_proj.bias     (query head_dim)            if attention_bias
    lm_head.weight                             vocab hidden                if not tie_word_embeddings
    (phi3) …self_attn.qkv_proj.weight          (query head_dim | kv head_dim | kv head_dim) hidden

A dimension is an axis, or in parentheses a product of axes and integers, outermost first; `|` joins
products one after the other. `{i}` stands for the layer. `if` names a boolean of the config. The shape `-`
marks a buffer that old checkpoints carry and nobody reads.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

Factor = str | int
Segment = tuple[Factor, ...]  # a product of axes and integers, outermost first
Dimension = tuple[Segment, ...]  # segments one after the other

AXES = {
    "vocab": "vocab_size",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "query": "num_attention_heads",
    "kv": "num_key_value_heads",
    "head_dim": "head_dim",
    "position": "max_position_embeddings",
    "layer": "num_hidden_layers",
}
"""What an axis of the grammar is called in a Hugging Face config, and everywhere in this project."""


@dataclass(frozen=True)
class Row:
    """One tensor, or one tensor of every layer."""

    name: str
    dimensions: tuple[Dimension, ...]
    condition: str | None = None
    is_buffer: bool = False

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches the tensor's full name; the group `i` is the layer."""
        return re.compile(re.escape(self.name).replace(r"\{i\}", r"(?P<i>\d+)"))

    @property
    def is_per_layer(self) -> bool:
        """Whether every layer has a tensor of its own."""
        return "{i}" in self.name

    @property
    def axes(self) -> set[str]:
        """The axes that any of its dimensions runs along."""
        return {f for dim in self.dimensions for segment in dim for f in segment if isinstance(f, str)}

    def present(self, flags: Mapping[str, bool]) -> bool:
        """Whether a model with these config booleans has the tensor."""
        if self.is_buffer:
            return False
        if self.condition is None:
            return True
        return flags[self.condition.removeprefix("not ")] != self.condition.startswith("not ")

    def shape(self, size: Callable[[str], Any]) -> tuple[Any, ...]:
        """The tensor's shape when axis `a` has `size(a)` entries (integers, or integer arrays)."""

        def product(segment: Segment) -> Any:
            total: Any = 1
            for factor in segment:
                total = total * (size(factor) if isinstance(factor, str) else factor)
            return total

        return tuple(sum(product(segment) for segment in dim) for dim in self.dimensions)


@dataclass(frozen=True)
class Tap:
    """Where the activation along an axis is read: the input or the output of a module of every layer."""

    axis: str
    module: str
    side: str


@dataclass(frozen=True)
class Demand:
    """What a config class asks of a shape though the network does not, and the way out, if there is one."""

    multiple: str
    of: str
    """The config class refuses shapes whose axis `multiple` is no multiple of the axis `of`."""
    restated_as: str | None = None
    """Another `model_type` under which the same network has no such demand."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """What the other config must say to mean the same network."""
    without: tuple[str, ...] = ()
    """Flags of this family that the other cannot express."""


@dataclass(frozen=True)
class Family:
    """Everything that the code knows about a model family."""

    model_type: str
    rows: tuple[Row, ...]
    taps: tuple[Tap, ...]
    layer: str
    """The module of one layer, whose input and output are the residual stream."""
    grouped: Mapping[str, str] = field(default_factory=lambda: {"query": "kv"})
    """Axes whose entries are dealt out equally to, and ranked within, the entries of another axis."""
    config_names: Mapping[str, str] = field(default_factory=dict)
    """Axes that this family's config calls otherwise."""
    config_copies: Mapping[str, str] = field(default_factory=dict)
    """Further config entries that say the size of an axis."""
    ffn_multiple: int | None = None
    """The ffn is this many times hidden where the config does not say."""
    is_square: bool = False
    """The network has no head_dim of its own: hidden is query heads times head_dim, whatever is cut."""
    prefix: str = ""
    """The first part of most names, which some published checkpoints leave out."""
    per_layer_lists: tuple[str, ...] = ("layer_types",)
    """Config lists with an entry per layer, cut together with depth."""
    demand: Demand | None = None
    """What its config class refuses beyond what the network does."""
    logit_divisor: str | None = None
    """The config entry that logits are divided by."""
    logit_softcap: str | None = None
    """The config entry c of a final `c · tanh(logits / c)`."""

    def config_name(self, axis: str) -> str:
        """What this family's config calls an axis."""
        return self.config_names.get(axis, AXES[axis])

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """The axes that its tensors have, and depth."""
        used = {axis for row in self.rows for axis in row.axes} | {"layer"}
        return tuple(axis for axis in AXES if axis in used)

    @cached_property
    def prunable_axes(self) -> tuple[str, ...]:
        """The axes that taps score, the groups that these are dealt out to, and depth."""
        tapped = {tap.axis for tap in self.taps}
        groups = {group for axis, group in self.grouped.items() if axis in tapped}
        return tuple(axis for axis in self.axes if axis in tapped | groups | {"layer"})

    @cached_property
    def per_layer_axes(self) -> frozenset[str]:
        """Axes whose entries mean something else in every layer, so that each layer keeps its own."""
        everywhere = {axis for row in self.rows if not row.is_per_layer for axis in row.axes}
        return frozenset(axis for row in self.rows for axis in row.axes) - everywhere

    @cached_property
    def flags(self) -> frozenset[str]:
        """The config booleans that decide which rows are there."""
        return frozenset(row.condition.removeprefix("not ") for row in self.rows if row.condition)

    def match(self, tensor_name: str) -> tuple[Row, int | None] | None:
        """The row of a tensor and its layer (None outside the layers), or None when no row fits."""
        for row in self.rows:
            if found := row.pattern.fullmatch(tensor_name):
                return row, int(found["i"]) if row.is_per_layer else None
        return None


def parse_rows(table: str) -> tuple[Row, ...]:
    """Read a table, a row a line; blank lines and lines starting with `#` are skipped."""
    return tuple(_parse_row(line.strip()) for line in _lines(table))


def parse_taps(table: str) -> tuple[Tap, ...]:
    """Read lines of `axis  module  input|output`."""
    taps = []
    for line in _lines(table):
        axis, module, side = line.split()
        if axis not in AXES or side not in {"input", "output"}:
            raise ValueError(f"not a tap: {line!r}")
        taps.append(Tap(axis, module, side))
    return tuple(taps)


def _lines(table: str) -> list[str]:
    return [line for line in table.splitlines() if line.strip() and not line.strip().startswith("#")]


def _parse_row(line: str) -> Row:
    body, _, condition = line.partition(" if ")
    name, *dimensions = re.findall(r"\([^)]*\)|[^\s()]+", body)
    if dimensions == ["-"]:
        return Row(name, (), is_buffer=True)
    return Row(name, tuple(_parse_dimension(dim) for dim in dimensions), condition.strip() or None)


def _parse_dimension(text: str) -> Dimension:
    return tuple(tuple(_parse_factor(word) for word in segment.split()) for segment in text.strip("()").split("|"))


def _parse_factor(word: str) -> Factor:
    if word.isdigit():
        return int(word)
    if word not in AXES:
        raise ValueError(f"unknown axis {word!r}; known: {', '.join(AXES)}")
    return word
