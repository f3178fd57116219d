"""The sizes of a model under their config names, and exact counts derived from its family's table."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from minitron.errors import UserError, nearest
from minitron.model.anatomy import AXES, Demand, Family
from minitron.model.families import family_of


@dataclass(frozen=True)
class Arch:
    """The shape of a model: a family, its sizes by config name, and the booleans its table asks about."""

    model_type: str
    sizes: Mapping[str, int]
    flags: Mapping[str, bool] = field(default_factory=dict)

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> "Arch":
        """Read the sizes from a config with all its defaults filled in (`PretrainedConfig.to_dict()`).

        Raises:
            UserError: the `model_type` is unknown, or a size is missing.
        """
        family = family_of(str(config.get("model_type")))
        values = {axis: config.get(family.config_name(axis)) for axis in family.axes}
        if values.get("kv", 0) is None:
            values["kv"] = values["query"]
        if values.get("head_dim", 0) is None and values["query"] and values["hidden"]:
            values["head_dim"] = values["hidden"] // values["query"]
        if values["ffn"] is None and family.ffn_multiple and values["hidden"]:
            values["ffn"] = family.ffn_multiple * values["hidden"]
        if missing := [family.config_name(axis) for axis, size in values.items() if size is None]:
            raise UserError(f"the config does not say {', '.join(missing)}")
        sizes = {AXES[axis]: int(size) for axis, size in values.items() if size is not None}
        if wrong := [name for name, size in sizes.items() if size < 1]:
            raise UserError(f"the config says {wrong[0]} {sizes[wrong[0]]}")
        return cls(family.model_type, sizes, {flag: bool(config.get(flag)) for flag in sorted(family.flags)})

    @property
    def family(self) -> Family:
        """The table of its family."""
        return family_of(self.model_type)

    def axis_size(self, axis: str) -> int:
        """How many entries an axis of the grammar has."""
        return self.sizes[AXES[axis]]

    @property
    def num_parameters(self) -> int:
        """All parameters, tied ones once; exact."""
        return int(self._count(self.sizes))

    @property
    def num_non_embedding_parameters(self) -> int:
        """All parameters but those of the tensors that run along the vocabulary."""
        return int(self._count(self.sizes, without="vocab"))

    def count_grid(self, sizes: Mapping[str, Any]) -> Any:
        """Parameter counts of many shapes at once: sizes may be integer arrays that broadcast."""
        return self._count({**self.sizes, **sizes})

    def resized(self, **sizes: int) -> "Arch":
        """The same family with some sizes changed.

        Raises:
            UserError: a name is no size, a size is below 1, or the heads cannot be dealt out to the groups.
        """
        for name, size in sizes.items():
            if name not in self.sizes:
                raise UserError(f"unknown size '{name}': {nearest(name, list(self.sizes))}")
            if size < 1:
                raise UserError(f"{name} must be at least 1, not {size}")
        arch = replace(self, sizes={**self.sizes, **sizes})
        for axis, group in arch.family.grouped.items():
            if arch.axis_size(axis) % arch.axis_size(group):
                raise UserError(
                    f"{AXES[axis]} {arch.axis_size(axis)} is not a multiple of {AXES[group]} {arch.axis_size(group)}"
                )
        _ = arch.restatement
        return arch

    def require_prunable_to(self, smaller: "Arch") -> None:
        """Raise `UserError` unless `smaller` can be cut out of this shape."""
        prunable = {AXES[axis] for axis in self.family.prunable_axes}
        for name, size in smaller.sizes.items():
            if size > self.sizes[name]:
                raise UserError(f"{name} {size} is above the teacher's {self.sizes[name]}")
            if size != self.sizes[name] and name not in prunable:
                raise UserError(f"{name} cannot be pruned; prunable: {', '.join(sorted(prunable))}")
        for axis, group in self.family.grouped.items():
            per_group, limit = (a.axis_size(axis) // a.axis_size(group) for a in (smaller, self))
            if per_group > limit:
                raise UserError(
                    f"{AXES[axis]} {smaller.axis_size(axis)} over {AXES[group]} {smaller.axis_size(group)} is "
                    f"{per_group} a group, above the teacher's {limit}"
                )

    @property
    def restatement(self) -> Demand | None:
        """Its config class's demand, when this shape must be written under another `model_type` for it.

        Raises:
            UserError: the demand is not met and no other `model_type` can express the model, or the sizes
                contradict each other.
        """
        if self.family.is_square and self.axis_size("hidden") != self.axis_size("query") * self.axis_size("head_dim"):
            raise UserError(
                f"in a {self.model_type} model hidden_size is num_attention_heads × head_dim: "
                f"{self.axis_size('hidden')} is not {self.axis_size('query')} × {self.axis_size('head_dim')}"
            )
        demand = self.family.demand
        if demand is None or self.axis_size(demand.multiple) % self.axis_size(demand.of) == 0:
            return None
        if not self._can_be_restated:
            raise UserError(
                f"{AXES[demand.multiple]} {self.axis_size(demand.multiple)} must be a multiple of "
                f"{AXES[demand.of]} {self.axis_size(demand.of)} in such a {self.model_type} model"
            )
        return demand

    def expressible(self, sizes: Mapping[str, Any]) -> Any:
        """Of many shapes at once, which ones some `model_type` can express; sizes are integer arrays."""
        every, demand = {**self.sizes, **sizes}, self.family.demand
        if self.family.is_square:
            return every[AXES["hidden"]] == every[AXES["query"]] * every[AXES["head_dim"]]
        if demand is None or self._can_be_restated:
            return True
        return every[AXES[demand.multiple]] % every[AXES[demand.of]] == 0

    @property
    def _can_be_restated(self) -> bool:
        demand = self.family.demand
        return bool(demand and demand.restated_as and not any(self.flags[flag] for flag in demand.without))

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"model_type": self.model_type, **self.sizes, **self.flags}

    def _count(self, sizes: Mapping[str, Any], without: str | None = None) -> Any:
        total: Any = 0
        for row in self.family.rows:
            if not row.present(self.flags) or without in row.axes:
                continue
            count: Any = 1
            for dim in row.shape(lambda axis: sizes[AXES[axis]]):
                count = count * dim
            total = total + count * (sizes[AXES["layer"]] if row.is_per_layer else 1)
        return total
