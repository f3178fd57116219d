"""A model family: its table of rows, taps and norms, and the ways in which its config differs from those of others."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from minitron.model.anatomy import AXES, KINDS, Norm, Place, Row, Tap, flags_of


@dataclass(frozen=True)
class LayerKinds:
    """How a family's config states the kind of each layer."""

    entry: str
    """The config entry: a list of kinds; or, where `listed` is given, of the numbers of the layers of that kind, or how
    many layers of that kind come first."""
    listed: str | None = None
    otherwise: str | None = None
    """The kind of the layers that are not listed."""
    period: str | None = None
    """A config entry n: of the layers not listed, only every n-th is `otherwise`, all others are `listed` too."""
    comes_first: bool = False
    """Whether the entry states how many layers of the kind `listed` come before all others."""
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
        if isinstance(numbers, int):
            numbers = range(numbers)
        return tuple(
            self.listed if i in numbers or (i + 1) % period else self.otherwise for i in range(config[AXES["layer"]])
        )

    def write(self, layers: tuple[str, ...]) -> dict[str, Any]:
        """Return the config entries for these layers; a list of kinds is cut like every per-layer list."""
        if self.listed is None:
            return {}
        numbers = [i for i, kind in enumerate(layers) if kind == self.listed]
        entries: dict[str, Any] = {self.entry: len(numbers) if self.comes_first else numbers}
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
    fixed_basis: str = ""
    """The reason why its residual stream cannot be rotated, a clause, where the table itself does not show it."""
    is_transposed: bool = False
    """Whether the matrices of its layers are stored with their inputs first."""
    window_switch: str | None = None
    """A config boolean without which `sliding_window` has no effect."""
    window_period: int | None = None
    """The n of a config class that lets every n-th layer attend to all tokens unless `layer_types` is given."""
    joins_documents: bool = False
    """Whether its state, or in transformers its attention, runs across the documents of a packed block."""
    bytes_per_pair: int = 0
    """Bytes per query head and pair of tokens that autograd keeps where transformers writes attention out in torch,
    for a cap or sinks; 0 where it calls a fused kernel."""
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
    def prefix(self) -> str:
        """The first part of most names in files, which models that were saved without their output matrix leave out."""
        return self.rows[0].name.partition(".")[0] + "."

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
