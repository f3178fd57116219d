"""The kinds of a model's layers, and the config entry that states them."""

import re
from collections.abc import Sequence
from typing import Any

from minitron.derivation.specimens import Design, Specimen, UnderivableError, in_general, specimen
from minitron.model.anatomy import KINDS


def layer_kinds(model_type: str, design: Design, one: Specimen) -> tuple[list[str], dict[str, Any]]:
    """Return the kind of every layer, and the entries of `LayerKinds`; none where all layers have equal tensors.

    Raises:
        UnderivableError: no entry of the config explains which layer has which tensors.
    """
    groups = _groups(one)
    if len(set(groups)) == 1:
        return ["" for _ in groups], {}
    if len(set(groups)) == 2:
        found = _stated_by_a_number(model_type, design, one, groups)
        if found:
            return found
    values = one.config.to_dict()
    for name, entry in values.items():
        if isinstance(entry, list) and len(entry) == len(groups) and all(isinstance(each, str) for each in entry):
            pairs = set(zip(entry, groups, strict=True))
            kinds = {group: {KINDS.get(value, "") for value, other in pairs if other == group} for group in set(groups)}
            names = [next(iter(each)) for each in kinds.values() if len(each) == 1]
            if len(pairs) == len({value for value, _ in pairs}) and all(names) and len(set(names)) == len(kinds):
                return [KINDS[value] for value in entry], {"entry": name}
    raise UnderivableError(
        "its layers are of several kinds, and no list or number in its config states which in a known way"
    )


def kinds_of_rows(one: Specimen, kinds: Sequence[str]) -> dict[str, str]:
    """Return the kind of layer that has each row's tensor, for the rows that not every kind has.

    Raises:
        UnderivableError: some kinds have a tensor, but neither one nor all.
    """
    having: dict[str, set[str]] = {}
    for layer, rows in _rows_by_layer(one).items():
        for row in rows:
            having.setdefault(row.partition(" ")[0], set()).add(kinds[layer])
    own = {row: next(iter(found)) for row, found in having.items() if len(found) == 1 < len(set(kinds))}
    if between := [row for row, found in having.items() if 1 < len(found) < len(set(kinds))]:
        raise UnderivableError(f"some kinds of its layers have {between[0]}, but neither one kind nor all")
    return own


def _rows_by_layer(one: Specimen) -> dict[int, set[str]]:
    rows: dict[int, set[str]] = {}
    for name, value in one.stored.items():
        if number := re.search(r"\.(\d+)\.", name):
            rows.setdefault(int(number[1]), set()).add(f"{in_general(name)} {tuple(value.shape)}")
    return rows


def _groups(one: Specimen) -> list[frozenset[str]]:
    rows = _rows_by_layer(one)
    if sorted(rows) != list(range(one.sizes["layer"])):
        raise UnderivableError("some of its layers have no tensors of their own")
    return [frozenset(rows[layer]) for layer in sorted(rows)]


def _stated_by_a_number(
    model_type: str, design: Design, one: Specimen, groups: list[frozenset[str]]
) -> tuple[list[str], dict[str, Any]] | None:
    """Return kinds that a number n states: the first n layers are of one kind, all others of another."""
    first = groups[0]
    count = next(place for place, group in enumerate(groups) if group != first)
    if any(group == first for group in groups[count:]):
        return None
    for name, value in one.config.to_dict().items():
        if type(value) is int and value == count and name not in one.entries.values():
            try:
                other = _groups(specimen(model_type, design, 0, **{name: count + 1}))
            except Exception:  # a value that the class refuses states nothing
                continue
            if other == [first] * (count + 1) + [groups[-1]] * (len(groups) - count - 1):
                names = [_name(group, groups) for group in (groups[0], groups[-1])]
                kinds = [names[0]] * count + [names[1]] * (len(groups) - count)
                return kinds, {"entry": name, "listed": names[0], "otherwise": names[1], "comes_first": True}
    return None


def _name(group: frozenset[str], groups: list[frozenset[str]]) -> str:
    own = group - frozenset.intersection(*groups)
    if any("expert" in row for row in own):
        return "moe"
    if any("mlp" in row or "feed_forward" in row for row in own):
        return "mlp"
    raise UnderivableError("its layers are of several kinds that have no name here")
