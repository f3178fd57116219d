"""Llama, and the families that differ from Llama by a few biases, norms or multipliers."""

from dataclasses import replace
from typing import Any

from minitron.model.family import Demand, Family
from minitron.model.grammar import parse_norms, parse_rows, parse_taps

BACKBONE = """
    model.embed_tokens.weight                           vocab hidden
    model.layers.{i}.input_layernorm.weight             hidden
    model.layers.{i}.self_attn.q_proj.weight            (query head_dim) hidden
    model.layers.{i}.self_attn.k_proj.weight            (kv head_dim) hidden
    model.layers.{i}.self_attn.v_proj.weight            (kv head_dim) hidden
    model.layers.{i}.self_attn.o_proj.weight            hidden (query head_dim)
    model.layers.{i}.post_attention_layernorm.weight    hidden
    model.norm.weight                                   hidden
    lm_head.weight                                      vocab hidden    if not tie_word_embeddings
    model.layers.{i}.self_attn.rotary_emb.inv_freq      -
"""

MLP = """
    model.layers.{i}.mlp.gate_proj.weight               ffn hidden
    model.layers.{i}.mlp.up_proj.weight                 ffn hidden
    model.layers.{i}.mlp.down_proj.weight               hidden ffn
"""

ATTENTION_BIAS = """
    model.layers.{i}.self_attn.q_proj.bias              (query head_dim)    if attention_bias
    model.layers.{i}.self_attn.k_proj.bias              (kv head_dim)       if attention_bias
    model.layers.{i}.self_attn.v_proj.bias              (kv head_dim)       if attention_bias
    model.layers.{i}.self_attn.o_proj.bias              hidden              if attention_bias
"""

MLP_BIAS = """
    model.layers.{i}.mlp.gate_proj.bias                 ffn                 if mlp_bias
    model.layers.{i}.mlp.up_proj.bias                   ffn                 if mlp_bias
    model.layers.{i}.mlp.down_proj.bias                 hidden              if mlp_bias
"""

QKV_BIAS = """
    model.layers.{i}.self_attn.q_proj.bias              (query head_dim)
    model.layers.{i}.self_attn.k_proj.bias              (kv head_dim)
    model.layers.{i}.self_attn.v_proj.bias              (kv head_dim)
"""

QK_NORM = """
    model.layers.{i}.self_attn.q_norm.weight            head_dim
    model.layers.{i}.self_attn.k_norm.weight            head_dim
"""

ATTENTION_TAPS = """
    hidden    model.layers.{i}.input_layernorm             output
    hidden    model.layers.{i}.post_attention_layernorm    output
    query     model.layers.{i}.self_attn.o_proj            input
    kv        model.layers.{i}.self_attn.o_proj            input
"""

TAPS = parse_taps(ATTENTION_TAPS + "ffn    model.layers.{i}.mlp.down_proj    input")

NORMS = parse_norms("""
    model.layers.{i}.input_layernorm             q_proj k_proj v_proj
    model.layers.{i}.post_attention_layernorm    gate_proj up_proj
    model.norm                                   lm_head
""")


NO_WINDOW = {"sliding_window": None, "layer_types": None}
PLAIN = {"tie_word_embeddings": False, "num_key_value_heads": None, "head_dim": None, **NO_WINDOW}
UNBIASED = {"attention_bias": False, "mlp_bias": False}

# LlamaConfig refuses a hidden_size that is not a multiple of the number of heads, whatever head_dim is. Mistral without
# a sliding window is an identical network and has no such rule.
AS_MISTRAL = Demand("hidden", "query", "mistral", {"sliding_window": None}, ("attention_bias", "mlp_bias"))


def decoder(model_type: str, *additions: str, **differences: Any) -> Family:
    """Return a family with Llama's rows and `additions`, and with other entries where it differs."""
    rows = parse_rows("".join([BACKBONE, MLP, *additions]))
    return replace(Family(model_type, rows, TAPS, layer="model.layers.{i}", norms=NORMS), **differences)


LLAMA = decoder("llama", ATTENTION_BIAS, MLP_BIAS, demand=AS_MISTRAL, config_defaults={**PLAIN, **UNBIASED})
MISTRAL = decoder("mistral", config_defaults={**PLAIN, "num_key_value_heads": 8, "sliding_window": 4096})
MINISTRAL3 = decoder("ministral3", config_defaults={**PLAIN, "num_key_value_heads": 8, "head_dim": 128})
QWEN2 = decoder(
    "qwen2",
    QKV_BIAS,
    window_switch="use_sliding_window",
    config_defaults={
        "tie_word_embeddings": False,
        "num_key_value_heads": 32,
        "head_dim": None,
        "use_sliding_window": False,
        "sliding_window": 4096,
    },
)
QWEN3 = decoder(
    "qwen3",
    ATTENTION_BIAS,
    QK_NORM,
    window_switch="use_sliding_window",
    config_defaults={**QWEN2.config_defaults, "attention_bias": False, "head_dim": 128},
)
SMOLLM3 = decoder(
    "smollm3",
    ATTENTION_BIAS,
    MLP_BIAS,
    per_layer_lists=("layer_types", "no_rope_layers"),
    config_defaults={
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "head_dim": None,
        "sliding_window": None,
        **UNBIASED,
    },
)
GRANITE = decoder(
    "granite",
    ATTENTION_BIAS,
    MLP_BIAS,
    logit_divisor="logits_scaling",
    scales_residual=True,
    config_defaults={**PLAIN, **UNBIASED},
)
