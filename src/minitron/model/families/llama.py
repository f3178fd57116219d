"""Llama and the families that differ from it by a few biases and norms: Mistral, Qwen2, Qwen3."""

from minitron.model.anatomy import Family, Restatement, parse_rows, parse_taps

DECODER = """
    model.embed_tokens.weight                           vocab hidden
    model.layers.{i}.input_layernorm.weight             hidden
    model.layers.{i}.self_attn.q_proj.weight            (query head_dim) hidden
    model.layers.{i}.self_attn.k_proj.weight            (kv head_dim) hidden
    model.layers.{i}.self_attn.v_proj.weight            (kv head_dim) hidden
    model.layers.{i}.self_attn.o_proj.weight            hidden (query head_dim)
    model.layers.{i}.post_attention_layernorm.weight    hidden
    model.layers.{i}.mlp.gate_proj.weight               ffn hidden
    model.layers.{i}.mlp.up_proj.weight                 ffn hidden
    model.layers.{i}.mlp.down_proj.weight               hidden ffn
    model.norm.weight                                   hidden
    lm_head.weight                                      vocab hidden    if not tie_word_embeddings
    model.layers.{i}.self_attn.rotary_emb.inv_freq      -
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

TAPS = parse_taps("""
    hidden    model.layers.{i}.input_layernorm             output
    hidden    model.layers.{i}.post_attention_layernorm    output
    query     model.layers.{i}.self_attn.o_proj            input
    ffn       model.layers.{i}.mlp.down_proj               input
""")


# LlamaConfig refuses a hidden_size that is no multiple of the heads, whatever head_dim says. Mistral without a
# sliding window is the same network and has no such rule.
AS_MISTRAL = Restatement("hidden", "query", "mistral", {"sliding_window": None}, ("attention_bias", "mlp_bias"))


def _decoder(model_type: str, *additions: str, restatement: Restatement | None = None) -> Family:
    rows = parse_rows("".join([DECODER, *additions]))
    return Family(model_type, rows, TAPS, layer="model.layers.{i}", restatement=restatement)


LLAMA = _decoder("llama", ATTENTION_BIAS, MLP_BIAS, restatement=AS_MISTRAL)
MISTRAL = _decoder("mistral")
QWEN2 = _decoder("qwen2", QKV_BIAS)
QWEN3 = _decoder("qwen3", ATTENTION_BIAS, QK_NORM)
