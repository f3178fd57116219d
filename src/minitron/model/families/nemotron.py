"""Nemotron 3 and 4 and the Minitrons made of them: squared ReLU without a gate, LayerNorm1P with bias."""

from minitron.model.anatomy import Family
from minitron.model.families.llama import ATTENTION_BIAS, NORMS, TAPS
from minitron.model.grammar import parse_rows

NEMOTRON = Family(
    "nemotron",
    parse_rows("""
        model.embed_tokens.weight                           vocab hidden
        model.layers.{i}.input_layernorm.weight             hidden
        model.layers.{i}.input_layernorm.bias               hidden
        model.layers.{i}.self_attn.q_proj.weight            (query head_dim) hidden
        model.layers.{i}.self_attn.k_proj.weight            (kv head_dim) hidden
        model.layers.{i}.self_attn.v_proj.weight            (kv head_dim) hidden
        model.layers.{i}.self_attn.o_proj.weight            hidden (query head_dim)
        model.layers.{i}.post_attention_layernorm.weight    hidden
        model.layers.{i}.post_attention_layernorm.bias      hidden
        model.layers.{i}.mlp.up_proj.weight                 ffn hidden
        model.layers.{i}.mlp.up_proj.bias                   ffn       if mlp_bias
        model.layers.{i}.mlp.down_proj.weight               hidden ffn
        model.layers.{i}.mlp.down_proj.bias                 hidden    if mlp_bias
        model.norm.weight                                   hidden
        model.norm.bias                                     hidden
        lm_head.weight                                      vocab hidden    if not tie_word_embeddings
    """)
    + parse_rows(ATTENTION_BIAS),
    TAPS,
    layer="model.layers.{i}",
    norms=NORMS,
    norm_offset=1.0,
    is_centred=True,
)
