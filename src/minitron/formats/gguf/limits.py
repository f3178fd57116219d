"""Why llama.cpp cannot run a model as transformers does, found before any work."""

import logging
from typing import Any

from minitron.errors import UserError
from minitron.formats.gguf.architectures import ARCHITECTURES, Architecture, architecture_of
from minitron.formats.gguf.rope import rope_type, trained_positions
from minitron.formats.gguf.source import Source
from minitron.model.engines import LLAMA_CPP


def require_architecture(source: Source) -> Architecture:
    """Return the architecture under which llama.cpp computes what transformers computes.

    Raises:
        UserError: there is none; the message is one line that names the reason.
    """
    family = source.arch.model_type
    architecture = architecture_of(source)
    if architecture is None:
        supported = ", ".join(sorted(ARCHITECTURES))
        why = LLAMA_CPP.unsupported.get(family, f"it has no {family}")
        raise UserError(f"llama.cpp does not run {family} models: {why}; families with GGUF: {supported}")
    obstacles = (limit for limit in LLAMA_CPP.limits if family in limit.families and not limit.is_overcome)
    reasons = [
        *_constants_unlike(source, architecture),
        *_rope_unlike(source, architecture),
        *filter(None, (limit.lacks(source.config) for limit in obstacles)),
        *_own_limits(source),
    ]
    if reasons:
        raise UserError(f"llama.cpp does not run this {family} model as transformers does: {'; '.join(reasons)}")
    if source.positions and source.context < source.positions:
        logging.warning(
            f"llama.cpp has no sliding window for {family} models: the file states a context of {source.context:,} "
            f"tokens, the model's window, in place of {source.positions:,}; up to there both compute the same function"
        )
    if architecture.rope_types and rope_type(source) == "longrope":
        logging.warning(
            "llama.cpp takes the long factors of longrope for every text where it is given a context above "
            f"{trained_positions(source):,.0f} tokens (-c), transformers for texts that are longer than that"
        )
    return architecture


def _constants_unlike(source: Source, architecture: Architecture) -> list[str]:
    reasons = []
    for entry, accepted in architecture.constants.items():
        value = _entry(source, entry)
        if value is not _ABSENT and value not in accepted:
            expected = " or ".join(map(str, accepted))
            reasons.append(f"it computes with {entry} {expected}, and this model has {value}")
    return reasons


_ABSENT = object()


def _entry(source: Source, entry: str) -> Any:
    value: Any = source.config
    for name in entry.split("."):
        value = value.get(name, _ABSENT) if isinstance(value, dict) or value is source.config else _ABSENT
    return value


def _rope_unlike(source: Source, architecture: Architecture) -> list[str]:
    kind, accepted = rope_type(source), architecture.rope_types
    if not accepted:
        return []
    reasons = []
    if kind not in accepted:
        reasons.append(
            f"of kinds of rotary embeddings it computes {', '.join(accepted)} here, and this model has {kind}"
        )
    if architecture.name == "llama" and source.rotated != source.arch.axis_size("head_dim"):
        reasons.append("it rotates all channels of a head, and this model a part of them")
    return reasons


def _own_limits(source: Source) -> list[str]:
    """Return reasons that concern how entries of a config go together."""
    config, family, reasons = source.config, source.arch.model_type, []
    if family == "gemma2" and not (config["attn_logit_softcapping"] and config["final_logit_softcapping"]):
        reasons.append("it caps logits and attention scores always, and this model does not")
    if family == "falcon_h1" and config["mamba_rms_norm"] and config["mamba_norm_before_gate"]:
        reasons.append("it has the norm of a mixer after the gate, and this model before it")
    if family == "nemotron_h" and "moe" in source.arch.layers:
        if "mlp" in source.arch.layers:
            reasons.append("it expects experts in every layer that has an MLP, and this model has both")
        if config["mlp_bias"]:
            reasons.append("its experts have no biases, and this model's have")
    return reasons
