"""What llama.cpp expects of each family: its name there, metadata, and what its tensors go through.

Each fact was read in llama.cpp's sources at the commit that `engines.LLAMA_CPP` names: `src/models/NAME.cpp` for what a
loader reads and computes, `src/llama-model.cpp` for rotary embeddings (`llama_model_rope_type`) and common metadata.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from minitron.formats.gguf.pieces import (
    EXPERTS,
    MIXER,
    NORM_PLUS_ONE,
    PAIRS,
    SEPARATE,
    Piece,
    Pieces,
    ends,
    every_second,
    head_by_head,
    same,
    scaled_mixer_input,
    times,
    transposed,
)
from minitron.formats.gguf.rope import DEFAULT, rope_metadata
from minitron.formats.gguf.source import Source

Metadata = dict[str, Any]


@dataclass(frozen=True)
class Architecture:
    """A network that llama.cpp computes."""

    name: str
    """Its name in GGUF files."""
    metadata: Callable[[Source], Metadata] = lambda _: {}
    """Returns entries beyond the sizes, by the names of the `add_` methods of `gguf.GGUFWriter`."""
    pieces: Pieces = field(default_factory=dict)
    """What tensors become whose names have these ends; all others stay as they are."""
    constants: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    """Config entries that it takes for constants, each with the values that it is right for."""
    has_own_output: bool = False
    """Whether it reads an output matrix even of a model whose embeddings are tied."""
    rope_types: tuple[str, ...] = (DEFAULT, "linear", "yarn")
    """The kinds of rotary embeddings that it computes; none where it has no rotary embedding."""


def _windows(source: Source) -> Metadata:
    """Return the sliding window, and which layers have it."""
    kinds = source.config["layer_types"]
    return {
        "sliding_window": source.config["sliding_window"],
        "sliding_window_pattern": [kind == "sliding_attention" for kind in kinds],
    }


def _gemma2(source: Source) -> Metadata:
    caps = {name: source.config[name] for name in ("attn_logit_softcapping", "final_logit_softcapping")}
    return _windows(source) | caps


def _gemma3(source: Source) -> Metadata:
    cap = source.config.get("final_logit_softcapping")
    return _windows(source) | ({"final_logit_softcapping": cap} if cap else {})


def _granite(source: Source) -> Metadata:
    names = {"attention_scale": "attention_multiplier", "embedding_scale": "embedding_multiplier",
             "residual_scale": "residual_multiplier", "logit_scale": "logits_scaling"}  # fmt: skip
    return {name: float(source.config[entry]) for name, entry in names.items()}


def _mamba(source: Source) -> Metadata:
    size = source.arch.axis_size
    return {
        "ssm_conv_kernel": size("conv"),
        "ssm_inner_size": size("mhead") * size("mchan"),
        "ssm_state_size": size("state"),
        "ssm_time_step_rank": size("mhead"),
        "ssm_group_count": size("mgroup"),
    }


def _mamba2(source: Source) -> Metadata:
    # Nothing limits the context of a recurrent model; the converter of llama.cpp writes this number too.
    return _mamba(source) | {"context_length": 2**20, "head_count": 0, "feed_forward_length": 0}


def _in_layers(source: Source, **sizes: str) -> list[int]:
    """Return the size of an axis in the layers of a kind, 0 in others: one entry per layer."""
    return [source.arch.axis_size(sizes[kind]) if kind in sizes else 0 for kind in source.arch.layers]


def _bamba(source: Source) -> Metadata:
    # A layer is recurrent where it has no KV heads. The last entry switches rotary embeddings on.
    return _mamba(source) | {"head_count_kv": _in_layers(source, attention="kv"), "rope_scaling_finetuned": True}


def _nemotron_h(source: Source) -> Metadata:
    # A layer is recurrent where it has neither KV heads nor an MLP.
    metadata = _mamba(source) | {
        "head_count_kv": _in_layers(source, attention="kv"),
        "feed_forward_length": _in_layers(source, mlp="ffn", moe="expert_ffn"),
        "layer_norm_eps": source.norm_eps,
    }
    if "moe" in source.arch.layers:
        metadata |= {
            "expert_feed_forward_length": source.arch.axis_size("expert_ffn"),
            "expert_shared_feed_forward_length": source.arch.axis_size("shared_ffn"),
            "expert_shared_count": source.config["n_shared_experts"],
            "expert_weights_norm": source.config["norm_topk_prob"],
            "expert_weights_scale": float(source.config["routed_scaling_factor"]),
            "expert_group_count": source.config["n_group"],
            "expert_group_used_count": source.config["topk_group"],
        }
        if latent := source.config.get("moe_latent_size"):
            metadata["moe_latent_size"] = latent
    return metadata


def _gpt_oss(source: Source) -> Metadata:
    return _windows(source) | {"expert_feed_forward_length": source.arch.axis_size("ffn")}


def _ministral3(source: Source) -> Metadata:
    rope = source.rope
    return {
        "rope_scaling_yarn_log_mul": float(rope.get("mscale_all_dim", 0)),
        "attn_temperature_scale": float(rope["llama_4_scaling_beta"]),
    }


SILU = {"hidden_act": ("silu", "swish")}
UNBIASED = {"attention_bias": (False,)}
GELU_TANH = {"hidden_activation": ("gelu_pytorch_tanh",)}
NO_DT_LIMIT = {"time_step_limit": ((0.0, float("inf")), [0.0, float("inf")], None)}
MIXER_CONSTANTS = {**NO_DT_LIMIT, "use_bias": (False,), "mamba_proj_bias": (False,), "use_conv_bias": (True,),
                   "mamba_conv_bias": (True,)}  # fmt: skip

LLAMA = Architecture(
    "llama", pieces=PAIRS, constants=SILU, rope_types=(DEFAULT, "linear", "yarn", "llama3", "longrope")
)
JOINT_LLAMA = replace(LLAMA, pieces=SEPARATE)
"""Llama, for the tensors of Phi-3."""
MOE = "nemotron_h_moe"

ARCHITECTURES = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": LLAMA,
    "ministral3": Architecture(
        "mistral3", _ministral3, PAIRS, {**SILU, "rope_parameters.mscale": (1, None)}, rope_types=("yarn",)
    ),
    "nemotron": Architecture(
        "nemotron", pieces=NORM_PLUS_ONE, constants={"hidden_act": ("relu2",)}, has_own_output=True,
        rope_types=(DEFAULT, "linear"),
    ),
    "qwen2": Architecture("qwen2", constants=SILU),
    "qwen3": Architecture("qwen3", constants={**SILU, **UNBIASED}),
    "qwen3_moe": Architecture(
        "qwen3moe",
        lambda source: {"expert_feed_forward_length": source.arch.axis_size("expert_ffn")},
        constants={**SILU, **UNBIASED, "norm_topk_prob": (True,)},
    ),
    "gemma2": Architecture(
        "gemma2", _gemma2, NORM_PLUS_ONE, {**GELU_TANH, **UNBIASED, "tie_word_embeddings": (True,)},
    ),
    "gemma3_text": Architecture(
        "gemma3", _gemma3, NORM_PLUS_ONE,
        {**GELU_TANH, **UNBIASED, "attn_logit_softcapping": (None,), "use_bidirectional_attention": (False, None)},
    ),
    "phi3": Architecture(
        "phi3", lambda _: {"sliding_window": 0}, constants=SILU, rope_types=(DEFAULT, "longrope"),
    ),
    "olmo2": Architecture("olmo2", constants={**SILU, **UNBIASED}, has_own_output=True),
    "smollm3": Architecture("smollm3", pieces=PAIRS, constants={**SILU, **UNBIASED, "mlp_bias": (False,)}),
    "granite": Architecture(
        "granite", _granite, PAIRS, SILU, rope_types=(DEFAULT, "linear", "yarn", "llama3"),
    ),
    "gpt2": Architecture(
        "gpt2",
        pieces=ends(transposed, "c_attn.weight", "c_proj.weight", "c_fc.weight"),
        constants={
            "activation_function": ("gelu_new", "gelu_pytorch_tanh", "gelu"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
        },
        rope_types=(),
    ),
    "gpt_neox": Architecture(
        "gptneox",
        lambda source: {"parallel_residual": source.config["use_parallel_residual"]},
        ends(head_by_head, "query_key_value.weight", "query_key_value.bias"),
        {"hidden_act": ("gelu", "gelu_new", "gelu_pytorch_tanh"), "attention_bias": (True,)},
        has_own_output=True,
        rope_types=(DEFAULT, "linear"),
    ),
    "gpt_oss": Architecture(
        "gpt-oss",
        _gpt_oss,
        {
            ".sinks": (Piece(same, ".sinks.weight"),),
            "gate_up_proj": (
                Piece(lambda t, s: transposed(t[..., 0::2], s), "gate_proj.weight"),
                Piece(lambda t, s: transposed(t[..., 1::2], s), "up_proj.weight"),
            ),
            "gate_up_proj_bias": (
                Piece(every_second(0), "gate_proj.bias"),
                Piece(every_second(1), "up_proj.bias"),
            ),
            "down_proj": (Piece(transposed, "down_proj.weight"),),
            "down_proj_bias": (Piece(same, "down_proj.bias"),),
        },
        {"swiglu_limit": (7.0,), "swiglu_alpha": (1.702,), "attention_bias": (True,)},
        has_own_output=True,
    ),
    "mamba2": Architecture("mamba2", _mamba2, MIXER, {**MIXER_CONSTANTS, **SILU}, rope_types=()),
    "nemotron_h": Architecture(
        "nemotron_h",
        _nemotron_h,
        {
            **MIXER,
            **EXPERTS,
            "gate.e_score_correction_bias": (Piece(same, "gate.e_score_correction.bias"),),
        },
        {**MIXER_CONSTANTS, "mlp_hidden_act": ("relu2",), "mamba_hidden_act": ("silu",)},
        rope_types=(),
    ),
    "bamba": Architecture(
        "granitehybrid", _bamba, {**PAIRS, **MIXER}, {**MIXER_CONSTANTS, **SILU},
    ),
    "falcon_h1": Architecture(
        "falcon-h1",
        _mamba,
        {
            **MIXER,
            **ends(times("attention_in_multiplier"), "q_proj.weight", "v_proj.weight"),
            **ends(times("attention_in_multiplier", "key_multiplier"), "k_proj.weight"),
            **ends(times("attention_out_multiplier"), "o_proj.weight"),
            **ends(times("mlp_multipliers[0]"), "gate_proj.weight", "gate_proj.bias"),
            **ends(times("mlp_multipliers[1]"), "down_proj.weight", "down_proj.bias"),
            **ends(scaled_mixer_input, "in_proj.weight"),
            **ends(times("ssm_out_multiplier"), "out_proj.weight"),
            **ends(times("embedding_multiplier"), "embed_tokens.weight"),
            **ends(times("lm_head_multiplier"), "lm_head.weight"),
        },
        {**MIXER_CONSTANTS, **UNBIASED, **SILU, "projectors_bias": (False,)},
        has_own_output=True,
    ),
}  # fmt: skip
"""By the `model_type` of transformers."""

SIZES = {
    "embedding_length": "hidden",
    "feed_forward_length": "ffn",
    "head_count": "query",
    "head_count_kv": "kv",
    "key_length": "head_dim",
    "value_length": "head_dim",
    "vocab_size": "vocab",
    "block_count": "layer",
    "expert_count": "expert",
    "expert_used_count": "chosen",
}
"""The axes whose sizes are metadata of every architecture."""


def architecture_of(source: Source) -> Architecture | None:
    """Return the architecture under which llama.cpp computes a model, or None if it has none for its family.

    A Qwen2 or Phi-3 whose heads are not as wide together as the residual stream is a Llama to llama.cpp: its loaders
    for these families compute `head_dim` from `hidden_size`, and the networks are identical apart from that.
    """
    architecture = ARCHITECTURES.get(source.arch.model_type)
    if source.arch.model_type in {"qwen2", "phi3"} and source.has_heads_unlike_hidden:
        return JOINT_LLAMA if source.arch.model_type == "phi3" else LLAMA
    if architecture and source.arch.model_type == "nemotron_h" and "moe" in source.arch.layers:
        return replace(architecture, name=MOE)
    return architecture


def metadata_of(source: Source, architecture: Architecture) -> Metadata:
    """Return the metadata of a model, by the names of the `add_` methods of `gguf.GGUFWriter`."""
    sizes = {name: source.arch.axis_size(axis) for name, axis in SIZES.items() if axis in source.arch.axes}
    norm = "layer_norm_eps" if source.arch.family.is_centred else "layer_norm_rms_eps"
    common = {"context_length": source.context, norm: source.norm_eps}
    rope = rope_metadata(source) if architecture.rope_types else {}
    return sizes | common | rope | architecture.metadata(source)
