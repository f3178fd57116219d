"""What the numbers of a family are: how its norms, embeddings and logits are scaled, found by trying them."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from minitron.derivation.drafts import Draft
from minitron.derivation.flow import TOKENS
from minitron.derivation.specimens import EQUAL, Specimen, UnderivableError, specimen
from minitron.model.anatomy import AXES

PROBE = 0.3
"""The value that entries of a config get to see what they do."""


def find_properties(made: Draft) -> None:
    """Find the numbers of the family: offsets and centring of norms, scales of embeddings and logits, names, lists."""
    first, entries = made.specimens[0], made.entries
    used = made.used() | {"layer"}
    names = {axis: entry for axis, entry in first.entries.items() if axis in used | {"chosen"} and entry != AXES[axis]}
    if "chosen" in names and "expert" not in used:
        del names["chosen"]
    if names:
        entries["config_names"] = names
    if "kv" not in used:
        entries["grouped"] = {}
    equal = {name: [axis] for axis, names in EQUAL.items() for name in names if name in first.config.to_dict()}
    if "kv" in first.entries and "kv" not in used and first.sizes["kv"] == first.sizes["query"]:
        equal[first.entries["kv"]] = ["query"]
    if equal:
        entries["config_products"] = equal
    norm = made.module(made.flow.norms[-1])
    entries |= _norm_numbers(norm, first.sizes["hidden"])
    if any(made.is_transposed(row) for row in made.rows):
        entries["is_transposed"] = True
    entries["per_layer_lists"] = _per_layer_lists(made)
    if made.design.is_free and not _accepts_any_hidden(made):
        entries["demand"] = {"multiple": "hidden", "of": "query"}
    if _scales_embedding(made):
        entries["scales_embedding"] = True
    entries |= _logit_numbers(made)
    if not getattr(first.model, "_supports_sdpa", True):
        entries["bytes_per_pair"] = 8
    if _joins_documents(first):
        entries["joins_documents"] = True
    if not _adds_what_writers_write(made):
        entries["scales_residual"] = True


@torch.no_grad()
def _norm_numbers(norm: nn.Module | None, hidden: int) -> dict[str, Any]:
    """Return whether a norm subtracts the mean, and what it adds to its weight."""
    assert norm is not None
    stream = torch.linspace(-1.0, 1.0, 3 * hidden).sin().reshape(1, 3, hidden) * 2.0
    found: dict[str, Any] = {}
    if torch.allclose(norm(stream + 2.0), norm(stream), atol=1e-4):
        found["is_centred"] = True
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    if weight is not None:
        kept = weight.clone()
        weight.zero_()
        without: Any = norm(stream) - (0.0 if bias is None else bias)
        weight.copy_(kept)
        if without.abs().max() > 1e-6:
            found["norm_offset"] = 1.0
    return found


def _scales_embedding(made: Draft) -> bool:
    """Whether what enters the first layer is the embeddings times the root of hidden."""
    first = made.specimens[0]
    entered = next(call.entered for call in made.flow.calls if call.name == f"{made.flow.layers}.0")
    assert entered is not None
    looked_up = first.model.get_input_embeddings().weight[TOKENS[0]]
    if entered.shape[-2:] != looked_up.shape:
        return False
    return torch.allclose(entered.reshape(looked_up.shape), looked_up * first.sizes["hidden"] ** 0.5, rtol=1e-3)


def _per_layer_lists(made: Draft) -> list[str]:
    first, entry = made.specimens[0], made.specimens[0].entries["layer"]
    other = specimen(made.model_type, made.design, 0, **{entry: 6}).config.to_dict()
    values = first.config.to_dict()
    return [
        name for name, value in values.items()
        if isinstance(value, list) and len(value) == 4 and isinstance(other.get(name), list) and len(other[name]) == 6
    ]  # fmt: skip


def _accepts_any_hidden(made: Draft) -> bool:
    """Whether hidden need not be a multiple of the number of heads."""
    try:
        one = specimen(made.model_type, replace(made.design, is_multiple=False))
        with torch.no_grad():
            one.model(input_ids=TOKENS, use_cache=False)
    except Exception:  # every class of transformers refuses sizes in its own way
        return False
    return True


def _logit_numbers(made: Draft) -> dict[str, str]:
    """Return the config entries that logits are multiplied by, divided by and capped by.

    Raises:
        UnderivableError: logits differ from the product of states and output matrix by something else.
    """
    values = made.specimens[0].config.to_dict()
    found: dict[str, str] = {}
    for name, value in values.items():
        if ("logit" in name or "lm_head" in name) and (value is None or type(value) in {int, float}):
            logits, product = _logits(specimen(made.model_type, made.design, 0, **{name: PROBE}))
            readings = {
                "logit_softcap": PROBE * torch.tanh(product / PROBE),
                "logit_multiplier": PROBE * product,
                "logit_divisor": product / PROBE,
            }
            found |= {entry: name for entry, read in readings.items() if torch.allclose(logits, read, atol=1e-4)}
    if not found and not torch.allclose(*_logits(made.specimens[0]), atol=1e-4):
        raise UnderivableError(
            "its logits are not its last states times its output matrix, and no entry of its config states the rest"
        )
    return found


@torch.no_grad()
def _logits(one: Specimen) -> tuple[Tensor, Tensor]:
    """Return the logits of a specimen, and the product of its last states and its output matrix."""
    states = one.model.base_model(input_ids=TOKENS, use_cache=False).last_hidden_state
    return one.model(input_ids=TOKENS, use_cache=False).logits, states @ one.model.get_output_embeddings().weight.T


def _joins_documents(one: Specimen) -> bool:
    """Whether a document that follows another in a block, with positions from 0 again, is read as if alone."""
    ids = torch.arange(12)[None] + 5
    positions = torch.cat([torch.arange(6), torch.arange(6)])[None]
    try:
        with torch.no_grad():
            both = one.model(input_ids=ids, position_ids=positions, use_cache=False).logits[:, 6:]
            alone = one.model(input_ids=ids[:, 6:], use_cache=False).logits
    except TypeError:  # it takes no positions
        return True
    return not torch.allclose(both, alone, atol=1e-4)


def _adds_what_writers_write(made: Draft) -> bool:
    """Whether a layer adds to the stream what its writers put out, unchanged; True where norms stand between."""
    order = {made.flow.general(call.name): call for call in reversed(made.flow.calls) if ".0." in f"{call.name}."}
    layer = next(call for call in made.flow.calls if call.name == f"{made.flow.layers}.0")
    rows = made.writers()
    if (
        made.kinds_of
        or any(owner.endswith("experts") for owner in made.owners.values())
        or any(not made.flow.readers[norm] for norm in made.flow.norms[:-1])
        or layer.left is None
    ):
        return True
    written: Any = 0.0
    for row in rows:
        left = order[made.owners[row]].left
        written = written + (left.reshape(layer.left.shape) if left is not None else 0.0)
    assert layer.entered is not None
    return torch.allclose(layer.left - layer.entered.reshape(layer.left.shape), written, atol=1e-4)
