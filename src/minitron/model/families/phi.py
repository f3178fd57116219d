"""Phi-3 and Phi-4: query, key and value in one tensor, gate and up in another."""

from minitron.model.families.llama import PLAIN, TAPS
from minitron.model.family import Family
from minitron.model.grammar import parse_norms, parse_rows

PHI3 = Family(
    "phi3",
    parse_rows("""
        model.embed_tokens.weight                           vocab hidden
        model.layers.{i}.input_layernorm.weight             hidden
        model.layers.{i}.self_attn.qkv_proj.weight          (query head_dim | kv head_dim | kv head_dim) hidden
        model.layers.{i}.self_attn.o_proj.weight            hidden (query head_dim)
        model.layers.{i}.post_attention_layernorm.weight    hidden
        model.layers.{i}.mlp.gate_up_proj.weight            (2 ffn) hidden
        model.layers.{i}.mlp.down_proj.weight               hidden ffn
        model.norm.weight                                   hidden
        lm_head.weight                                      vocab hidden    if not tie_word_embeddings
    """),
    TAPS,
    layer="model.layers.{i}",
    norms=parse_norms("""
        model.layers.{i}.input_layernorm             qkv_proj
        model.layers.{i}.post_attention_layernorm    gate_up_proj
        model.norm                                   lm_head
    """),
    config_defaults=PLAIN,
)
