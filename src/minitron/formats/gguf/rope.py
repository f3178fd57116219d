"""Rotary embeddings as llama.cpp is configured for them: metadata, and the factors of frequencies."""

import math
from typing import Any

import torch
from gguf import RopeScalingType

from minitron.formats.gguf.source import Source

DEFAULT = "default"


def rope_type(source: Source) -> str:
    """Return the kind of a model's rotary embeddings, as transformers names it."""
    return str(source.rope.get("rope_type", DEFAULT))


def rope_metadata(source: Source) -> dict[str, Any]:
    """Return the entries about rotary embeddings, by the names of the `add_` methods of `gguf.GGUFWriter`."""
    rope, kind = source.rope, rope_type(source)
    entries: dict[str, Any] = {
        "rope_dimension_count": source.rotated,
        "rope_freq_base": float(rope["rope_theta"]),
    }
    if windowed := (source.config.get("rope_parameters") or {}).get("sliding_attention"):
        entries["rope_freq_base_swa"] = float(windowed["rope_theta"])
    if kind in {"linear", "yarn", "longrope"}:
        entries["rope_scaling_type"] = RopeScalingType(kind)
    if kind in {"linear", "yarn"}:
        entries["rope_scaling_factor"] = float(rope["factor"])
    if kind in {"yarn", "longrope"}:
        entries["rope_scaling_orig_ctx_len"] = int(trained_positions(source))
        entries["rope_scaling_attn_factors"] = _attention_factor(source)
    if kind == "yarn":
        entries["rope_scaling_yarn_beta_fast"] = float(rope.get("beta_fast") or 32)
        entries["rope_scaling_yarn_beta_slow"] = float(rope.get("beta_slow") or 1)
    return entries


def rope_factors(source: Source) -> dict[str, torch.Tensor]:
    """Return what frequencies are divided by, one number per rotated pair, by the name of the tensor in GGUF files."""
    rope, kind = source.rope, rope_type(source)
    if kind == "longrope":
        factors = {"rope_factors_long": rope["long_factor"], "rope_factors_short": rope["short_factor"]}
        return {f"{name}.weight": torch.tensor(values, dtype=torch.float32) for name, values in factors.items()}
    return {"rope_freqs.weight": _llama3_factors(source)} if kind == "llama3" else {}


def _llama3_factors(source: Source) -> torch.Tensor:
    """Return the factors of Llama 3.1's scaling (transformers, `_compute_llama3_parameters`).

    Waves shorter than the context of training, divided by `high_freq_factor`, stay; those longer than it, divided by
    `low_freq_factor`, are stretched by `factor`; between them the frequency is interpolated.
    """
    rope, rotated = source.rope, source.rotated
    base, factor, trained = float(rope["rope_theta"]), float(rope["factor"]), trained_positions(source)
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    waves = 2 * math.pi * base ** (torch.arange(0, rotated, 2, dtype=torch.float64) / rotated)
    smooth = ((trained / waves - low) / (high - low)).clamp(0, 1)
    return (1 / ((1 - smooth) / factor + smooth)).float()


def trained_positions(source: Source) -> float:
    """Return the longest sequence, in tokens, that the unscaled embeddings were trained on."""
    stated = source.rope.get("original_max_position_embeddings")
    return float(stated or source.config.get("original_max_position_embeddings") or source.positions or 0)


def _attention_factor(source: Source) -> float:
    """Return what llama.cpp multiplies rotated queries and keys by, beyond what it computes itself.

    transformers has the product in `_compute_yarn_parameters` and `_compute_longrope_parameters`; llama.cpp computes
    YaRN's part of it (`src/llama-context.cpp`, yarn_attn_factor), and nothing of LongRoPE's.
    """
    rope, stated = source.rope, source.rope.get("attention_factor")
    if rope_type(source) == "longrope":
        trained = trained_positions(source)
        factor = float(rope.get("factor") or (source.positions or trained) / trained)
        return float(stated or (math.sqrt(1 + math.log(factor) / math.log(trained)) if factor > 1 else 1.0))
    factor, mscale, all_dim = float(rope["factor"]), rope.get("mscale"), rope.get("mscale_all_dim")
    wanted = _mscale(factor, mscale) / _mscale(factor, all_dim) if mscale and all_dim else _mscale(factor, 1)
    computed = _mscale(factor, 1)
    if "llama_4_scaling_beta" in rope and all_dim:  # of Ministral 3, which states `rope_scaling_yarn_log_mul`
        computed /= _mscale(factor, all_dim)
    return float(stated or wanted) / computed


def _mscale(factor: float, scale: float) -> float:
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0
