"""The parts of a family's table: axes, rows, taps and norms, which `grammar` reads from text."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
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
    Axis("vocab", "vocab_size", "Tokens of the vocabulary"),
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
    Axis("query_rank", "q_lora_rank"),
    Axis("kv_rank", "kv_lora_rank"),
    Axis("turned", "qk_rope_head_dim"),
    Axis("unturned", "qk_nope_head_dim"),
    Axis("value_dim", "v_head_dim"),
    Axis("delta_key", "linear_num_key_heads"),
    Axis("delta_value", "linear_num_value_heads"),
    Axis("delta_key_dim", "linear_key_head_dim"),
    Axis("delta_value_dim", "linear_value_head_dim"),
    Axis("delta_conv", "linear_conv_kernel_dim"),
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
    "conv": "conv",
    "attention": "attention",
    "full_attention": "attention",
    "sliding_attention": "attention",
    "mlp": "mlp",
    "dense": "mlp",
    "moe": "moe",
    "sparse": "moe",
}
"""The kinds of layers: their names in configs, and their names in tables."""

SIZE_NAMES = (*(AXES[axis] for axis in PRUNABLE), *(f"num_{kind}_layers" for kind in sorted(set(KINDS.values()))))
"""The sizes that can be given for a shape: config names of prunable axes, and the numbers of layers of each kind."""


def size_of(factor: str, size: Callable[[str], Any]) -> Any:
    """Return the size of an axis, or of several that are one stretch of every entry of an outer one (`a+b`)."""
    return sum(size(axis) for axis in factor.split("+"))


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
        factors = {f for dim in self.dimensions for segment in dim for f in segment if isinstance(f, str)}
        used = {axis for factor in factors for axis in factor.split("+")}
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
                total = total * (size_of(factor, size) if isinstance(factor, str) else factor)
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
    """A name that distinguishes several taps of one axis; the recipe chooses the one that is scored."""
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
