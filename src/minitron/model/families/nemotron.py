"""Nemotron 3 and 4 and the Minitrons pruned from them: squared ReLU without a gate, LayerNorm1P with bias."""

from minitron.model.families.llama import ATTENTION_BIAS, BACKBONE, NORMS, PLAIN, TAPS, UNBIASED
from minitron.model.family import Family
from minitron.model.grammar import parse_rows

NEMOTRON = Family(
    "nemotron",
    parse_rows(
        BACKBONE
        + ATTENTION_BIAS
        + """
        model.layers.{i}.input_layernorm.bias             hidden
        model.layers.{i}.post_attention_layernorm.bias    hidden
        model.layers.{i}.mlp.up_proj.weight               ffn hidden
        model.layers.{i}.mlp.up_proj.bias                 ffn       if mlp_bias
        model.layers.{i}.mlp.down_proj.weight             hidden ffn
        model.layers.{i}.mlp.down_proj.bias               hidden    if mlp_bias
        model.norm.bias                                   hidden
        """
    ),
    TAPS,
    layer="model.layers.{i}",
    norms=NORMS,
    config_defaults={**PLAIN, **UNBIASED},
    norm_offset=1.0,
    is_centred=True,
)
