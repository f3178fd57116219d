"""GPT-2, GPT-NeoX (Pythia) and OPT: LayerNorm with bias, one KV head per query head, and no head_dim in the config.

A cut of hidden therefore removes heads too: hidden_size stays num_attention_heads times head_dim.
"""

from minitron.model.families.llama import NO_WINDOW
from minitron.model.family import Family, Product
from minitron.model.grammar import parse_norms, parse_rows, parse_taps

HEADS = Product(("query", "head_dim"))

GPT2 = Family(
    "gpt2",
    parse_rows("""
        # Conv1D stores its weights transposed: inputs first.
        transformer.wte.weight                     vocab hidden
        transformer.wpe.weight                     position hidden
        transformer.h.{i}.ln_1.weight              hidden
        transformer.h.{i}.ln_1.bias                hidden
        transformer.h.{i}.attn.c_attn.weight       hidden (3 query head_dim)
        transformer.h.{i}.attn.c_attn.bias         (3 query head_dim)
        transformer.h.{i}.attn.c_proj.weight       (query head_dim) hidden
        transformer.h.{i}.attn.c_proj.bias         hidden
        transformer.h.{i}.ln_2.weight              hidden
        transformer.h.{i}.ln_2.bias                hidden
        transformer.h.{i}.mlp.c_fc.weight          hidden ffn
        transformer.h.{i}.mlp.c_fc.bias            ffn
        transformer.h.{i}.mlp.c_proj.weight        ffn hidden
        transformer.h.{i}.mlp.c_proj.bias          hidden
        transformer.ln_f.weight                    hidden
        transformer.ln_f.bias                      hidden
        lm_head.weight                             vocab hidden    if not tie_word_embeddings
        transformer.h.{i}.attn.bias                -
        transformer.h.{i}.attn.masked_bias         -
    """),
    parse_taps("""
        hidden    transformer.h.{i}.ln_1           output
        hidden    transformer.h.{i}.ln_2           output
        query     transformer.h.{i}.attn.c_proj    input
        ffn       transformer.h.{i}.mlp.c_proj     input
    """),
    layer="transformer.h.{i}",
    norms=parse_norms("""
        transformer.h.{i}.ln_1    c_attn
        transformer.h.{i}.ln_2    c_fc
        transformer.ln_f          lm_head
    """),
    grouped={},
    config_names={
        "hidden": "n_embd",
        "ffn": "n_inner",
        "query": "n_head",
        "position": "n_positions",
        "layer": "n_layer",
    },
    config_defaults={"tie_word_embeddings": True, "n_inner": None, "head_dim": None, **NO_WINDOW},
    ffn_multiple=4,
    product=HEADS,
    is_centred=True,
    is_transposed=True,
)

GPT_NEOX = Family(
    "gpt_neox",
    parse_rows("""
        # Query, key and value of one head are adjacent.
        gpt_neox.embed_in.weight                                      vocab hidden
        gpt_neox.layers.{i}.input_layernorm.weight                    hidden
        gpt_neox.layers.{i}.input_layernorm.bias                      hidden
        gpt_neox.layers.{i}.attention.query_key_value.weight          (query 3 head_dim) hidden
        gpt_neox.layers.{i}.attention.query_key_value.bias            (query 3 head_dim)    if attention_bias
        gpt_neox.layers.{i}.attention.dense.weight                    hidden (query head_dim)
        gpt_neox.layers.{i}.attention.dense.bias                      hidden    if attention_bias
        gpt_neox.layers.{i}.post_attention_layernorm.weight           hidden
        gpt_neox.layers.{i}.post_attention_layernorm.bias             hidden
        gpt_neox.layers.{i}.mlp.dense_h_to_4h.weight                  ffn hidden
        gpt_neox.layers.{i}.mlp.dense_h_to_4h.bias                    ffn
        gpt_neox.layers.{i}.mlp.dense_4h_to_h.weight                  hidden ffn
        gpt_neox.layers.{i}.mlp.dense_4h_to_h.bias                    hidden
        gpt_neox.final_layer_norm.weight                              hidden
        gpt_neox.final_layer_norm.bias                                hidden
        embed_out.weight                                              vocab hidden    if not tie_word_embeddings
        gpt_neox.layers.{i}.attention.bias                            -
        gpt_neox.layers.{i}.attention.masked_bias                     -
        gpt_neox.layers.{i}.attention.rotary_emb.inv_freq             -
    """),
    parse_taps("""
        hidden    gpt_neox.layers.{i}.input_layernorm             output
        hidden    gpt_neox.layers.{i}.post_attention_layernorm    output
        query     gpt_neox.layers.{i}.attention.dense             input
        ffn       gpt_neox.layers.{i}.mlp.dense_4h_to_h           input
    """),
    layer="gpt_neox.layers.{i}",
    norms=parse_norms("""
        gpt_neox.layers.{i}.input_layernorm             query_key_value
        gpt_neox.layers.{i}.post_attention_layernorm    dense_h_to_4h
        gpt_neox.final_layer_norm                       embed_out
    """),
    grouped={},
    config_defaults={"tie_word_embeddings": False, "attention_bias": True, "head_dim": None, **NO_WINDOW},
    product=HEADS,
    is_centred=True,
)

OPT = Family(
    "opt",
    parse_rows("""
        # Positions start at 2.
        model.decoder.embed_tokens.weight                         vocab hidden
        model.decoder.embed_positions.weight                      (position | 2) hidden
        model.decoder.layers.{i}.self_attn_layer_norm.weight      hidden    if layer_norm_elementwise_affine
        model.decoder.layers.{i}.self_attn_layer_norm.bias        hidden    if layer_norm_elementwise_affine
        model.decoder.layers.{i}.self_attn.q_proj.weight          (query head_dim) hidden
        model.decoder.layers.{i}.self_attn.q_proj.bias            (query head_dim)    if enable_bias
        model.decoder.layers.{i}.self_attn.k_proj.weight          (query head_dim) hidden
        model.decoder.layers.{i}.self_attn.k_proj.bias            (query head_dim)    if enable_bias
        model.decoder.layers.{i}.self_attn.v_proj.weight          (query head_dim) hidden
        model.decoder.layers.{i}.self_attn.v_proj.bias            (query head_dim)    if enable_bias
        model.decoder.layers.{i}.self_attn.out_proj.weight        hidden (query head_dim)
        model.decoder.layers.{i}.self_attn.out_proj.bias          hidden    if enable_bias
        model.decoder.layers.{i}.final_layer_norm.weight          hidden    if layer_norm_elementwise_affine
        model.decoder.layers.{i}.final_layer_norm.bias            hidden    if layer_norm_elementwise_affine
        model.decoder.layers.{i}.fc1.weight                       ffn hidden
        model.decoder.layers.{i}.fc1.bias                         ffn       if enable_bias
        model.decoder.layers.{i}.fc2.weight                       hidden ffn
        model.decoder.layers.{i}.fc2.bias                         hidden    if enable_bias
        model.decoder.final_layer_norm.weight                     hidden    if do_layer_norm_before
        model.decoder.final_layer_norm.bias                       hidden    if do_layer_norm_before
        lm_head.weight                                            vocab hidden    if not tie_word_embeddings
    """),
    parse_taps("""
        hidden    model.decoder.layers.{i}.self_attn.q_proj      input
        hidden    model.decoder.layers.{i}.fc1                   input
        query     model.decoder.layers.{i}.self_attn.out_proj    input
        ffn       model.decoder.layers.{i}.fc2                   input
    """),
    layer="model.decoder.layers.{i}",
    norms=parse_norms("""
        model.decoder.layers.{i}.self_attn_layer_norm    q_proj k_proj v_proj    if do_layer_norm_before
        model.decoder.layers.{i}.final_layer_norm        fc1                     if do_layer_norm_before
        model.decoder.final_layer_norm                   lm_head                 if do_layer_norm_before
    """),
    grouped={},
    config_names={"ffn": "ffn_dim"},
    config_defaults={
        "tie_word_embeddings": True,
        "enable_bias": True,
        "do_layer_norm_before": True,
        "layer_norm_elementwise_affine": True,
        "word_embed_proj_dim": None,
        "head_dim": None,
        **NO_WINDOW,
    },
    config_products={"word_embed_proj_dim": ("hidden",)},
    product=HEADS,
    is_centred=True,
    joins_documents=True,
)
