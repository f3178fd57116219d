"""Gemma 2 and the text part of Gemma 3: norms after attention and MLP as well as before them.

The config classes refuse a hidden_size that is not a multiple of the number of heads, and no other `model_type` means
an identical network.
"""

from minitron.model.families.llama import ATTENTION_BIAS, QK_NORM, decoder
from minitron.model.family import Demand
from minitron.model.grammar import parse_norms, parse_taps

MLP_NORMS = """
    model.layers.{i}.pre_feedforward_layernorm.weight     hidden
    model.layers.{i}.post_feedforward_layernorm.weight    hidden
"""

TAPS = parse_taps("""
    hidden    model.layers.{i}.input_layernorm              output
    hidden    model.layers.{i}.pre_feedforward_layernorm    output
    query     model.layers.{i}.self_attn.o_proj             input
    kv        model.layers.{i}.self_attn.o_proj             input
    ffn       model.layers.{i}.mlp.down_proj                input
""")

NORMS = parse_norms("""
    model.layers.{i}.input_layernorm               q_proj k_proj v_proj
    model.layers.{i}.post_attention_layernorm
    model.layers.{i}.pre_feedforward_layernorm     gate_proj up_proj
    model.layers.{i}.post_feedforward_layernorm
    model.norm                                     lm_head
""")

SHARED = {
    "taps": TAPS,
    "norms": NORMS,
    "norm_offset": 1.0,
    "scales_embedding": True,
    "demand": Demand("hidden", "query"),
    "logit_softcap": "final_logit_softcapping",
    "config_defaults": {
        "tie_word_embeddings": True,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "attention_bias": False,
        "sliding_window": 4096,
    },
}

GEMMA2 = decoder("gemma2", ATTENTION_BIAS, MLP_NORMS, window_period=2, bytes_per_pair=8, **SHARED)
GEMMA3 = decoder("gemma3_text", ATTENTION_BIAS, QK_NORM, MLP_NORMS, window_period=6, **SHARED)
