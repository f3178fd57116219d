"""NeMo Megatron-Bridge: which model folders it imports into Megatron Core, and on how many GPUs.

Bridges were read in the wheel of version 0.6.2, Megatron Core at commit d98e8a6 of Megatron-LM, the conversion script
at commit 067f987 of Megatron-Bridge, those of distillation at commit a2fbac7 of Model-Optimizer.
"""

from collections.abc import Mapping
from functools import partial

from minitron.model.anatomy import AXES
from minitron.model.engines.engine import Engine, Limit, Note, SizeLimit, Sizes, Use, names
from minitron.model.engines.limits import (
    MULTIPLE,
    MULTIPLE_OR_DIVISOR,
    copied_heads,
    entry_unlike,
    full_attention_out_of_step,
    is_divisible,
    is_divisible_or_copied,
    mlp_in_place_of_experts,
    window_ignored,
)

FAMILIES = names("llama mistral nemotron qwen2 qwen3 qwen3_moe gemma2 gemma3_text gpt_oss nemotron_h falcon_h1")
EXPERTS_OF_FFN = names("gpt_oss")
"""Families whose `intermediate_size` is that of the experts."""
ABSENT: Mapping[str, str] = {
    "mixtral": "MixtralForCausalLM",
    "ministral3": "Ministral3ForCausalLM, only the multimodal Mistral3ForConditionalGeneration",
    "phi3": "Phi3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "opt": "OPTForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
    "bamba": "BambaForCausalLM",
}
BRIDGES = "megatron/bridge/models"
CORE = "Megatron-LM: megatron/core"
REMOVED_IN = "0.7.0"
OLD_SHAPES: Mapping[str, frozenset[tuple[int, int]]] = {
    "Nemotron-H v1 and Nemotron Nano 2": frozenset(
        {(3072, 52), (4096, 52), (8192, 98), (8192, 118), (4480, 56), (5120, 62)}
    ),
    "Mistral 7B and Mistral Small 3": frozenset({(4096, 32), (5120, 40)}),
}
"""The hidden sizes and numbers of layers by which it recognises models."""


def _old_shape(sizes: Sizes, gpus: int, model: str) -> str | None:
    if (sizes.get(AXES["hidden"]), sizes.get(AXES["layer"])) not in OLD_SHAPES[model]:
        return None
    return f"models of this size are deprecated as {model}, to be removed in {REMOVED_IN}"


MEGATRON = Engine(
    name="Megatron-Bridge",
    version="0.6.2",
    repository="https://github.com/NVIDIA-NeMo/Megatron-Bridge",
    families=FAMILIES,
    unsupported={family: f"it has no bridge for {name}" for family, name in ABSENT.items()},
    unsupported_source=f"{BRIDGES}/*/*_bridge.py: MegatronModelBridge.register_bridge",
    limits=(
        Limit(
            names("llama nemotron qwen3 qwen3_moe"),
            partial(entry_unlike, entry="attention_bias", value=False, what="its bridge maps no biases of attention"),
            f"{BRIDGES}/{{llama/llama,nemotron/nemotron,qwen/qwen3,qwen/qwen3_moe}}_bridge.py: mapping_registry",
        ),
        Limit(
            names("llama nemotron"),
            partial(entry_unlike, entry="mlp_bias", value=False, what="its bridge maps no biases of the MLP"),
            f"{BRIDGES}/{{llama/llama,nemotron/nemotron}}_bridge.py: mapping_registry",
        ),
        Limit(
            names("qwen2 qwen3 qwen3_moe"),
            window_ignored,
            f"{BRIDGES}/qwen/{{qwen2,qwen3,qwen3_moe}}_bridge.py: provider_bridge sets no window_size",
        ),
        Limit(
            names("gemma3_text"),
            full_attention_out_of_step(6),
            f"{BRIDGES}/gemma/gemma3_provider.py: interleaved_attn_pattern (5, 1), which no bridge changes",
        ),
        Limit(
            names("gpt_oss"),
            full_attention_out_of_step(2),
            f"{BRIDGES}/gpt_oss/gpt_oss_bridge.py: window_attn_skip_freq = 2",
        ),
        Limit(
            names("qwen3_moe"),
            mlp_in_place_of_experts,
            f"{BRIDGES}/qwen/qwen3_moe_bridge.py: decoder_sparse_step = 1, no moe_layer_freq",
        ),
    ),
    commands="",
    size_limits=(
        SizeLimit(
            FAMILIES,
            ("query",),
            is_divisible,
            MULTIPLE,
            f"{CORE}/transformer/transformer_config.py: TransformerConfig.__post_init__",
        ),
        SizeLimit(
            FAMILIES,
            ("kv",),
            is_divisible_or_copied,
            MULTIPLE_OR_DIVISOR,
            f"{CORE}/transformer/transformer_config.py: TransformerConfig.__post_init__, num_query_groups",
        ),
        SizeLimit(
            FAMILIES - EXPERTS_OF_FFN,
            ("ffn", "shared_ffn"),
            is_divisible,
            MULTIPLE,
            f"{CORE}/tensor_parallel/layers.py: ColumnParallelLinear and RowParallelLinear call divide()",
        ),
        SizeLimit(
            names("gpt_oss"),
            ("ffn",),
            is_divisible,
            MULTIPLE,
            f"{CORE}/model_parallel_config.py: expert_tensor_parallel_size is that of tensors unless it is given",
        ),
        SizeLimit(
            names("qwen3_moe nemotron_h"),
            ("expert_ffn",),
            is_divisible,
            MULTIPLE,
            f"{CORE}/model_parallel_config.py: expert_tensor_parallel_size is that of tensors unless it is given",
        ),
        SizeLimit(
            FAMILIES,
            ("mhead", "mgroup"),
            is_divisible,
            MULTIPLE,
            f"{CORE}/ssm/mamba_mixer.py: MambaMixer asserts nheads % tp_size == 0 and ngroups % tp_size == 0",
        ),
        SizeLimit(
            FAMILIES,
            ("vocab",),
            is_divisible,
            MULTIPLE,
            f"{BRIDGES}/gpt_provider.py: should_pad_vocab is False for a model from Hugging Face; "
            f"{CORE}/tensor_parallel/utils.py: vocab_range_from_global_vocab_size calls divide()",
        ),
    ),
    notes=(
        Note(FAMILIES, copied_heads, f"{CORE}/transformer/attention.py: num_query_groups_per_partition"),
        Note(
            names("nemotron gemma2"),
            lambda sizes, gpus: f"this family is deprecated, to be removed in {REMOVED_IN}",
            f"{BRIDGES}/_deprecation.py: _DEPRECATED_ARCHITECTURES",
        ),
        *(
            Note(names(family), partial(_old_shape, model=model), f"{BRIDGES}/_deprecation.py: _deprecated_model_name")
            for family, model in zip(("nemotron_h", "mistral"), OLD_SHAPES, strict=True)
        ),
    ),
    uses=(
        Use(
            "import, in a clone of Megatron-Bridge",
            "./scripts/conversion/convert.sh import --executor local --device gpu --gpus-per-node {gpus} "
            "--hf-model {path} --megatron-path {path}-megatron --tp {gpus}",
        ),
        Use(
            "distil, in examples/megatron_bridge of a clone of Model-Optimizer",
            "torchrun --nproc_per_node {gpus} distill.py --tp_size {gpus} --teacher_hf_path {teacher} "
            "--student_hf_path {path} --data_paths 1.0 DATA_text_document --data_path_to_cache index-cache "
            "--seq_length 4096 --mbs 1 --gbs 768 --train_iters 1000 --lr 1e-4 --min_lr 1e-5 --lr_warmup_iters 50 "
            "--output_dir {path}-distilled",
        ),
        Use(
            "write the distilled model as a Hugging Face folder, in the folder of distill.py",
            "torchrun --nproc_per_node 1 export_distilled_megatron_to_hf.py --student_hf_path {path} "
            "--megatron_path {path}-distilled/checkpoints/iter_0001000 --hf_export_path {path}-distilled-hf",
        ),
        Use(
            "write an imported model as a Hugging Face folder, in a clone of Megatron-Bridge",
            "./scripts/conversion/convert.sh export --executor local --device gpu --gpus-per-node {gpus} "
            "--hf-model {path} --megatron-path {path}-megatron/iter_0000000 --hf-path {path}-exported --tp {gpus}",
        ),
    ),
)
