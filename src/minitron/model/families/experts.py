"""Mixtral, Qwen3-MoE and GPT-OSS: in place of an MLP, a layer has experts that a router chooses from.

Mixtral and Qwen3-MoE store the matrices of every expert separately; transformers stacks them in memory.
"""

from minitron.model.families.llama import ATTENTION_BIAS, ATTENTION_TAPS, BACKBONE, PLAIN, QK_NORM
from minitron.model.family import Family, LayerKinds
from minitron.model.grammar import parse_norms, parse_rows, parse_taps

EXPERT_TAPS = parse_taps(
    ATTENTION_TAPS
    + """
    expert    model.layers.{i}.mlp.experts    routed
    ffn       model.layers.{i}.mlp.experts    routed
    """
)

MIXTRAL = Family(
    "mixtral",
    parse_rows(BACKBONE)
    + parse_rows("""
        model.layers.{i}.block_sparse_moe.gate.weight              expert hidden
        model.layers.{i}.block_sparse_moe.experts.{e}.w1.weight    ffn hidden
        model.layers.{i}.block_sparse_moe.experts.{e}.w3.weight    ffn hidden
        model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight    hidden ffn
    """),
    EXPERT_TAPS,
    layer="model.layers.{i}",
    norms=parse_norms("""
        model.layers.{i}.input_layernorm             q_proj k_proj v_proj
        model.layers.{i}.post_attention_layernorm    gate w1 w3
        model.norm                                   lm_head
    """),
    config_defaults={**PLAIN, "num_key_value_heads": 8},
)

QWEN3_MOE = Family(
    "qwen3_moe",
    parse_rows(BACKBONE + ATTENTION_BIAS + QK_NORM)
    + parse_rows("""
        model.layers.{i}.mlp.gate_proj.weight                 ffn hidden           in mlp
        model.layers.{i}.mlp.up_proj.weight                   ffn hidden           in mlp
        model.layers.{i}.mlp.down_proj.weight                 hidden ffn           in mlp
        model.layers.{i}.mlp.gate.weight                      expert hidden        in moe
        model.layers.{i}.mlp.experts.{e}.gate_proj.weight     expert_ffn hidden    in moe
        model.layers.{i}.mlp.experts.{e}.up_proj.weight       expert_ffn hidden    in moe
        model.layers.{i}.mlp.experts.{e}.down_proj.weight     hidden expert_ffn    in moe
    """),
    parse_taps(
        ATTENTION_TAPS
        + """
        ffn           model.layers.{i}.mlp.down_proj    input     in mlp
        expert        model.layers.{i}.mlp.experts      routed    in moe
        expert_ffn    model.layers.{i}.mlp.experts      routed    in moe
    """
    ),
    layer="model.layers.{i}",
    kinds=LayerKinds("mlp_only_layers", listed="mlp", otherwise="moe", period="decoder_sparse_step"),
    norms=parse_norms("""
        model.layers.{i}.input_layernorm             q_proj k_proj v_proj
        model.layers.{i}.post_attention_layernorm    gate gate_proj up_proj
        model.norm                                   lm_head
    """),
    window_switch="use_sliding_window",
    config_defaults={
        **PLAIN,
        "num_key_value_heads": 4,
        "attention_bias": False,
        "mlp_only_layers": None,
        "decoder_sparse_step": 1,
        "use_sliding_window": False,
        "sliding_window": 4096,
    },
)

GPT_OSS = Family(
    "gpt_oss",
    parse_rows(BACKBONE + ATTENTION_BIAS)
    + parse_rows("""
        # All experts in one tensor, inputs first; gate and up of a neuron are adjacent.
        model.layers.{i}.self_attn.sinks                  query
        model.layers.{i}.mlp.router.weight                expert hidden
        model.layers.{i}.mlp.router.bias                  expert
        model.layers.{i}.mlp.experts.gate_up_proj         expert hidden (ffn 2)
        model.layers.{i}.mlp.experts.gate_up_proj_bias    expert (ffn 2)
        model.layers.{i}.mlp.experts.down_proj            expert ffn hidden
        model.layers.{i}.mlp.experts.down_proj_bias       expert hidden
    """),
    EXPERT_TAPS,
    layer="model.layers.{i}",
    bytes_per_pair=8,
    norms=parse_norms("""
        model.layers.{i}.input_layernorm             q_proj k_proj v_proj
        model.layers.{i}.post_attention_layernorm    router gate_up_proj
        model.norm                                   lm_head
    """),
    config_defaults={
        "tie_word_embeddings": False,
        "attention_bias": True,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "sliding_window": 128,
    },
    window_period=2,
    joins_documents=True,
)
