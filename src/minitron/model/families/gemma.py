"""Gemma 2 and the text part of Gemma 3: norms after attention and MLP as well as before them.

The config classes refuse a hidden_size that is no multiple of the heads, and no other type is the same network.
"""

from minitron.model.anatomy import Demand, parse_taps
from minitron.model.families.llama import ATTENTION_BIAS, QK_NORM, decoder

MLP_NORMS = """
    model.layers.{i}.pre_feedforward_layernorm.weight     hidden
    model.layers.{i}.post_feedforward_layernorm.weight    hidden
"""

TAPS = parse_taps("""
    hidden    model.layers.{i}.input_layernorm              output
    hidden    model.layers.{i}.pre_feedforward_layernorm    output
    query     model.layers.{i}.self_attn.o_proj             input
    ffn       model.layers.{i}.mlp.down_proj                input
""")

SHARED = {"taps": TAPS, "demand": Demand("hidden", "query"), "logit_softcap": "final_logit_softcapping"}

GEMMA2 = decoder("gemma2", ATTENTION_BIAS, MLP_NORMS, **SHARED)
GEMMA3 = decoder("gemma3_text", ATTENTION_BIAS, QK_NORM, MLP_NORMS, **SHARED)
