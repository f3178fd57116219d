"""Conditions that several engines set, in the form in which the tables of engines name them."""

from collections.abc import Callable
from typing import Any

from minitron.model.anatomy import AXES
from minitron.model.engines.engine import Config, Sizes


def heads_unlike_hidden(config: Config) -> str | None:
    """Return what is wrong where an engine takes the hidden size for that of all heads together."""
    heads, width, hidden = (config.get(AXES[axis]) for axis in ("query", "head_dim", "hidden"))
    if not heads or not width or heads * width == hidden:
        return None
    return f"it takes {AXES['hidden']} for {AXES['query']} × {AXES['head_dim']}, and {hidden} is not {heads} × {width}"


def kinds_out_of_step(config: Config, period: int, entry: str, every: Any, what: str) -> str | None:
    """Return what is wrong where an engine expects a kind of layer in every `period`th one."""
    kinds = config.get(entry)
    if not kinds or [kind == every for kind in kinds] == [(i + 1) % period == 0 for i in range(len(kinds))]:
        return None
    places = ", ".join(str(i + 1) for i, kind in enumerate(kinds) if kind == every)
    return f"it has {what} in every {period}th layer, the model in layers {places or 'none'} of {len(kinds)}"


def full_attention_out_of_step(period: int) -> Callable[[Config], str | None]:
    """Return the condition that every `period`th layer and no other has full attention."""
    return lambda config: kinds_out_of_step(config, period, "layer_types", "full_attention", "full attention")


def window_ignored(config: Config) -> str | None:
    """Return what is wrong where an engine has no sliding window for a family."""
    window, longest = config.get("sliding_window"), config.get(AXES["position"], 0)
    kinds = config.get("layer_types") or ["sliding_attention"]
    if not window or window >= longest or "sliding_attention" not in kinds:
        return None
    return f"it has no sliding window for this family, the model one of {window} tokens"


def mixed_windows(config: Config) -> str | None:
    """Return what is wrong where an engine gives all layers a window, or none."""
    is_mixed = len(set(config.get("layer_types") or [])) > 1
    return "it refuses models in which some layers have a sliding window and others have none" if is_mixed else None


def entry_unlike(config: Config, entry: str, value: Any, what: str) -> str | None:
    """Return what is wrong where an engine expects a value of an entry."""
    return None if config.get(entry, value) == value else f"{what}, and {entry} is {config[entry]}"


def mlp_in_place_of_experts(config: Config) -> str | None:
    """Return what is wrong where an engine expects experts in every layer."""
    has_mlp = config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1
    return "it expects experts in every layer, and the model has layers with an MLP" if has_mlp else None


def is_divisible(size: int, gpus: int) -> bool:
    """Return whether every GPU gets an equal share of a size."""
    return size % gpus == 0


def is_divisible_or_copied(heads: int, gpus: int) -> bool:
    """Return whether every GPU gets an equal number of KV heads, or one head that several GPUs hold."""
    return heads % gpus == 0 or gpus % heads == 0


def is_divisible_or_one(groups: int, gpus: int) -> bool:
    """Return whether every GPU gets an equal number of groups, or the only one."""
    return groups % gpus == 0 or groups == 1


def copied_heads(sizes: Sizes, gpus: int) -> str | None:
    """Return by how many GPUs every KV head is held, where there are fewer KV heads than GPUs."""
    heads = sizes.get(AXES["kv"], gpus)
    is_copied = heads < gpus and gpus % heads == 0
    return f"each of the {heads} KV heads is held by {gpus // heads} GPUs" if is_copied else None


MULTIPLE = "a multiple of the GPUs"
MULTIPLE_OR_DIVISOR = "a multiple or a divisor of the GPUs"
MULTIPLE_OR_ONE = "a multiple of the GPUs, or 1"
