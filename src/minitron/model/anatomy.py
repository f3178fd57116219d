"""The parts that a family's table is made of: axes, rows, taps, norms, and what else the code knows about a family.

`grammar` reads these parts from text.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

Factor = str | int
Segment = tuple[Factor, ...]  # a product of axes and integers, outermost first
Dimension = tuple[Segment, ...]  # segments one after the other


@dataclass(frozen=True)
class Axis:
    """One kind of dimension of a model's tensors.

    A new axis is an entry of `AXIS_TABLE` and, in the families that prune it, a tap; searches, the command line and
    reports read the rest from here.
    """

    name: str
    """The name in the grammar of tables."""
    config_name: str
    """The name of its size in a Hugging Face config, and everywhere in this project."""
    entries: str = ""
    """What its entries are, for the command line's help; empty for an axis that no family prunes."""
    is_width: bool = False
    """Whether searches change it in the steps that matrix units ask for, 64 entries."""
    is_count: bool = False
    """Whether its entries are few, so that searches change it in small steps; axes that come in groups always do."""


AXIS_TABLE = (
    Axis("vocab", "vocab_size"),
    Axis("hidden", "hidden_size", "Residual channels", is_width=True),
    Axis("ffn", "intermediate_size", "MLP neurons", is_width=True),
    Axis("expert", "num_local_experts", "Experts of a layer", is_count=True),
    Axis("chosen", "num_experts_per_tok"),
    Axis("expert_group", "n_group"),
    Axis("expert_ffn", "moe_intermediate_size", "Neurons of an expert", is_width=True),
    Axis("shared_ffn", "moe_shared_expert_intermediate_size", "Neurons of the shared experts", is_width=True),
    Axis("latent", "moe_latent_size", "Channels of the experts' latent space", is_width=True),
    Axis("query", "num_attention_heads", "Query heads"),
    Axis("kv", "num_key_value_heads", "KV groups"),
    Axis("head_dim", "head_dim"),
    Axis("mhead", "mamba_num_heads", "Mamba heads"),
    Axis("mchan", "mamba_head_dim", "Channels of a Mamba head"),
    Axis("mgroup", "n_groups"),
    Axis("state", "ssm_state_size"),
    Axis("conv", "conv_kernel"),
    Axis("position", "max_position_embeddings"),
    Axis("layer", "num_hidden_layers", "Layers", is_count=True),
)

AXES = {axis.name: axis.config_name for axis in AXIS_TABLE}
"""The config name of every axis, by its name in the grammar."""

PRUNABLE = {axis.name: axis.entries for axis in AXIS_TABLE if axis.entries}
"""The axes that can be pruned in some family, and what their entries are; a shape is given by their sizes."""

KINDS = {
    "mamba": "mamba",
    "linear_attention": "mamba",
    "attention": "attention",
    "full_attention": "attention",
    "mlp": "mlp",
    "moe": "moe",
}
"""The kinds of layers: their names in configs, and their names in tables."""

SIZE_NAMES = (*(AXES[axis] for axis in PRUNABLE), *(f"num_{kind}_layers" for kind in sorted(set(KINDS.values()))))
"""The sizes that can be given for a shape: config names of prunable axes, and the numbers of layers of each kind."""


def flags_of(condition: str | None) -> dict[str, bool]:
    """Return the config booleans that a condition such as `A and not B` names, and the values that it asks for."""
    parts = condition.split(" and ") if condition else []
    return {part.removeprefix("not "): not part.startswith("not ") for part in parts}


def holds(condition: str | None, flags: Mapping[str, bool]) -> bool:
    """Return whether config booleans meet a condition such as `A and not B`; no condition is always met."""
    return all(flags[flag] == wanted for flag, wanted in flags_of(condition).items())


def in_backbone(name: str) -> str:
    """Return a module's or tensor's name without its first part.

    transformers may load a checkpoint's `backbone.` as `model.`, or add a prefix that files lack; after the first dot
    names in files and in memory agree. This is the name within a transformers model's `base_model`.
    """
    return name.split(".", 1)[-1]


@dataclass(frozen=True)
class Row:
    """A line of a family's table: a tensor, or one such tensor in every layer, or of every expert of every layer."""

    name: str
    """The tensor's name in files, with `{i}` for the layer and `{e}` for the expert."""
    dimensions: tuple[Dimension, ...]
    kind: str | None = None
    """The kind of layer that has the tensor; None for every kind."""
    condition: str | None = None
    """The config booleans with which a model has the tensor: `A and not B`."""
    is_ignored: bool = False
    """Whether it is a buffer of old checkpoints that no model reads."""
    is_buffer: bool = False
    """Whether it is stored and cut like a parameter, but not counted as one."""

    @cached_property
    def pattern(self) -> re.Pattern[str]:
        """A pattern of the tensor's full name; the groups `i` and `e` are the layer and the expert."""
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
        """Whether the tensor has several dimensions, the first of them along the experts."""
        return len(self.dimensions) > 1 and self.dimensions[0] == (("expert",),)

    @property
    def owner(self) -> str:
        """The name in files of the module that holds the tensor."""
        return self.name.rpartition(".")[0]

    @property
    def module(self) -> str:
        """The name of the module that holds the tensor, within a transformers model's `base_model`."""
        return in_backbone(self.owner)

    @cached_property
    def axes(self) -> frozenset[str]:
        """The axes of all dimensions, and `expert` where every expert has a tensor of its own."""
        used = {f for dim in self.dimensions for segment in dim for f in segment if isinstance(f, str)}
        return frozenset(used | {"expert"}) if self.is_per_expert else frozenset(used)

    def tensor_name(self, layer: int | None = None, expert: int | None = None) -> str:
        """Return the name in files of the tensor of a layer and an expert."""
        return self.name.replace("{i}", str(layer)).replace("{e}", str(expert))

    def present(self, flags: Mapping[str, bool]) -> bool:
        """Return whether a model with these config booleans has the tensor."""
        return not self.is_ignored and holds(self.condition, flags)

    def shape(self, size: Callable[[str], Any]) -> tuple[Any, ...]:
        """Return the tensor's shape when axis `a` has `size(a)` entries (integers, or integer arrays)."""

        def product(segment: Segment) -> Any:
            total: Any = 1
            for factor in segment:
                total = total * (size(factor) if isinstance(factor, str) else factor)
            return total

        return tuple(sum(product(segment) for segment in dim) for dim in self.dimensions)


class Place(NamedTuple):
    """The place of a tensor in a model: its row, its layer and its expert; None where it belongs to no single one."""

    row: Row
    layer: int | None
    expert: int | None


@dataclass(frozen=True)
class Tap:
    """A place where the activation along an axis is read, in every layer or in every layer of a kind."""

    axes: tuple[str, ...]
    """The axis that is scored; or two, the outer one scored on those entries of the inner one that are kept."""
    module: str
    """The module's name in memory, with `{i}` for the layer."""
    side: str
    """`input` or `output` of the module; `routed` for the inner states of a module that holds a layer's experts."""
    stretch: int | None = None
    """The number of the product of axes to read, where the activation is several products one after the other."""
    kind: str | None = None
    """The kind of layer that has the module; None for every kind."""
    choice: str | None = None
    """A name that tells several taps of one axis apart; the recipe chooses the one that is scored."""
    condition: str | None = None
    """The config booleans with which a model has the module: `A and not B`."""

    @property
    def key(self) -> str:
        """The key of the tap's statistics."""
        return self.module if self.stretch is None else f"{self.module}[{self.stretch}]"

    def reads_input_of(self, row: Row) -> bool:
        """Return whether the tap reads the input that a row's matrix multiplies."""
        return self.side == "input" and len(row.dimensions) > 1 and in_backbone(self.module) == row.module


@dataclass(frozen=True)
class Norm:
    """A norm over the residual channels, and the tensors that read its output.

    A norm without readers stands after a block: its output is added to the residual stream.
    """

    name: str
    """The norm's name in files: its weight and bias are `name.weight` and `name.bias`."""
    readers: tuple[str, ...]
    """Parts of the names of the tensors that read its output."""
    condition: str | None = None
    """A config boolean without which the norm stands after the block that it is named after."""

    @property
    def is_per_layer(self) -> bool:
        """Whether every layer has such a norm."""
        return "{i}" in self.name

    @property
    def module(self) -> str:
        """The name of the norm within a transformers model's `base_model`."""
        return in_backbone(self.name)

    def weight_name(self, layer: int | None = None) -> str:
        """Return the name of the weight in files; without a layer, the name of its row."""
        return self._in_layer(f"{self.name}.weight", layer)

    def bias_name(self, layer: int | None = None) -> str:
        """Return the name of the bias in files; without a layer, the name of its row."""
        return self._in_layer(f"{self.name}.bias", layer)

    def _in_layer(self, name: str, layer: int | None) -> str:
        return name if layer is None else name.replace("{i}", str(layer))

    def is_before_block(self, flags: Mapping[str, bool]) -> bool:
        """Return whether the norm stands before a block, which reads its output alone."""
        return bool(self.readers) and holds(self.condition, flags)

    def is_read_by(self, row: Row) -> bool:
        """Return whether a row's tensor multiplies the output of this norm."""
        in_reach = row.is_per_layer == self.is_per_layer
        return in_reach and any(f".{reader}." in f".{row.name}." for reader in self.readers)


@dataclass(frozen=True)
class LayerKinds:
    """How a family's config states the kind of each layer."""

    entry: str
    """The config entry: a list of kinds; or, where `listed` is given, of the numbers of the layers of that kind."""
    listed: str | None = None
    otherwise: str | None = None
    """The kind of the layers that are not listed."""
    period: str | None = None
    """A config entry n: of the layers not listed, only every n-th is `otherwise`, all others are `listed` too."""
    pattern: str | None = None
    """A config entry that may stand in the place of the list: a string with a character of `characters` per layer."""
    characters: Mapping[str, str] = field(default_factory=dict)
    """The kinds that the characters of the pattern stand for, as the config names them."""

    def listing(self, config: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the config with its pattern, if it has a valid one, translated to the list of kinds."""
        text = config.get(self.pattern) if self.pattern else None
        if not isinstance(text, str) or not text or not set(text) <= self.characters.keys():
            return config
        listed = config.get(self.entry)
        kinds = [self.characters[character] for character in text] if listed is None else listed
        return {name: value for name, value in config.items() if name != self.pattern} | {self.entry: kinds}

    def read(self, config: Mapping[str, Any]) -> tuple[str, ...]:
        """Return the kind of every layer."""
        if self.listed is None or self.otherwise is None:
            return tuple(KINDS[kind] for kind in config[self.entry])
        numbers, period = config[self.entry] or [], config[self.period] if self.period else 1
        return tuple(
            self.listed if i in numbers or (i + 1) % period else self.otherwise for i in range(config[AXES["layer"]])
        )

    def write(self, layers: tuple[str, ...]) -> dict[str, Any]:
        """Return the config entries for these layers; a list of kinds is cut like every per-layer list."""
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
    """The config entry of the integer multiple; None where the multiple is 1."""


@dataclass(frozen=True)
class Demand:
    """A condition that a config class sets on shapes though the network does not, and perhaps a way round it."""

    multiple: str
    of: str
    """The config class refuses shapes in which axis `multiple` is not a multiple of axis `of`."""
    restated_as: str | None = None
    """Another `model_type` under which the same network is accepted."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """The entries with which a config of that type means the same network."""
    without: tuple[str, ...] = ()
    """Flags of this family that the other type cannot express."""


@dataclass(frozen=True)
class Family:
    """Everything that the code knows about a model family.

    `norms` and `taps` are in the order in which the model passes them: the norms of a layer in their order, the final
    norm last, and the taps at the inputs of matrices that write the residual stream in the order in which they write.
    So the norm after a block is the next line, and the last matrix of a layer completes the stream.

    Raises:
        ValueError: the final norm is not last, or the taps are not in the order of their blocks.
    """

    model_type: str
    rows: tuple[Row, ...]
    taps: tuple[Tap, ...]
    layer: str
    """The name in memory of the module of a layer, whose input and output are the residual stream."""
    norms: tuple[Norm, ...]
    """The norms over hidden, in the order in which the model passes them; the final norm is last."""
    grouped: Mapping[str, str] = field(default_factory=lambda: {"query": "kv"})
    """Axes whose entries are split equally among, and ranked within, the entries of another axis."""
    floors: Mapping[str, str] = field(default_factory=lambda: {"expert": "chosen"})
    """Axes that keep at least as many entries as another axis has."""
    config_names: Mapping[str, str] = field(default_factory=dict)
    """The config names of axes for which this family does not use the common name."""
    config_defaults: Mapping[str, Any] = field(default_factory=dict)
    """The defaults of the config entries that sizes, booleans and windows are read from, where they are constants.

    An entry without one is computed by the config class, or never missing; see `config.decided_values`.
    """
    config_products: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Further config entries that state the size of an axis, or of a product of axes."""
    ffn_multiple: int | None = None
    """The ratio of ffn to hidden where the config does not state ffn."""
    product: Product | None = None
    """An equation that every shape must satisfy."""
    prefix: str = ""
    """The first part of most names, which some published checkpoints leave out."""
    left_behind: str = ""
    """The beginning of the names of tensors that transformers does not load; students are without them."""
    student_values: Mapping[str, Any] = field(default_factory=dict)
    """Config entries that every student gets."""
    per_layer_lists: tuple[str, ...] = ("layer_types",)
    """Config lists with an entry per layer, cut together with depth."""
    kinds: LayerKinds | None = None
    """How the config states the kind of each layer; None where all layers are alike."""
    norm_offset: float = 0.0
    """The number that its norms add to their weights."""
    scales_embedding: bool = False
    """Whether embeddings are multiplied by the root of hidden_size."""
    scales_residual: bool = False
    """Whether a block's output is multiplied by a number from the config before it is added to the residual stream."""
    is_centred: bool = False
    """Whether its norms subtract the mean."""
    rope_kinds: tuple[str, ...] = ("default", "llama3", "yarn")
    """Kinds of rotary embedding that its config class accepts."""
    window_switch: str | None = None
    """A config boolean without which `sliding_window` has no effect."""
    window_period: int | None = None
    """The n of a config class that lets every n-th layer attend to all tokens unless `layer_types` is given."""
    joins_documents: bool = False
    """Whether its state, or in transformers its attention, runs across the documents of a packed block."""
    demand: Demand | None = None
    """A condition that its config class sets and the network does not."""
    logit_divisor: str | None = None
    """The config entry that logits are divided by."""
    logit_multiplier: str | None = None
    """The config entry that logits are multiplied by."""
    logit_softcap: str | None = None
    """The config entry c of a final `c · tanh(logits / c)`."""

    def __post_init__(self) -> None:
        if [norm.is_per_layer for norm in self.norms] != [True] * (len(self.norms) - 1) + [False]:
            raise ValueError(f"{self.model_type}: the last of the norms must be the final one, all others per layer")
        before = -1
        for tap in self.taps:
            number = self._block_of(tap)
            if number is not None and number < before:
                raise ValueError(
                    f"{self.model_type}: the tap at {tap.module} must come before taps of later blocks: taps stand in "
                    "the order in which their blocks write the residual stream"
                )
            before = before if number is None else number

    def _block_of(self, tap: Tap) -> int | None:
        """Return the number among the norms of the one that stands before the block of an input tap."""
        rows = (row for row in self.rows if tap.axes != ("hidden",) and tap.reads_input_of(row))
        return next((self.norms.index(norm) for row in rows if (norm := self.norm_before(row))), None)

    def config_name(self, axis: str) -> str:
        """Return the name of an axis in this family's config."""
        return self.config_names.get(axis, AXES[axis])

    def attention_kinds(self, depth: int) -> list[str]:
        """Return the `layer_types` that its config class makes for `depth` layers, from `window_period`."""
        period = self.window_period or 1
        return ["sliding_attention" if (i + 1) % period else "full_attention" for i in range(depth)]

    def layer_module(self, number: int) -> str:
        """Return the name in memory of the module of a layer."""
        return self.layer.replace("{i}", str(number))

    @property
    def layer_list(self) -> str:
        """The name in memory of the list of layers."""
        return self.layer.removesuffix(".{i}")

    @property
    def final_norm(self) -> Norm:
        """The norm after the last layer, whose output the output matrix reads."""
        return self.norms[-1]

    @property
    def layer_norms(self) -> tuple[Norm, ...]:
        """The norms that every layer has, in the order in which a layer passes them."""
        return self.norms[:-1]

    def norm_before(self, row: Row) -> Norm | None:
        """Return the norm of the layer that stands before the block of a row's tensor, or None.

        A block is the tensors whose modules are in one module; its norm is the one that one of its tensors reads.
        """
        block = row.owner.rpartition(".")[0]
        members = [other for other in self.rows if other.owner.rpartition(".")[0] == block]
        return next((norm for norm in self.layer_norms if any(map(norm.is_read_by, members))), None)

    @cached_property
    def per_layer_axes(self) -> frozenset[str]:
        """The axes whose entries mean something else in every layer, so that each layer keeps its own."""
        everywhere = {axis for row in self.rows if not row.is_per_layer for axis in row.axes}
        return frozenset(axis for row in self.rows for axis in row.axes) - everywhere

    @cached_property
    def per_expert_axes(self) -> frozenset[str]:
        """The axes within a layer whose entries mean something else in every expert, so that each keeps its own."""
        of_experts = {axis for row in self.rows if row.is_per_expert or row.is_stacked for axis in row.axes}
        elsewhere = {axis for row in self.rows if not (row.is_per_expert or row.is_stacked) for axis in row.axes}
        return frozenset(of_experts - elsewhere - {"expert"})

    @cached_property
    def flags(self) -> frozenset[str]:
        """The config booleans that decide which tensors a model has."""
        return frozenset(flag for row in self.rows for flag in flags_of(row.condition))

    def match(self, tensor_name: str, rows: Iterable[Row] | None = None) -> Place | None:
        """Return the place of a tensor among some of the rows, by default all; None when no row fits."""
        for row in self.rows if rows is None else rows:
            if match := row.pattern.fullmatch(tensor_name):
                layer = int(match["i"]) if row.is_per_layer else None
                return Place(row, layer, int(match["e"]) if row.is_per_expert else None)
        return None
