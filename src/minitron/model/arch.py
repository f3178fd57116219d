"""The shape of a model: its sizes under their config names, and exact counts derived from its family's table."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import Any

from minitron.errors import UserError, nearest
from minitron.model.anatomy import AXES, Norm, Place, Row, Tap, holds
from minitron.model.families import family_of
from minitron.model.family import Demand, Family

TIED = "tie_word_embeddings"
EXPERT_MULTIPLE = 8
"""Sizes of experts are a multiple of this: kernels for groups of experts read 16 bytes at once, 8 bfloat16 numbers."""


@dataclass(frozen=True)
class Arch:
    """The shape of a model: a family, its sizes by config name, and the config booleans that its table names.

    Where layers are of several kinds, `sizes` also holds the number of layers of each kind (`num_mamba_layers`), and
    `layers` their order; the order is empty for a shape that no model has been cut to yet.
    """

    model_type: str
    sizes: Mapping[str, int]
    flags: Mapping[str, bool] = field(default_factory=dict)
    layers: tuple[str, ...] = ()

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Arch":
        """Read the sizes from the entries of a config, its defaults filled in (`config.config_values`).

        Raises:
            UserError: the `model_type` is unknown, or a size is missing.
        """
        family = family_of(str(config.get("model_type")))
        flags = {flag: bool(config.get(flag)) for flag in sorted(family.flags)}
        layers = family.kinds.read(config) if family.kinds else ()
        depth = {_kind_size(kind): count for kind, count in sorted(Counter(layers).items())}
        if layers:
            depth[AXES["layer"]] = len(layers)
        arch = cls(family.model_type, depth, flags, layers)
        values = {axis: config.get(family.config_name(axis)) for axis in arch.axes if AXES[axis] not in depth}
        if values.get("kv", 0) is None:
            values["kv"] = values["query"]
        if values.get("head_dim", 0) is None and values["query"] and values["hidden"]:
            values["head_dim"] = values["hidden"] // values["query"]
        if values.get("ffn", 0) is None and family.ffn_multiple and values["hidden"]:
            values["ffn"] = family.ffn_multiple * values["hidden"]
        if missing := [family.config_name(axis) for axis, size in values.items() if size is None]:
            raise UserError(f"the config does not say {', '.join(missing)}")
        sizes = {AXES[axis]: int(size) for axis, size in values.items() if size is not None} | depth
        if wrong := [name for name, size in sizes.items() if size < 1]:
            raise UserError(f"the config says {wrong[0]} {sizes[wrong[0]]}")
        return replace(arch, sizes=sizes)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], teacher: "Arch") -> "Arch":
        """Return the shape whose `to_dict` is `values`; it has the family and the booleans of its teacher.

        Raises:
            UserError: a name is not a size of the teacher, or see `resized`.
        """
        others = {"model_type", *(teacher.flags.keys() - teacher.sizes.keys())}
        return teacher.resized(**{name: size for name, size in values.items() if name not in others})

    @property
    def family(self) -> Family:
        """The table of its family."""
        return family_of(self.model_type)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The rows of the family's table that this model has."""
        return tuple(
            row
            for row in self.family.rows
            if row.present(self.flags) and (row.kind is None or _kind_size(row.kind) in self.sizes)
        )

    @cached_property
    def taps(self) -> tuple[Tap, ...]:
        """The family's taps that this model has."""
        return tuple(tap for tap in self.family.taps if holds(tap.condition, self.flags))

    @cached_property
    def axes(self) -> tuple[str, ...]:
        """The axes of its tensors, the axes that these are grouped by or bounded by, and depth."""
        used = {axis for row in self.rows for axis in row.axes} | {"layer"}
        bound = {
            other
            for relation in (self.family.grouped, self.family.floors)
            for axis, other in relation.items()
            if axis in used
        }
        return tuple(axis for axis in AXES if axis in used | bound)

    @cached_property
    def prunable_axes(self) -> tuple[str, ...]:
        """The axes that taps score, and depth."""
        tapped = {axis for tap in self.taps for axis in tap.axes}
        return tuple(axis for axis in self.axes if axis in tapped | {"layer"})

    @cached_property
    def grouped(self) -> Mapping[str, str]:
        """The family's grouped axes that this model has, each with the axis that groups it."""
        return {axis: group for axis, group in self.family.grouped.items() if axis in self.axes}

    def axis_size(self, axis: str) -> int:
        """Return the number of entries of an axis."""
        return self.sizes[AXES[axis]]

    def entries(self, axis: str) -> int:
        """Return the number of entries of an axis; of a grouped axis, the number within each group."""
        group = self.grouped.get(axis)
        return self.axis_size(axis) // (self.axis_size(group) if group else 1)

    @property
    def layer_counts(self) -> dict[str, int]:
        """The number of layers of each kind; empty where all layers are alike."""
        used = sorted({kind for row in self.rows if (kind := row.kind)} | set(self.layers))
        return {kind: self.sizes[_kind_size(kind)] for kind in used}

    def layer_numbers(self, kind: str | None = None) -> list[int]:
        """Return the numbers of all layers, or of the layers of a kind.

        Raises:
            ValueError: a kind is given, and the order of the layers is not known.
        """
        if kind is None:
            return list(range(self.axis_size("layer")))
        return [i for i, other in enumerate(self._ordered_layers) if other == kind]

    def layer_kind(self, number: int) -> str | None:
        """Return the kind of a layer; None where all layers are alike."""
        return self._ordered_layers[number] if self.layer_counts else None

    def layer_rows(self, number: int) -> Iterator[Row]:
        """Yield the rows of the tensors that a layer has."""
        kind = self.layer_kind(number)
        return (row for row in self.rows if row.is_per_layer and row.kind in {None, kind})

    def layer_taps(self, number: int) -> Iterator[Tap]:
        """Yield the taps that a layer has."""
        kind = self.layer_kind(number)
        return (tap for tap in self.taps if tap.kind in {None, kind})

    @property
    def norms_before_blocks(self) -> list[Norm]:
        """The norms of a layer whose output a block reads, in the order in which the layer passes them."""
        return [norm for norm in self.family.layer_norms if norm.is_before_block(self.flags)]

    @property
    def norms_after_blocks(self) -> list[Norm]:
        """The norms whose output is added to the residual stream."""
        return [norm for norm in self.family.norms if not norm.is_before_block(self.flags)]

    @property
    def _ordered_layers(self) -> tuple[str, ...]:
        if self.layer_counts and not self.layers:
            raise ValueError("the order of the layers is not known: give them by `with_layers`")
        return self.layers

    def places(self) -> Iterator[Place]:
        """Yield the place of every tensor that a model of this shape stores, in the order of the table."""
        for row in self.rows:
            for layer in self.layer_numbers(row.kind) if row.is_per_layer else [None]:
                for expert in range(self.axis_size("expert")) if row.is_per_expert else [None]:
                    yield Place(row, layer, expert)

    def match(self, tensor_name: str) -> Place | None:
        """Return the place of a tensor in this model, or None when the model has no such tensor."""
        place = self.family.match(tensor_name, self.rows)
        if place is None or place.layer is None:
            return place
        return place if place.layer in self.layer_numbers(place.row.kind) else None

    @property
    def embedding(self) -> Row:
        """The row of the input embeddings."""
        return next(row for row in self.rows if row.axes == {"vocab", "hidden"})

    @property
    def output(self) -> Row:
        """The row of the output matrix: the row of the embeddings where they are tied."""
        return [row for row in self.rows if row.axes == {"vocab", "hidden"}][-1]

    @property
    def expert_writer(self) -> Row | None:
        """The row of the matrices with which experts write; in every table it is the last of the experts' matrices."""
        inner = self.family.per_expert_axes
        rows = [row for row in self.rows if row.axes & inner and len(row.dimensions) > 1 + row.is_stacked]
        return rows[-1] if rows else None

    @property
    def num_parameters(self) -> int:
        """The exact number of parameters; tied ones count once."""
        return int(self._count(self.sizes))

    @property
    def num_non_embedding_parameters(self) -> int:
        """The number of parameters outside the tensors that run along the vocabulary."""
        return int(self._count(self.sizes, without="vocab"))

    @property
    def num_active_parameters(self) -> int:
        """The number of parameters that one token uses: all but those of the experts that it is not routed to."""
        return int(self._count(self.sizes, active=True))

    def count_grid(self, sizes: Mapping[str, Any], without: str | None = None, active: bool = False) -> Any:
        """Return the parameter counts of many shapes at once; sizes may be integer arrays that broadcast.

        With `without`, tensors along that axis are left out; with `active`, experts that a token is not routed to.
        """
        return self._count({**self.sizes, **sizes}, without, active)

    def resized(self, **sizes: int) -> "Arch":
        """Return a shape of this family with some sizes changed.

        Where layers are of several kinds, `num_hidden_layers` is split by `split_depth` among those without a number of
        their own.

        Raises:
            UserError: a name is unknown, a size is below 1, the entries of an axis cannot be split equally among its
                groups, or no `model_type` can express the shape.
        """
        for name, size in sizes.items():
            if name not in self.sizes:
                raise UserError(f"unknown size '{name}': {nearest(name, list(self.sizes))}")
            if size < 1:
                raise UserError(f"{name} must be at least 1, not {size}")
        changed = {**self.sizes, **sizes, **self._depth(sizes)}
        arch = replace(self, sizes=changed, layers=self.layers if self._is_as_deep(changed) else ())
        for axis, group in arch.grouped.items():
            if arch.axis_size(axis) % arch.axis_size(group):
                raise UserError(
                    f"{AXES[axis]} {arch.axis_size(axis)} is not a multiple of {AXES[group]} {arch.axis_size(group)}"
                )
        for axis, floor in arch.family.floors.items():
            if axis in arch.axes and arch.axis_size(axis) < arch.axis_size(floor):
                raise UserError(f"{AXES[axis]} {arch.axis_size(axis)} is below {AXES[floor]} {arch.axis_size(floor)}")
        for axis in self._experts_axes:
            if not self._suits_experts(arch.axis_size(axis), axis):
                raise UserError(
                    f"{AXES[axis]} {arch.axis_size(axis)} must be a multiple of {EXPERT_MULTIPLE}, which experts need"
                )
        arch.require_expressible()
        return arch

    def _suits_experts(self, size: Any, axis: str) -> Any:
        return (size == self.axis_size(axis)) | (size % EXPERT_MULTIPLE == 0)

    @cached_property
    def _experts_axes(self) -> frozenset[str]:
        """The axes along which the experts' matrices run."""
        own = [row for row in self.rows if row.axes & self.family.per_expert_axes]
        return frozenset(axis for row in own for axis in row.axes) - {"expert"}

    def _depth(self, sizes: Mapping[str, int]) -> dict[str, int]:
        kinds = self.layer_counts
        if not kinds:
            return {}
        names = {_kind_size(kind): count for kind, count in kinds.items()}
        given = {name: sizes[name] for name in names if name in sizes}
        total = sizes.get(AXES["layer"])
        counts = names | given if total is None else self.split_depth(total, given)
        return {**counts, AXES["layer"]: sum(counts.values())}

    def _is_as_deep(self, sizes: Mapping[str, int]) -> bool:
        return all(sizes[name] == self.sizes[name] for name in self.depth_names)

    @property
    def depth_names(self) -> tuple[str, ...]:
        """The config names of the sizes that state the depth: of all layers, and of the layers of each kind."""
        return AXES["layer"], *map(_kind_size, self.layer_counts)

    def split_depth(self, depth: int, given: Mapping[str, int] | None = None) -> dict[str, int]:
        """Split `depth` layers among the kinds in the present ratio, at least one of each; return them by size name.

        Numbers of layers that are `given`, by size name, are taken as they are.

        Raises:
            UserError: there are fewer layers than kinds, or more than this shape has, or all numbers are given and
                their sum is another one.
        """
        given = given or {}
        kinds = {kind: count for kind, count in self.layer_counts.items() if _kind_size(kind) not in given}
        in_words = ", ".join(f"{name} {count}" for name, count in given.items())
        taken, total = sum(given.values()), sum(kinds.values())
        if not kinds and taken != depth:
            raise UserError(f"{AXES['layer']} {depth} is not the sum of {in_words}")
        if not len(kinds) <= depth - taken <= total:
            beside = f" beside {in_words}" if given else ""
            raise UserError(
                f"{AXES['layer']} {depth} must be from {taken + len(kinds)}, one layer of each kind{beside}, to "
                f"{taken + total}"
            )
        quota = {kind: (depth - taken) * count / total for kind, count in kinds.items()}
        counts = {kind: max(1, int(share)) for kind, share in quota.items()}
        while (short := depth - taken - sum(counts.values())) != 0:
            step = 1 if short > 0 else -1
            open_kinds = [kind for kind, count in counts.items() if 1 <= count + step <= kinds[kind]]
            counts[max(open_kinds, key=lambda kind: step * (quota[kind] - counts[kind]))] += step
        return {**given, **{_kind_size(kind): count for kind, count in counts.items()}}

    def with_layers(self, teacher: "Arch", kept: list[int]) -> "Arch":
        """Return this shape with the order of its layers, which are the kept layers of the teacher."""
        return replace(self, layers=tuple(teacher.layers[i] for i in kept) if teacher.layers else ())

    def first_layers(self, smaller: "Arch") -> list[int]:
        """Return the layers that stand for those that a cut to `smaller` keeps: the first ones, of each kind."""
        if not self.layer_counts:
            return list(range(smaller.axis_size("layer")))
        return sorted(i for kind, count in smaller.layer_counts.items() for i in self.layer_numbers(kind)[:count])

    def depth_of(self, layers: tuple[str, ...]) -> dict[str, int]:
        """Return the sizes that state the depth of a model of these layers; of one layer where all are alike."""
        return {_kind_size(kind): layers.count(kind) for kind in self.layer_counts} | {AXES["layer"]: len(layers) or 1}

    def require_prunable_to(self, smaller: "Arch") -> None:
        """Raise `UserError` unless `smaller` can be cut out of this shape."""
        axes = {"vocab", *self.prunable_axes}
        prunable = {AXES[axis] for axis in axes} | {_kind_size(kind) for kind in self.layer_counts}
        for name, size in smaller.sizes.items():
            if size > self.sizes[name]:
                raise UserError(f"{name} {size} is above the teacher's {self.sizes[name]}")
            if size != self.sizes[name] and name not in prunable:
                raise UserError(f"{name} cannot be pruned; prunable: {', '.join(sorted(prunable))}")
        for axis, group in self.grouped.items():
            if smaller.entries(axis) > self.entries(axis):
                raise UserError(
                    f"{AXES[axis]} {smaller.axis_size(axis)} over {AXES[group]} {smaller.axis_size(group)} is "
                    f"{smaller.entries(axis)} a group, above the teacher's {self.entries(axis)}"
                )

    def require_expressible(self) -> None:
        """Raise `UserError` unless some `model_type` can express this shape."""
        if (product := self.family.product) and not self._has_its_product(self.sizes):
            one, other = product.axes
            times = "a multiple of " if product.ratio else ""
            raise UserError(
                f"in a {self.model_type} model {AXES[one]} × {AXES[other]} is {times}{AXES[product.of]}: "
                f"{self.axis_size(one)} × {self.axis_size(other)} is not {times}{self.axis_size(product.of)}"
            )
        if (demand := self._unmet_demand) and not self._can_be_restated:
            raise UserError(
                f"{AXES[demand.multiple]} {self.axis_size(demand.multiple)} must be a multiple of "
                f"{AXES[demand.of]} {self.axis_size(demand.of)} in such a {self.model_type} model"
            )

    @property
    def restatement(self) -> Demand | None:
        """The demand of its config class for which this shape must be written under another `model_type`, or None."""
        return self._unmet_demand if self._can_be_restated else None

    @property
    def _unmet_demand(self) -> Demand | None:
        demand = self.family.demand
        is_met = demand is None or self.axis_size(demand.multiple) % self.axis_size(demand.of) == 0
        return None if is_met else demand

    def expressible(self, sizes: Mapping[str, Any]) -> Any:
        """Return which of many shapes can be made of this one; sizes are integer arrays that broadcast."""
        every, demand = {**self.sizes, **sizes}, self.family.demand
        fits = self._has_its_product(every)
        for axis in self._experts_axes:
            fits = fits & self._suits_experts(every[AXES[axis]], axis)
        if demand is not None and not self._can_be_restated:
            fits = fits & (every[AXES[demand.multiple]] % every[AXES[demand.of]] == 0)
        return fits

    def _has_its_product(self, sizes: Mapping[str, Any]) -> Any:
        product = self.family.product
        if product is None:
            return True
        both, of = prod(sizes[AXES[axis]] for axis in product.axes), sizes[AXES[product.of]]
        return both % of == 0 if product.ratio else both == of

    @property
    def _can_be_restated(self) -> bool:
        demand = self.family.demand
        return bool(demand and demand.restated_as and not any(self.flags[flag] for flag in demand.without))

    def config_values(self) -> dict[str, Any]:
        """Return its sizes as entries of its family's config."""
        family = self.family
        values: dict[str, Any] = {family.config_name(axis): self.axis_size(axis) for axis in self.axes}
        if family.product and "head_dim" in family.product.axes:  # the quotient, which some classes compute themselves
            values.pop(family.config_name("head_dim"), None)
        for name, axes in family.config_products.items():
            values[name] = prod(map(self.axis_size, axes))
        if family.product and family.product.ratio:
            values[family.product.ratio] = prod(map(self.axis_size, family.product.axes)) // self.axis_size(
                family.product.of
            )
        values |= {TIED: self.flags[TIED]} if TIED in self.flags else {}
        return values | (family.kinds.write(self._ordered_layers) if family.kinds else {})

    def to_dict(self) -> dict[str, Any]:
        """Return the model type, the booleans and the sizes, for JSON; `from_dict` reads them."""
        flags = {name: flag for name, flag in self.flags.items() if name not in AXES.values()}
        return {"model_type": self.model_type, **flags, **self.sizes}

    def _count(self, sizes: Mapping[str, Any], without: str | None = None, active: bool = False) -> Any:
        total: Any = 0
        experts = "chosen" if active else "expert"
        for row in self.rows:
            if row.is_buffer or without in row.axes:
                continue
            of_experts = sizes[AXES[experts]] if self._holds_experts(row) else sizes.get(AXES["expert"])
            size = {**sizes, AXES["expert"]: of_experts}
            count: Any = prod(row.shape(lambda axis, size=size: size[AXES[axis]]))  # type: ignore[misc]
            if row.is_per_layer:
                count = count * sizes[_kind_size(row.kind) if row.kind else AXES["layer"]]
            total = total + (count * sizes[AXES[experts]] if row.is_per_expert else count)
        return total

    def _holds_experts(self, row: Row) -> bool:
        """Whether a tensor is in a module that holds experts; the router, with an output for each expert, is not."""
        return row.owner in {other.owner for other in self.rows if other.axes & self.family.per_expert_axes}


def _kind_size(kind: str) -> str:
    return f"num_{kind}_layers"
