"""The draft of a table: rows, conditions and owners, and the norms and taps that follow from them."""

import re
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from minitron.derivation.dimensions import in_words
from minitron.derivation.flow import Flow
from minitron.derivation.specimens import Design, Specimen
from minitron.model.anatomy import Dimension

HIDDEN: Dimension = (("hidden",),)
WRITTEN_FROM = ("query", "kv", "ffn", "shared_ffn")
"""The axes that are scored at the inputs of matrices that write the residual stream."""
OF_EXPERTS = ("expert", "expert_ffn", "ffn")
"""The axes that are scored within the module that holds a layer's experts."""


@dataclass
class Draft:
    """A family before its layouts are proven."""

    model_type: str
    design: Design
    specimens: list[Specimen]
    flow: Flow
    rows: dict[str, list[Dimension]] = field(default_factory=dict)
    conditions: dict[str, str] = field(default_factory=dict)
    """The condition of each row that not every config has."""
    owners: dict[str, str] = field(default_factory=dict)
    """The module in memory that holds each row's tensor, `{i}` for the layer."""
    entries: dict[str, Any] = field(default_factory=dict)
    """The entries of the family beside rows, taps and norms."""
    kinds_of: dict[str, str] = field(default_factory=dict)
    """The kind of layer that has each row's tensor, where not every kind has it."""
    buffers: set[str] = field(default_factory=set)
    """The rows of buffers, which are not counted as parameters."""
    unproven: set[str] = field(default_factory=set)
    """Axes that failed their proof, so that no tap is written for them."""

    @property
    def layer(self) -> str:
        """The name in memory of the module of a layer."""
        return f"{self.flow.layers}.{{i}}"

    def axes(self, row: str) -> set[str]:
        """Return the axes of a row."""
        factors = {factor for dimension in self.rows[row] for segment in dimension for factor in segment}
        return {axis for factor in factors if isinstance(factor, str) for axis in factor.split("+")}

    def text_entries(self) -> dict[str, Any]:
        """Return the entries of the table, rows, taps and norms in the words of the grammar."""
        rows = [(row, " ".join(map(in_words, dims)) or "()", self._remark(row)) for row, dims in self.rows.items()]
        return {
            "model_type": self.model_type,
            "layer": self.layer,
            "rows": rows,
            "taps": [tap for tap in self.taps() if tap[0] not in self.unproven],
            "norms": [(norm, " ".join(readers)) for norm, readers in self.norms().items()],
            **self.entries,
        }

    def _remark(self, row: str) -> str:
        kind = f"in {self.kinds_of[row]}" if row in self.kinds_of else ""
        condition = f"if {self.conditions[row]}" if row in self.conditions else ""
        return " ".join(filter(None, (kind, condition, "as buffer" if row in self.buffers else "")))

    def norms(self) -> dict[str, list[str]]:
        """Return the norms over hidden by their names in files, each with the parts of the names of its readers."""
        named = {}
        for norm in self.flow.norms:
            name = next((row.rpartition(".")[0] for row, owner in self.owners.items() if owner == norm), None)
            name = name or norm  # a norm without weights is in no file
            named[name] = [word for reader in self.flow.readers[norm] for word in self._words(reader)]
        named[list(named)[-1]] = [self._output_name()]
        return named

    def _output_name(self) -> str:
        """Return the name in files of the module of the output matrix."""
        model = self.specimens[0].model
        head = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
        return next((row.rpartition(".")[0] for row in self.rows if self.owners.get(row) == head), head)

    def _words(self, module: str) -> list[str]:
        """Return the parts of the names in files of the matrices of a module that read the stream."""
        found = []
        for row, owner in self.owners.items():
            if owner == module and self.reads(row):
                stem = row.removesuffix(".weight").removesuffix(".bias")
                found.append(re.sub(r"^.*?\{i\}\.", "", stem))
        return list(dict.fromkeys(found))

    def reads(self, row: str) -> bool:
        """Return whether a row's matrix multiplies the residual stream: hidden is where its inputs are.

        Stacked matrices of experts have their inputs first or last; transformers names the one that writes `down_proj`.
        """
        dims = self.rows[row]
        if len(dims) == 3:
            return dims[1:] != [HIDDEN, HIDDEN] and HIDDEN in dims[1:] and "down" not in row and "output" not in row
        return len(dims) == 2 and not row.endswith("bias") and dims[0 if self.is_transposed(row) else -1] == HIDDEN

    def is_transposed(self, row: str) -> bool:
        """Return whether a row's matrix is stored with its inputs first."""
        module = self.module(self.owners.get(row, ""))
        return type(module).__name__ == "Conv1D"

    def module(self, owner: str) -> nn.Module | None:
        """Return a module of the first specimen, of the first layer that has it; None if there is none."""
        modules = dict(self.specimens[0].model.named_modules())
        names = (owner.replace("{i}", str(layer)) for layer in range(self.specimens[0].sizes["layer"]))
        return next((modules[name] for name in names if name in modules), None)

    def writers(self) -> list[str]:
        """Return the rows whose matrices write the residual stream, in the order of their calls."""
        order = self.flow.order
        found = [
            row
            for row, dims in self.rows.items()
            if "{i}" in row and len(dims) == 2 and row in self.owners and not self.reads(row) and "{e}" not in row
            and dims[-1 if self.is_transposed(row) else 0] == HIDDEN and self.owners[row] in order
        ]  # fmt: skip
        return sorted(found, key=lambda row: order[self.owners[row]])

    def taps(self) -> list[tuple[str, ...]]:
        """Return the taps as the grammar writes them."""
        before = [norm for norm in self.flow.norms[:-1] if self.flow.readers[norm]]
        taps: list[tuple[str, ...]] = [("hidden", norm, "output", self._kind_of(norm)) for norm in before]
        if not before:
            taps = [("hidden", reader, "input", self._kind_of(reader)) for reader in self._first_readers()]
        for row in self.writers():
            inner, owner = self.axes(row), self.owners[row]
            if "query" in inner and "kv" in self.used():
                inner |= {"kv"}
            taps += [(axis, owner, "input", self._kind_of(owner)) for axis in WRITTEN_FROM if axis in inner]
        experts = [owner for owner in dict.fromkeys(self.owners.values()) if owner.endswith(".experts")]
        for owner in experts[:1]:
            inner = set().union(*(self.axes(row) for row in self.of(owner)))
            taps += [(axis, owner, "routed", self._kind_of(owner)) for axis in OF_EXPERTS if axis in inner | {"expert"}]
        return taps

    def _first_readers(self) -> list[str]:
        """Return the first module of each block of a layer that reads the stream."""
        order = self.flow.order
        readers = {owner for row, owner in self.owners.items() if "{i}" in row and self.reads(row) and owner in order}
        firsts: dict[str, str] = {}
        for owner in sorted(readers, key=order.__getitem__):
            firsts.setdefault(owner.rpartition(".")[0], owner)
        return list(firsts.values())

    def _kind_of(self, owner: str) -> str:
        kinds = {self.kinds_of.get(row) for row in self.of(owner)}
        return f"in {kinds.pop()}" if len(kinds) == 1 and None not in kinds else ""

    def of(self, owner: str) -> list[str]:
        """Return the rows of a module."""
        return [row for row, own in self.owners.items() if own == owner]

    def used(self) -> set[str]:
        """Return the axes of all rows."""
        return {axis for row in self.rows for axis in self.axes(row)}
