"""TensorRT-LLM: what its PyTorch backend runs of a model folder.

Read in the main branch on the way to version 1.3, in which this backend is the only one; every source names the commit
at which the file was read.
"""

from collections.abc import Mapping

from minitron.model.anatomy import AXES
from minitron.model.engines.engine import Config, Engine, Limit, Note, SizeLimit, Sizes, Use, names
from minitron.model.engines.limits import (
    MULTIPLE,
    MULTIPLE_OR_DIVISOR,
    copied_heads,
    full_attention_out_of_step,
    heads_unlike_hidden,
    is_divisible,
    is_divisible_or_copied,
    mlp_in_place_of_experts,
    window_ignored,
)

FAMILIES = names("llama mistral mixtral nemotron qwen2 qwen3 qwen3_moe gemma3_text phi3 gpt_oss nemotron_h")
EXPERTS_OF_FFN = names("mixtral gpt_oss")
"""Families whose `intermediate_size` is that of the experts."""
HEAD_SIZES = frozenset({32, 48, 64, 72, 80, 96, 104, 112, 128, 144, 160, 192, 224, 256})
"""The head sizes of its own attention; 72 passes the check for the sake of other kernels."""
ABSENT: Mapping[str, str] = {
    "ministral3": "Ministral3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM (it is listed for AutoDeploy, which was not read)",
    "granite": "GraniteForCausalLM (it is listed for AutoDeploy, which was not read)",
    "gpt2": "GPT2LMHeadModel",
    "gpt_neox": "GPTNeoXForCausalLM",
    "opt": "OPTForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
    "bamba": "BambaForCausalLM",
    "falcon_h1": "FalconH1ForCausalLM",
}
MODULES = "tensorrt_llm/_torch/modules"
MODELS = "tensorrt_llm/_torch/models"


def _tied(config: Config) -> str | None:
    if not config.get("tie_word_embeddings"):
        return None
    return "it splits the output matrix over the GPUs and not the embeddings, and the model has one matrix for both"


def _vocabulary(sizes: Sizes, gpus: int) -> str | None:
    size = sizes.get(AXES["vocab"], 0)
    padded = -(-size // gpus) * gpus
    return f"it pads the vocabulary from {size:,} to {padded:,} entries in memory" if padded != size else None


TENSORRT_LLM = Engine(
    name="TensorRT-LLM",
    version="main before 1.3",
    repository="https://github.com/NVIDIA/TensorRT-LLM",
    families=FAMILIES,
    unsupported={family: f"its PyTorch backend has no {name}" for family, name in ABSENT.items()},
    unsupported_source=f"{MODELS}/_arch_index.py@065ff9e: MODEL_ARCH_TO_MODULE; docs/source/models/"
    "supported-models.md@00b6d5a",
    limits=(
        Limit(
            names("phi3"),
            heads_unlike_hidden,
            f"{MODELS}/modeling_phi3.py@bd6f83f: load_weights computes head_dim as hidden_size // num_heads",
        ),
        Limit(
            names("gpt_oss"),
            full_attention_out_of_step(2),
            f"{MODELS}/modeling_gpt_oss.py@050b6cb: AttentionBlock has the window in layers of even number",
        ),
        Limit(
            names("qwen2 qwen3 qwen3_moe mixtral phi3"),
            window_ignored,
            f"{MODELS}/modeling_{{qwen@047098b,qwen3@010bb95,qwen3_moe@03441af,mixtral@000a01d,phi3@bd6f83f}}.py "
            "hand attention no window",
        ),
        Limit(
            names("qwen3_moe"),
            mlp_in_place_of_experts,
            f"{MODELS}/modeling_qwen3_moe.py@03441af: Qwen3MoEDecoderLayer makes experts in every layer",
        ),
        Limit(
            names("nemotron mixtral"),
            _tied,
            f"{MODELS}/modeling_{{nemotron,mixtral,utils}}.py@000a01d: Embedding without a mapping; "
            "DecoderModelForCausalLM asserts one TP size for both",
            fewest_gpus=2,
        ),
    ),
    commands="trtllm-serve PATH                                                 # TensorRT-LLM",
    size_limits=(
        SizeLimit(
            FAMILIES,
            ("query",),
            is_divisible,
            MULTIPLE,
            "tensorrt_llm/_torch/attention/attention.py@930bd1a: Attention asserts num_heads % tp_size == 0",
        ),
        SizeLimit(
            FAMILIES,
            ("kv",),
            is_divisible_or_copied,
            MULTIPLE_OR_DIVISOR,
            f"{MODELS}/checkpoints/hf/weight_mapper.py@f59aed0: HfWeightMapper._duplicate_kv asserts it",
        ),
        SizeLimit(
            FAMILIES,
            ("head_dim",),
            lambda width, gpus: width in HEAD_SIZES,
            f"one of {', '.join(map(str, sorted(HEAD_SIZES)))}",
            "cpp/tensorrt_llm/kernels/decoderMaskedMultiheadAttention.cu@0ab9d17: MMHA_SUPPORTED_HEAD_SIZES; "
            "cpp/tensorrt_llm/common/attentionOp.cpp@00dbe28: AttentionOp::initialize checks it",
            "is not a head size of its attention",
        ),
        SizeLimit(
            FAMILIES - EXPERTS_OF_FFN,
            ("ffn", "shared_ffn"),
            is_divisible,
            MULTIPLE,
            f"{MODULES}/linear.py@00bbf71: Linear asserts it; {MODULES}/gated_mlp.py@01503f5",
        ),
        SizeLimit(
            EXPERTS_OF_FFN,
            ("ffn",),
            is_divisible,
            MULTIPLE,
            f"{MODULES}/fused_moe/interface.py@567239f: MoE divides intermediate_size and drops the remainder",
        ),
        SizeLimit(
            names("qwen3_moe nemotron_h"),
            ("expert_ffn",),
            is_divisible,
            MULTIPLE,
            f"{MODULES}/fused_moe/interface.py@567239f: MoE divides intermediate_size and drops the remainder",
        ),
        SizeLimit(
            names("nemotron_h"),
            ("mhead", "mgroup"),
            is_divisible,
            MULTIPLE,
            f"{MODULES}/mamba/mamba2_mixer.py@02140fd: Mamba2Mixer divides heads and groups and drops the remainder; "
            f"{MODELS}/checkpoints/hf/nemotron_h_weight_mapper.py@fbbc05d splits them in equal parts",
        ),
    ),
    notes=(
        Note(FAMILIES, _vocabulary, f"{MODULES}/embedding.py@06d0733: LMHead.padding_size"),
        Note(FAMILIES, copied_heads, f"{MODELS}/checkpoints/hf/weight_mapper.py@f59aed0: _duplicate_kv"),
    ),
    uses=(
        Use("serve", "trtllm-serve {path} --tp_size {gpus}"),
        Use("summarise CNN/DailyMail", "trtllm-eval --model {path} --tp_size {gpus} cnn_dailymail"),
        Use(
            "measure",
            "trtllm-bench --model {path} prepare-dataset --output requests.txt token-norm-dist --input-mean 1024 "
            "--input-stdev 0 --output-mean 128 --output-stdev 0 --num-requests 200\n"
            "trtllm-bench --model {path} --model_path {path} throughput --tp {gpus} --dataset requests.txt",
        ),
    ),
)
