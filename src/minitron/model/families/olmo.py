"""OLMo 2: norms only after attention and MLP, one norm over all query heads and one over all KV heads.

A norm over all heads mixes them, so that a student with fewer heads would not equal a masked teacher: heads are not
pruned.
"""

from minitron.model.families.llama import ATTENTION_BIAS, PLAIN
from minitron.model.family import Family
from minitron.model.grammar import parse_norms, parse_rows, parse_taps

OLMO2 = Family(
    "olmo2",
    parse_rows("""
        model.embed_tokens.weight                              vocab hidden
        model.layers.{i}.self_attn.q_proj.weight               (query head_dim) hidden
        model.layers.{i}.self_attn.k_proj.weight               (kv head_dim) hidden
        model.layers.{i}.self_attn.v_proj.weight               (kv head_dim) hidden
        model.layers.{i}.self_attn.o_proj.weight               hidden (query head_dim)
        model.layers.{i}.self_attn.q_norm.weight               (query head_dim)
        model.layers.{i}.self_attn.k_norm.weight               (kv head_dim)
        model.layers.{i}.post_attention_layernorm.weight       hidden
        model.layers.{i}.mlp.gate_proj.weight                  ffn hidden
        model.layers.{i}.mlp.up_proj.weight                    ffn hidden
        model.layers.{i}.mlp.down_proj.weight                  hidden ffn
        model.layers.{i}.post_feedforward_layernorm.weight     hidden
        model.norm.weight                                      hidden
        lm_head.weight                                         vocab hidden    if not tie_word_embeddings
    """)
    + parse_rows(ATTENTION_BIAS),
    parse_taps("""
        hidden    model.layers.{i}.self_attn.q_proj    input
        hidden    model.layers.{i}.mlp.gate_proj       input
        ffn       model.layers.{i}.mlp.down_proj       input
    """),
    layer="model.layers.{i}",
    norms=parse_norms("""
        model.layers.{i}.post_attention_layernorm
        model.layers.{i}.post_feedforward_layernorm
        model.norm                                     lm_head
    """),
    config_defaults={**PLAIN, "attention_bias": False},
)
