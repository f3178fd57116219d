"""Mamba-2 by itself and in hybrids: Nemotron-H, Bamba, Falcon-H1.

A head is cut with its x, z and dt and with its part of the convolution, the gated norm and the output projection. B, C
and the state belong to groups and stay; every group has equally many heads.
"""

from minitron.model.families.llama import ATTENTION_BIAS, NO_WINDOW, PLAIN, UNBIASED
from minitron.model.family import Family, LayerKinds, Product
from minitron.model.grammar import parse_norms, parse_rows, parse_taps

GROUPED = {"query": "kv", "mhead": "mgroup", "expert": "expert_group"}


def mixer(module: str, projection_bias: tuple[str, str], conv_bias: str, kind: str | None = None) -> str:
    """Return the rows of a Mamba-2 mixer; `projection_bias` are the flags of the input and the output projection."""
    where = f"in {kind}" if kind else ""
    wide = "mhead mchan | mgroup state | mgroup state"
    return f"""
        {module}.in_proj.weight     (mhead mchan | {wide} | mhead) hidden    {where}
        {module}.in_proj.bias       (mhead mchan | {wide} | mhead)           {where} if {projection_bias[0]}
        {module}.conv1d.weight      ({wide}) 1 conv                          {where}
        {module}.conv1d.bias        ({wide})                                 {where} if {conv_bias}
        {module}.dt_bias            mhead                                    {where}
        {module}.A_log              mhead                                    {where}
        {module}.D                  mhead                                    {where}
        {module}.out_proj.weight    hidden (mhead mchan)                     {where}
        {module}.out_proj.bias      hidden                                   {where} if {projection_bias[1]}
    """


def mixer_taps(module: str, kind: str | None = None) -> str:
    """Return the taps of Mamba heads and channels: x or z from the input projection, or the output projection's input.

    Minitron-SSM, arXiv 2504.11409, section 3 and table 2.
    """
    where = f"in {kind}" if kind else ""
    return f"""
        (mhead mchan)    {module}.in_proj     output[1]    {where}    as x
        (mhead mchan)    {module}.in_proj     output[0]    {where}    as z
        (mhead mchan)    {module}.out_proj    input        {where}    as out_proj
    """


MAMBA2 = Family(
    "mamba2",
    parse_rows(
        """
        backbone.embeddings.weight               vocab hidden
        backbone.layers.{i}.norm.weight          hidden
        backbone.layers.{i}.mixer.norm.weight    (mhead mchan)
        backbone.norm_f.weight                   hidden
        lm_head.weight                           vocab hidden    if not tie_word_embeddings
        """
        + mixer("backbone.layers.{i}.mixer", ("use_bias", "use_bias"), "use_conv_bias")
    ),
    parse_taps("hidden    backbone.layers.{i}.norm    output" + mixer_taps("backbone.layers.{i}.mixer")),
    layer="backbone.layers.{i}",
    grouped=GROUPED,
    config_names={"mhead": "num_heads", "mchan": "head_dim", "state": "state_size"},
    product=Product(("mhead", "mchan"), ratio="expand"),
    norms=parse_norms("""
        backbone.layers.{i}.norm    in_proj
        backbone.norm_f             lm_head
    """),
    config_defaults={
        "tie_word_embeddings": False,
        "use_bias": False,
        "use_conv_bias": True,
        "expand": 2,
        "conv_kernel": 4,
        **NO_WINDOW,
    },
    joins_documents=True,
)

NEMOTRON_H = Family(
    "nemotron_h",
    parse_rows(
        """
        # In files `backbone`, in memory `model`. transformers never ties this family's embeddings.
        backbone.embeddings.weight                                      vocab hidden
        backbone.layers.{i}.norm.weight                                 hidden
        backbone.layers.{i}.mixer.norm.weight                           (mhead mchan)              in mamba
        backbone.layers.{i}.mixer.q_proj.weight                         (query head_dim) hidden    in attention
        backbone.layers.{i}.mixer.k_proj.weight                         (kv head_dim) hidden       in attention
        backbone.layers.{i}.mixer.v_proj.weight                         (kv head_dim) hidden       in attention
        backbone.layers.{i}.mixer.o_proj.weight                         hidden (query head_dim)    in attention
        backbone.layers.{i}.mixer.up_proj.weight                        ffn hidden           in mlp
        backbone.layers.{i}.mixer.up_proj.bias                          ffn                  in mlp if mlp_bias
        backbone.layers.{i}.mixer.down_proj.weight                      hidden ffn           in mlp
        backbone.layers.{i}.mixer.down_proj.bias                        hidden               in mlp if mlp_bias
        backbone.layers.{i}.mixer.gate.weight                           expert hidden        in moe
        backbone.layers.{i}.mixer.gate.e_score_correction_bias          expert               in moe as buffer
        backbone.layers.{i}.mixer.experts.{e}.up_proj.weight            expert_ffn hidden  in moe if not moe_latent_size
        backbone.layers.{i}.mixer.experts.{e}.down_proj.weight          hidden expert_ffn  in moe if not moe_latent_size
        backbone.layers.{i}.mixer.experts.{e}.up_proj.weight            expert_ffn latent  in moe if moe_latent_size
        backbone.layers.{i}.mixer.experts.{e}.down_proj.weight          latent expert_ffn  in moe if moe_latent_size
        backbone.layers.{i}.mixer.fc1_latent_proj.weight                latent hidden        in moe if moe_latent_size
        backbone.layers.{i}.mixer.fc2_latent_proj.weight                hidden latent        in moe if moe_latent_size
        backbone.layers.{i}.mixer.fc1_latent_proj.bias                  latent    in moe if moe_latent_size and mlp_bias
        backbone.layers.{i}.mixer.fc2_latent_proj.bias                  hidden    in moe if moe_latent_size and mlp_bias
        backbone.layers.{i}.mixer.shared_experts.up_proj.weight         shared_ffn hidden    in moe
        backbone.layers.{i}.mixer.shared_experts.up_proj.bias           shared_ffn           in moe if mlp_bias
        backbone.layers.{i}.mixer.shared_experts.down_proj.weight       hidden shared_ffn    in moe
        backbone.layers.{i}.mixer.shared_experts.down_proj.bias         hidden               in moe if mlp_bias
        backbone.norm_f.weight                                          hidden
        lm_head.weight                                                  vocab hidden
        """
        + mixer("backbone.layers.{i}.mixer", ("use_bias", "use_bias"), "use_conv_bias", "mamba")
    ),
    parse_taps(
        """
        hidden        model.layers.{i}.norm                              output
        query         model.layers.{i}.mixer.o_proj                      input     in attention
        kv            model.layers.{i}.mixer.o_proj                      input     in attention
        ffn           model.layers.{i}.mixer.down_proj                   input     in mlp
        # The experts' latent space has one basis where it is entered and one where it is left, cut alike.
        latent        model.layers.{i}.mixer.fc1_latent_proj             output    in moe if moe_latent_size
        latent        model.layers.{i}.mixer.fc2_latent_proj             input     in moe if moe_latent_size
        shared_ffn    model.layers.{i}.mixer.shared_experts.down_proj    input     in moe
        expert        model.layers.{i}.mixer.experts                     routed    in moe
        expert_ffn    model.layers.{i}.mixer.experts                     routed    in moe
        """
        + mixer_taps("model.layers.{i}.mixer", "mamba")
    ),
    layer="model.layers.{i}",
    grouped=GROUPED,
    config_names={"expert": "n_routed_experts"},
    config_defaults={
        "num_key_value_heads": 8,
        "head_dim": 128,
        "mlp_bias": False,
        "use_bias": False,
        "use_conv_bias": True,
        "conv_kernel": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "moe_latent_size": None,
        "sliding_window": None,
    },
    per_layer_lists=("layers_block_type",),
    left_behind="mtp.",
    student_values={"num_nextn_predict_layers": 0},
    kinds=LayerKinds(
        "layers_block_type",
        pattern="hybrid_override_pattern",
        characters={"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"},
    ),
    norms=parse_norms("""
        backbone.layers.{i}.norm    q_proj k_proj v_proj in_proj up_proj gate fc1_latent_proj
        backbone.norm_f             lm_head
    """),
    joins_documents=True,
)

HYBRID = """
    model.embed_tokens.weight                         vocab hidden
    model.layers.{i}.input_layernorm.weight           hidden
    model.layers.{i}.pre_ff_layernorm.weight          hidden
    model.layers.{i}.feed_forward.gate_proj.weight    ffn hidden
    model.layers.{i}.feed_forward.up_proj.weight      ffn hidden
    model.layers.{i}.feed_forward.down_proj.weight    hidden ffn
    model.layers.{i}.feed_forward.gate_proj.bias      ffn       if mlp_bias
    model.layers.{i}.feed_forward.up_proj.bias        ffn       if mlp_bias
    model.layers.{i}.feed_forward.down_proj.bias      hidden    if mlp_bias
    model.final_layernorm.weight                      hidden
    lm_head.weight                                    vocab hidden    if not tie_word_embeddings
"""

HYBRID_NAMES = {
    "mhead": "mamba_n_heads",
    "mchan": "mamba_d_head",
    "mgroup": "mamba_n_groups",
    "state": "mamba_d_state",
    "conv": "mamba_d_conv",
}

HYBRID_DEFAULTS = {
    **PLAIN,
    **UNBIASED,
    "num_key_value_heads": 8,
    "mamba_proj_bias": False,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
}

HYBRID_NORMS = parse_norms("""
    model.layers.{i}.input_layernorm     q_proj k_proj v_proj in_proj
    model.layers.{i}.pre_ff_layernorm    gate_proj up_proj
    model.final_layernorm                lm_head
""")


def hybrid_taps(attention_kind: str | None = None, mixer_kind: str | None = None) -> str:
    """Return the taps of Bamba, whose layers have attention or a mixer, and of Falcon-H1, whose layers have both."""
    attention = f"in {attention_kind}" if attention_kind else ""
    return (
        f"""
        hidden    model.layers.{{i}}.input_layernorm           output
        hidden    model.layers.{{i}}.pre_ff_layernorm          output
        query     model.layers.{{i}}.self_attn.o_proj          input    {attention}
        kv        model.layers.{{i}}.self_attn.o_proj          input    {attention}
        """
        + mixer_taps("model.layers.{i}.mamba", mixer_kind)
        + "ffn    model.layers.{i}.feed_forward.down_proj    input"
    )


BAMBA = Family(
    "bamba",
    parse_rows(
        HYBRID
        + """
        model.layers.{i}.mamba.norm.weight          (mhead mchan)              in mamba
        model.layers.{i}.self_attn.q_proj.weight    (query head_dim) hidden    in attention
        model.layers.{i}.self_attn.k_proj.weight    (kv head_dim) hidden       in attention
        model.layers.{i}.self_attn.v_proj.weight    (kv head_dim) hidden       in attention
        model.layers.{i}.self_attn.o_proj.weight    hidden (query head_dim)    in attention
        model.layers.{i}.self_attn.q_proj.bias      (query head_dim)           in attention if attention_bias
        model.layers.{i}.self_attn.k_proj.bias      (kv head_dim)              in attention if attention_bias
        model.layers.{i}.self_attn.v_proj.bias      (kv head_dim)              in attention if attention_bias
        model.layers.{i}.self_attn.o_proj.bias      hidden                     in attention if attention_bias
        """
        + mixer("model.layers.{i}.mamba", ("mamba_proj_bias", "mamba_proj_bias"), "mamba_conv_bias", "mamba")
    ),
    parse_taps(hybrid_taps("attention", "mamba")),
    layer="model.layers.{i}",
    grouped=GROUPED,
    config_names=HYBRID_NAMES,
    product=Product(("mhead", "mchan"), ratio="mamba_expand"),
    kinds=LayerKinds("attn_layer_indices", listed="attention", otherwise="mamba"),
    config_defaults={**HYBRID_DEFAULTS, "attn_layer_indices": None, "mamba_expand": 2},
    norms=HYBRID_NORMS,
    joins_documents=True,
)

FALCON_H1 = Family(
    "falcon_h1",
    parse_rows(
        HYBRID
        + ATTENTION_BIAS
        + """
        # Every layer has attention and a mixer in parallel.
        model.layers.{i}.mamba.norm.weight          (mhead mchan)    if mamba_rms_norm
        model.layers.{i}.self_attn.q_proj.weight    (query head_dim) hidden
        model.layers.{i}.self_attn.k_proj.weight    (kv head_dim) hidden
        model.layers.{i}.self_attn.v_proj.weight    (kv head_dim) hidden
        model.layers.{i}.self_attn.o_proj.weight    hidden (query head_dim)
        """
        + mixer("model.layers.{i}.mamba", ("mamba_proj_bias", "projectors_bias"), "mamba_conv_bias")
    ),
    parse_taps(hybrid_taps()),
    layer="model.layers.{i}",
    grouped=GROUPED,
    config_names=HYBRID_NAMES,
    config_defaults={**HYBRID_DEFAULTS, "projectors_bias": False, "mamba_rms_norm": False, "mamba_d_ssm": 1024},
    config_products={"mamba_d_ssm": ("mhead", "mchan")},
    norms=HYBRID_NORMS,
    logit_multiplier="lm_head_multiplier",
    scales_residual=True,
    joins_documents=True,
)
