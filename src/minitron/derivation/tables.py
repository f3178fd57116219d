"""A table from specimens: rows from shapes, norms and taps from the flow of the residual stream."""

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

import torch

from minitron.derivation.dimensions import dimension_of, orders
from minitron.derivation.drafts import Draft
from minitron.derivation.flow import TOKENS, flow_of
from minitron.derivation.kinds import kinds_of_rows, layer_kinds
from minitron.derivation.properties import find_properties
from minitron.derivation.specimens import DESIGNS, Design, Specimen, UnderivableError, in_general, specimen
from minitron.model.anatomy import Dimension

NUM_SPECIMENS = 5
MOST_FLAGS = 5
"""The most config booleans whose combinations are all built."""
NOT_STRUCTURE = frozenset(
    ("use_cache", "output_attentions", "output_hidden_states", "return_dict", "is_decoder", "torchscript",
     "add_cross_attention")
)  # fmt: skip
"""Booleans of configs that say nothing of the tensors of a decoder."""


def draft(model_type: str) -> Draft:
    """Return the draft of a family: rows, conditions, norms and numbers, of which layouts are not proven yet.

    Raises:
        UnderivableError: something about the model has no place in a table.
    """
    design = design_of(model_type)
    specimens = [specimen(model_type, design, seed) for seed in range(NUM_SPECIMENS)]
    first = specimens[0]
    kinds, stated = layer_kinds(model_type, design, first)
    made = Draft(model_type, design, specimens, flow_of(first, kinds))
    if stated:
        made.entries["kinds"] = stated
    variants, conditions = _variants(model_type, design, first)
    _find_rows(made, variants, kinds)
    # A checkpoint whose output matrix has a bias is refused, since it has a tensor without a row.
    made.rows = {row: dims for row, dims in made.rows.items() if dims != [(("vocab",),)]}
    made.conditions = {row: condition for row, condition in conditions.items() if condition}
    _order(made)
    if not design.is_free:
        _tell_heads_from_hidden(made)
    _require_plain_head(made)
    find_properties(made)
    return made


def layouts(made: Draft) -> Iterator[dict[str, list[Dimension]]]:
    """Yield every choice of orders in memory for the dimensions whose sizes leave several.

    Rows in which equal dimensions are left open, such as a matrix and its bias, share one choice.
    """
    open_in = {row: tuple(dim for dim in dims if len(list(orders(dim))) > 1) for row, dims in made.rows.items()}
    groups = list(dict.fromkeys(dims for dims in open_in.values() if dims))
    for chosen in product(*(list(product(*map(orders, dims))) for dims in groups)):
        picked = {dims: dict(zip(dims, each, strict=True)) for dims, each in zip(groups, chosen, strict=True)}
        yield {
            row: [picked[open_in[row]].get(dim, dim) if open_in[row] else dim for dim in dims]
            for row, dims in made.rows.items()
        }


def design_of(model_type: str) -> Design:
    """Return the first design that a model accepts and runs with.

    Raises:
        UnderivableError: there is none.
    """
    reason: Exception | None = None
    for design in DESIGNS:
        try:
            one = specimen(model_type, design)
            with torch.no_grad():
                one.model(input_ids=TOKENS, use_cache=False)
        except UnderivableError:
            raise
        except Exception as error:  # every class of transformers refuses sizes in its own way
            reason = reason or error
            continue
        if not design.is_free or _states_its_head_dim(model_type, design, one):
            return design
    if reason is None:
        raise UnderivableError("its heads have no size that follows from its config")
    raise UnderivableError(f"its config class or model refuses small sizes: {' '.join(str(reason).split())[:160]}")


def _states_its_head_dim(model_type: str, design: Design, one: Specimen) -> bool:
    """Whether some tensor runs along head_dim, or there are no heads."""
    if "query" not in one.entries:
        return True
    if "head_dim" not in one.entries:
        return False
    if "kv_rank" in one.entries:  # multi-head latent attention, which has other sizes of heads
        return True
    other = specimen(model_type, design, 0, **{one.entries["head_dim"]: one.sizes["head_dim"] + 4})
    return other.shapes != one.shapes


def _variants(model_type: str, design: Design, first: Specimen) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Return the changes of booleans that show every tensor, none at first, and the condition of each row."""
    base, flags = first.shapes.keys(), []
    values = first.config.to_dict()
    names = [name for name, value in values.items() if type(value) is bool and name not in NOT_STRUCTURE]
    for name in names:
        try:
            if specimen(model_type, design, 0, **{name: not values[name]}).shapes.keys() != base:
                flags.append(name)
        except Exception:  # a value that the class refuses shows no tensor
            continue
    if len(flags) > MOST_FLAGS:
        raise UnderivableError(f"too many booleans decide which tensors it has: {', '.join(flags)}")
    present: dict[str, list[tuple[bool, ...]]] = {}
    variants = []
    for settings in product(*([values[name], not values[name]] for name in flags)):
        changes = {name: value for name, value in zip(flags, settings, strict=True) if value != values[name]}
        try:
            rows = specimen(model_type, design, 0, **changes).shapes
        except Exception:
            continue
        if set(rows) - present.keys():
            variants.append(changes)
        for row in rows:
            present.setdefault(row, []).append(settings)
    conditions = {}
    for row, settings_of_row in present.items():
        parts = []
        for place, name in enumerate(flags):
            if len(seen := {settings[place] for settings in settings_of_row}) == 1:
                parts.append(name if seen == {True} else f"not {name}")
        conditions[row] = " and ".join(parts)
    return variants, conditions


def _find_rows(made: Draft, variants: list[dict[str, Any]], kinds: list[str]) -> None:
    """Find what the dimensions of every row are made of, and which module and which kind of layer has it."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    sizes: dict[str, list[Mapping[str, int]]] = {}
    for changes in variants:
        group = made.specimens
        if changes:
            group = [specimen(made.model_type, made.design, seed, **changes) for seed in range(NUM_SPECIMENS)]
        # A row that some sizes lack, such as a norm for each head, is left out: its checkpoints are then refused.
        for row in group[0].shapes:
            if row not in shapes and all(row in each.shapes for each in group):
                shapes[row], sizes[row] = [each.shapes[row] for each in group], [each.sizes for each in group]
        buffers = {name for name, _ in group[0].model.named_buffers()}
        for name, held in group[0].names_in_memory.items():
            made.owners.setdefault(in_general(name), made.flow.general(held.rpartition(".")[0]))
            if held in buffers:
                made.buffers.add(in_general(name))
        made.kinds_of |= kinds_of_rows(group[0], kinds)
    for row, found in shapes.items():
        dims = [dimension_of([shape[place] for shape in found], sizes[row]) for place in range(len(found[0]))]
        if None in dims:
            raise UnderivableError(f"the shape of {row} follows from no sizes of its config that have an axis")
        made.rows[row] = [dim for dim in dims if dim is not None]


def _place(made: Draft, places: Mapping[str, int], row: str) -> tuple[int, bool, bool, str]:
    """Return the place of a row in the table; of the experts' matrices, the one that writes is the last."""
    owner = made.owners.get(row, "")
    writes = "expert" in row and len(made.rows[row]) > 1 and not made.reads(row)
    return places.get(owner, len(places)), writes, row.endswith("bias"), row


def _order(made: Draft) -> None:
    """Put the rows in the order of the modules in memory: embeddings first, then what every layer has."""
    places = {made.flow.general(name): place for place, (name, _) in enumerate(made.specimens[0].model.named_modules())}
    made.rows = {row: made.rows[row] for row in sorted(made.rows, key=lambda row: _place(made, places, row))}


def _tell_heads_from_hidden(made: Draft) -> None:
    """Where hidden is query times head_dim, write (query head_dim) for what stands within attention."""
    first = made.specimens[0]
    if "query" not in first.entries:
        return
    read = {name for norm in made.flow.norms for name in made.flow.readers[norm]} | set(made.flow.plain_readers)
    stream_norms = set(made.flow.norms)
    for row, dims in made.rows.items():
        owner = made.owners.get(row, "")
        if "{i}" not in row or owner in stream_norms or "expert" in row:
            continue
        transposed = made.is_transposed(row)
        is_output_of_reader = owner in read
        if len(dims) == 2:
            place = (1 if transposed else 0) if is_output_of_reader else (0 if transposed else 1)
            dims[place] = _as_heads(dims[place])
        elif len(dims) == 1 and (is_output_of_reader or "norm" in type(made.module(owner)).__name__.lower()):
            dims[0] = _as_heads(dims[0])
    if "head_dim" in made.used():
        made.entries["product"] = {"axes": ["query", "head_dim"]}


def _as_heads(dim: Dimension) -> Dimension:
    """Return a dimension with (query head_dim) in place of hidden."""
    return tuple(
        (*segment[:-1], "query", "head_dim") if segment[-1] == "hidden" else segment for segment in dim if segment
    )


def _require_plain_head(made: Draft) -> None:
    first = made.specimens[0]
    head = first.model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        raise UnderivableError("its output matrix has a bias" if head is not None else "it has no output matrix")
