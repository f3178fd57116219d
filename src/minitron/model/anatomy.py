"""What a family is made of: rows, taps, norms and the few things they cannot say. Text becomes these in `grammar`."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

Factor = str | int
Segment = tuple[Factor, ...]  # a product of axes and integers, outermost first
Dimension = tuple[Segment, ...]  # segments one after the other

AXES = {
    "vocab": "vocab_size",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "expert": "num_local_experts",
    "chosen": "num_experts_per_tok",
    "expert_group": "n_group",
    "expert_ffn": "moe_intermediate_size",
    "shared_ffn": "moe_shared_expert_intermediate_size",
    "latent": "moe_latent_size",
    "query": "num_attention_heads",
    "kv": "num_key_value_heads",
    "head_dim": "head_dim",
    "mhead": "mamba_num_heads",
    "mchan": "mamba_head_dim",
    "mgroup": "n_groups",
    "state": "ssm_state_size",
    "conv": "conv_kernel",
    "position": "max_position_embeddings",
    "layer": "num_hidden_layers",
}
"""What an axis of the grammar is called in a Hugging Face config, and everywhere in this project."""

PRUNABLE = {
    "hidden": "Residual channels",
    "ffn": "MLP neurons",
    "expert": "Experts of a layer",
    "expert_ffn": "Neurons of an expert",
    "shared_ffn": "Neurons of the shared experts",
    "query": "Query heads",
    "kv": "KV groups",
    "mhead": "Mamba heads",
    "mchan": "Channels of a Mamba head",
    "layer": "Layers",
}
"""The axes that can be pruned in some family, and what their entries are; a shape is given by their sizes."""

KINDS = {
    "mamba": "mamba",
    "linear_attention": "mamba",
    "attention": "attention",
    "full_attention": "attention",
    "mlp": "mlp",
    "moe": "moe",
}
"""What configs call the kinds of layers, and what the tables call them."""

SIZE_NAMES = (*(AXES[axis] for axis in PRUNABLE), *(f"num_{kind}_layers" for kind in sorted(set(KINDS.values()))))
"""What a shape may be given by: config names of axes, and the numbers of layers of each kind."""


@dataclass(frozen=True)
class Row:
    """One tensor, or one tensor of every layer, or one of every expert of every layer."""

    name: str
    dimensions: tuple[Dimension, ...]
    kind: str | None = None
    """The kind of layer that has it; None: all."""
    condition: str | None = None
    is_ignored: bool = False
    """Carried by old checkpoints, read by nobody."""
    is_buffer: bool = False
    """Stored and cut like a parameter, but not counted as one."""

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """Matches the tensor's full name; the groups `i` and `e` are the layer and the expert."""
        escaped = re.escape(self.name)
        return re.compile(escaped.replace(r"\{i\}", r"(?P<i>\d+)").replace(r"\{e\}", r"(?P<e>\d+)"))

    @property
    def is_per_layer(self) -> bool:
        """Whether every layer has a tensor of its own."""
        return "{i}" in self.name

    @property
    def is_per_expert(self) -> bool:
        """Whether every expert has a tensor of its own."""
        return "{e}" in self.name

    @property
    def is_stacked(self) -> bool:
        """Whether its first of several dimensions runs along the experts."""
        return len(self.dimensions) > 1 and self.dimensions[0] == (("expert",),)

    @cached_property
    def axes(self) -> frozenset[str]:
        """The axes that any of its dimensions runs along, and the experts' where each has a tensor of its own."""
        used = {f for dim in self.dimensions for segment in dim for f in segment if isinstance(f, str)}
        return frozenset(used | {"expert"}) if self.is_per_expert else frozenset(used)

    def tensor_name(self, layer: int | None = None, expert: int | None = None) -> str:
        """The name of the tensor of a layer and an expert."""
        return self.name.replace("{i}", str(layer)).replace("{e}", str(expert))

    def present(self, flags: Mapping[str, bool]) -> bool:
        """Whether a model with these config booleans has the tensor."""
        if self.is_ignored:
            return False
        return all(flags[flag] == wanted for flag, wanted in self.conditions.items())

    @property
    def conditions(self) -> dict[str, bool]:
        """The booleans of the config that it needs, and what they must be."""
        parts = self.condition.split(" and ") if self.condition else []
        return {part.removeprefix("not "): not part.startswith("not ") for part in parts}

    def shape(self, size: Callable[[str], Any]) -> tuple[Any, ...]:
        """The tensor's shape when axis `a` has `size(a)` entries (integers, or integer arrays)."""

        def product(segment: Segment) -> Any:
            total: Any = 1
            for factor in segment:
                total = total * (size(factor) if isinstance(factor, str) else factor)
            return total

        return tuple(sum(product(segment) for segment in dim) for dim in self.dimensions)


class Place(NamedTuple):
    """Where a tensor stands: its row, and the layer and expert it belongs to, if to one."""

    row: Row
    layer: int | None
    expert: int | None


@dataclass(frozen=True)
class Tap:
    """Where the activation along an axis is read, in every layer or in every layer of a kind.

    `side` is `input` or `output` of the module; `routed` reads a module that holds all experts of a layer.
    """

    axes: tuple[str, ...]
    """The axis it scores; or two, the outer one scored on those entries of the inner one that are kept."""
    module: str
    side: str
    stretch: int | None = None
    """Of an activation that is several products of the axes one after the other, which one."""
    kind: str | None = None
    choice: str | None = None
    """Several taps of the same axes are told apart by this; one is chosen when importance is scored."""

    @property
    def key(self) -> str:
        """What its statistics are filed under."""
        return self.module if self.stretch is None else f"{self.module}[{self.stretch}]"


@dataclass(frozen=True)
class Norm:
    """A norm over the residual channels, and the parts of the names of the tensors that read its output.

    One that nobody reads stands behind a block: its output is added to the residual stream.
    """

    name: str
    """What the names of its weight and bias begin with, in files."""
    readers: tuple[str, ...]
    condition: str | None = None
    """A config boolean without which it stands behind the block it is named after."""

    def is_in_front(self, flags: Mapping[str, bool]) -> bool:
        """Whether it stands in front of a block, which reads its output alone."""
        return bool(self.readers) and (self.condition is None or flags[self.condition])

    def is_read_by(self, row: Row) -> bool:
        """Whether a row's tensor multiplies the output of this norm."""
        in_reach = row.is_per_layer == ("{i}" in self.name)
        return in_reach and any(f".{reader}." in f".{row.name}." for reader in self.readers)


@dataclass(frozen=True)
class LayerKinds:
    """How a config says of what kind each layer is."""

    entry: str
    """A list of kinds; or, where `listed` is given, of the numbers of the layers of that kind."""
    listed: str | None = None
    otherwise: str | None = None
    period: str | None = None
    """A config entry n: of the layers not listed, only every n-th is `otherwise`, the rest are `listed` too."""

    def read(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """The kind of every layer."""
        if self.listed is None or self.otherwise is None:
            return tuple(KINDS[kind] for kind in config[self.entry])
        numbers, period = config[self.entry] or [], config[self.period] if self.period else 1
        return tuple(
            self.listed if i in numbers or (i + 1) % period else self.otherwise for i in range(config[AXES["layer"]])
        )

    def write(self, layers: tuple[str, ...]) -> dict[str, Any]:
        """The config entries of these layers; a list of kinds is cut as every list with an entry per layer."""
        if self.listed is None:
            return {}
        entries: dict[str, Any] = {self.entry: [i for i, kind in enumerate(layers) if kind == self.listed]}
        return {**entries, self.period: 1} if self.period else entries


@dataclass(frozen=True)
class Product:
    """Two axes whose product is a multiple of a third, since some tensors have one dimension for both."""

    axes: tuple[str, str]
    of: str = "hidden"
    ratio: str | None = None
    """The config entry of the integer multiple; None: it is 1."""


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
    floors: Mapping[str, str] = field(default_factory=lambda: {"expert": "chosen"})
    """Axes that keep at least as many entries as another axis has."""
    config_names: Mapping[str, str] = field(default_factory=dict)
    """Axes that this family's config calls otherwise."""
    config_products: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Further config entries that say the size of an axis, or of a product of axes."""
    ffn_multiple: int | None = None
    """The ffn is this many times hidden where the config does not say."""
    product: Product | None = None
    """An equation that every shape must satisfy."""
    prefix: str = ""
    """The first part of most names, which some published checkpoints leave out."""
    left_behind: str = ""
    """What the names of tensors begin with that transformers does not load; students are without them."""
    student_values: Mapping[str, Any] = field(default_factory=dict)
    """Config entries that every student has so."""
    per_layer_lists: tuple[str, ...] = ("layer_types",)
    """Config lists with an entry per layer, cut together with depth."""
    kinds: LayerKinds | None = None
    """How its config says of what kind each layer is; None: all layers are alike."""
    norms: tuple[Norm, ...] = ()
    """The norms over hidden."""
    norm_offset: float = 0.0
    """What its norms add to their weights."""
    scales_embedding: bool = False
    """It multiplies embeddings by the root of hidden_size."""
    scales_residual: bool = False
    """What its blocks put out is multiplied by a number of the config before the residual stream gains it."""
    is_centred: bool = False
    """Its norms subtract the mean."""
    joins_documents: bool = False
    """Its state, or in transformers its attention, runs on where positions within a block begin anew."""
    demand: Demand | None = None
    """What its config class refuses beyond what the network does."""
    logit_divisor: str | None = None
    """The config entry that logits are divided by."""
    logit_multiplier: str | None = None
    """The config entry that logits are multiplied by."""
    logit_softcap: str | None = None
    """The config entry c of a final `c · tanh(logits / c)`."""

    def config_name(self, axis: str) -> str:
        """What this family's config calls an axis."""
        return self.config_names.get(axis, AXES[axis])

    @cached_property
    def per_layer_axes(self) -> frozenset[str]:
        """Axes whose entries mean something else in every layer, so that each layer keeps its own."""
        everywhere = {axis for row in self.rows if not row.is_per_layer for axis in row.axes}
        return frozenset(axis for row in self.rows for axis in row.axes) - everywhere

    @cached_property
    def per_expert_axes(self) -> frozenset[str]:
        """Axes within a layer whose entries mean something else in every expert, so that each keeps its own."""
        of_experts = {axis for row in self.rows if row.is_per_expert or row.is_stacked for axis in row.axes}
        elsewhere = {axis for row in self.rows if not (row.is_per_expert or row.is_stacked) for axis in row.axes}
        return frozenset(of_experts - elsewhere - {"expert"})

    @cached_property
    def flags(self) -> frozenset[str]:
        """The config booleans that decide which rows are there."""
        return frozenset(flag for row in self.rows for flag in row.conditions)

    def match(self, tensor_name: str, rows: Iterable[Row] | None = None) -> Place | None:
        """Where a tensor stands among some of the rows, by default all; None when no row fits."""
        for row in self.rows if rows is None else rows:
            if found := row.pattern.fullmatch(tensor_name):
                layer = int(found["i"]) if row.is_per_layer else None
                return Place(row, layer, int(found["e"]) if row.is_per_expert else None)
        return None
