"""vLLM: what it runs of a model folder; read in the wheel of version 0.33.0, file by file."""

from minitron.model.anatomy import AXES
from minitron.model.engines.engine import Engine, Limit, Note, SizeLimit, Sizes, Use, names
from minitron.model.engines.limits import (
    MULTIPLE,
    MULTIPLE_OR_DIVISOR,
    MULTIPLE_OR_ONE,
    copied_heads,
    full_attention_out_of_step,
    heads_unlike_hidden,
    is_divisible,
    is_divisible_or_copied,
    is_divisible_or_one,
    mixed_windows,
)

FAMILIES = names(
    "llama mistral mixtral ministral3 nemotron qwen2 qwen3 qwen3_moe gemma2 gemma3_text phi3 olmo2 smollm3 granite "
    "gpt2 gpt_neox opt gpt_oss mamba2 nemotron_h falcon_h1"
)
EXPERTS_OF_FFN = names("mixtral gpt_oss")
"""Families whose `intermediate_size` is that of the experts."""
VOCABULARY_STEP = 64
"""The embeddings are padded to a multiple of this."""
FLASH_STEP, FLASH_LARGEST = 8, 256
"""The head sizes of FlashAttention 2 and 3: multiples of the first, up to the second."""


def _padded(size: int) -> int:
    return -(-size // VOCABULARY_STEP) * VOCABULARY_STEP


def _vocabulary(sizes: Sizes, gpus: int) -> str | None:
    size = sizes.get(AXES["vocab"], 0)
    return f"it pads the vocabulary from {size:,} to {_padded(size):,} entries in memory" if size % 64 else None


def _copied_groups(sizes: Sizes, gpus: int) -> str | None:
    return f"each of the {gpus} GPUs holds the one Mamba group" if sizes.get(AXES["mgroup"]) == 1 < gpus else None


def _other_kernel(sizes: Sizes, gpus: int) -> str | None:
    width = sizes.get(AXES["head_dim"], FLASH_STEP)
    if width % FLASH_STEP == 0 and width <= FLASH_LARGEST:
        return None
    return (
        f"FlashAttention 2 and 3 have no heads of {width} channels (multiples of {FLASH_STEP} up to {FLASH_LARGEST}): "
        "a slower attention backend runs it"
    )


VLLM = Engine(
    name="vLLM",
    version="0.33.0",
    repository="https://github.com/vllm-project/vllm",
    families=FAMILIES,
    unsupported={"bamba": "it has had no BambaForCausalLM since version 0.23.0"},
    unsupported_source="vllm/model_executor/models/registry.py: _PREVIOUSLY_SUPPORTED_MODELS",
    limits=(
        Limit(
            names("qwen2"),
            heads_unlike_hidden,
            "vllm/model_executor/models/qwen2.py: Qwen2Attention computes head_dim as hidden_size // num_heads",
        ),
        Limit(
            names("qwen2"),
            mixed_windows,
            "vllm/model_executor/models/qwen2.py: Qwen2Model asserts max_window_layers == num_hidden_layers",
        ),
        Limit(
            names("gpt_oss"),
            full_attention_out_of_step(2),
            "vllm/model_executor/models/gpt_oss.py: OAIAttention has the window in layers of even number",
        ),
    ),
    commands="vllm serve PATH                                                   # vLLM",
    # vllm/model_executor/layers/quantization/compressed_tensors/compressed_tensors.py: CompressedTensorsConfig
    quantisations=names("compressed-tensors"),
    size_limits=(
        SizeLimit(
            FAMILIES,
            ("query",),
            is_divisible,
            MULTIPLE,
            "vllm/config/model.py: ModelConfig.verify_with_parallel_config",
        ),
        SizeLimit(
            FAMILIES,
            ("kv",),
            is_divisible_or_copied,
            MULTIPLE_OR_DIVISOR,
            "vllm/model_executor/layers/linear.py: QKVParallelLinear divides KV heads by GPUs, or GPUs by KV heads",
        ),
        SizeLimit(
            FAMILIES - EXPERTS_OF_FFN,
            ("ffn", "shared_ffn"),
            is_divisible,
            MULTIPLE,
            "vllm/model_executor/layers/linear.py: ColumnParallelLinear and RowParallelLinear call divide()",
        ),
        SizeLimit(
            EXPERTS_OF_FFN,
            ("ffn",),
            is_divisible,
            MULTIPLE,
            "vllm/model_executor/layers/fused_moe/config.py: FusedMoEConfig.__post_init__",
        ),
        SizeLimit(
            names("qwen3_moe nemotron_h"),
            ("expert_ffn",),
            is_divisible,
            MULTIPLE,
            "vllm/model_executor/layers/fused_moe/config.py: FusedMoEConfig.__post_init__",
        ),
        SizeLimit(
            names("qwen3_moe"),
            ("expert",),
            lambda experts, gpus: experts >= gpus,
            "at least the GPUs",
            "vllm/model_executor/models/qwen3_moe.py: Qwen3MoeSparseMoeBlock",
            "is less than the {gpus} GPUs",
        ),
        SizeLimit(
            FAMILIES,
            ("mhead",),
            is_divisible,
            MULTIPLE,
            "vllm/model_executor/layers/mamba/mamba_mixer2.py: MambaMixer2 asserts num_heads % tp_size == 0",
        ),
        SizeLimit(
            FAMILIES,
            ("mgroup",),
            is_divisible_or_one,
            MULTIPLE_OR_ONE,
            "vllm/model_executor/layers/mamba/mamba_mixer2.py: MambaMixer2 asserts n_groups % tp_size == 0 or 1 group",
        ),
        SizeLimit(
            FAMILIES,
            ("vocab",),
            lambda size, gpus: _padded(size) % gpus == 0,
            f"a multiple of the GPUs, once it is padded to a multiple of {VOCABULARY_STEP}",
            "vllm/model_executor/layers/vocab_parallel_embedding.py: VocabParallelEmbedding pads, then calls divide()",
            f"padded to a multiple of {VOCABULARY_STEP} cannot be split over {{gpus}} GPUs",
        ),
    ),
    notes=(
        Note(
            FAMILIES,
            _vocabulary,
            "vllm/model_executor/layers/vocab_parallel_embedding.py: DEFAULT_VOCAB_PADDING_SIZE",
        ),
        Note(FAMILIES, copied_heads, "vllm/model_executor/layers/linear.py: QKVParallelLinear.num_kv_head_replicas"),
        Note(
            FAMILIES,
            _copied_groups,
            "vllm/model_executor/layers/mamba/mamba_mixer2.py: extra_groups_for_head_shards",
        ),
        Note(
            FAMILIES,
            _other_kernel,
            "vllm/v1/attention/backends/{flash_attn,triton_attn,flex_attention}.py: supports_head_size",
        ),
        Note(
            names("gpt_neox olmo2 smollm3"),
            lambda sizes, gpus: "it runs the code of transformers, with layers of its own in place of the matrices",
            "vllm/model_executor/models/registry.py: _TRANSFORMERS_SUPPORTED_MODELS",
        ),
    ),
    uses=(
        Use("serve", "vllm serve {path} --tensor-parallel-size {gpus}"),
        Use(
            "measure",
            "vllm bench throughput --model {path} --tensor-parallel-size {gpus} --dataset-name random "
            "--random-input-len 1024 --random-output-len 128 --num-prompts 200",
        ),
    ),
)
