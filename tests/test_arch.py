"""Property 2: exact counts, against models on the meta device and against published models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from minitron.errors import UserError
from minitron.model.anatomy import AXES
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint
from minitron.model.config import read_config

# (sizes that differ from the config class's defaults, parameters, of these not in embeddings)
PUBLISHED: dict[str, tuple[dict[str, Any], int, int]] = {
    "Llama-3.1-8B": (
        {"model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
         "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False},
        8_030_261_248, 6_979_588_096,
    ),
    "SmolLM2-135M": (
        {"model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
         "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
        134_515_008, 106_203_456,
    ),
    "Mistral-NeMo-12B": (
        {"model_type": "mistral", "vocab_size": 131072, "hidden_size": 5120, "intermediate_size": 14336,
         "head_dim": 128, "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8,
         "tie_word_embeddings": False},
        12_247_782_400, 10_905_605_120,
    ),
    "MN-Minitron-8B": (
        {"model_type": "mistral", "vocab_size": 131072, "hidden_size": 4096, "intermediate_size": 11520,
         "head_dim": 128, "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8,
         "tie_word_embeddings": False},
        8_414_105_600, 7_340_363_776,
    ),
    "Qwen2.5-0.5B": (
        {"model_type": "qwen2", "vocab_size": 151936, "hidden_size": 896, "intermediate_size": 4864,
         "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2, "tie_word_embeddings": True},
        494_032_768, 357_898_112,
    ),
    "Nemotron-4-15B": (
        {"model_type": "nemotron", "vocab_size": 256000, "hidden_size": 6144, "intermediate_size": 24576,
         "head_dim": 128, "num_hidden_layers": 32, "num_attention_heads": 48, "num_key_value_heads": 8,
         "tie_word_embeddings": False},
        15_628_775_424, 12_483_047_424,
    ),
    "Minitron-4B": (
        {"model_type": "nemotron", "vocab_size": 256000, "hidden_size": 3072, "intermediate_size": 9216,
         "head_dim": 128, "num_hidden_layers": 32, "num_attention_heads": 24, "num_key_value_heads": 8,
         "tie_word_embeddings": False},
        4_190_509_056, 2_617_645_056,
    ),
    "Gemma-3-270m": (
        {"model_type": "gemma3_text", "vocab_size": 262144, "hidden_size": 640, "intermediate_size": 2048,
         "head_dim": 256, "num_hidden_layers": 18, "num_attention_heads": 4, "num_key_value_heads": 1,
         "sliding_window": 512, "query_pre_attn_scalar": 256, "tie_word_embeddings": True},
        268_098_176, 100_326_016,
    ),
    "Nemotron-H-8B": (
        {"model_type": "nemotron_h", "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
         "vocab_size": 131072, "hidden_size": 4096, "intermediate_size": 21504, "mamba_num_heads": 128,
         "mamba_head_dim": 64, "n_groups": 8, "ssm_state_size": 128, "num_attention_heads": 32,
         "num_key_value_heads": 8, "head_dim": 128},
        8_100_852_736, 7_027_110_912,
    ),
    "Nemotron-Nano-12B-v2": (
        {"model_type": "nemotron_h", "hidden_size": 5120, "intermediate_size": 20480, "mamba_num_heads": 128,
         "mamba_head_dim": 80, "n_groups": 8, "ssm_state_size": 128, "num_attention_heads": 40,
         "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 131072,
         "hybrid_override_pattern": "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-"},
        12_310_001_152, 10_967_823_872,
    ),
    "Mixtral-8x7B": (
        {"model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
         "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8},
        46_702_792_704, 46_440_648_704,
    ),
    "Qwen3-8B": (
        {"model_type": "qwen3", "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "head_dim": 128,
         "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False},
        8_190_735_360, 6_946_075_648,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name: str, tmp_path: Path) -> None:
    config, num_parameters, num_non_embedding = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(config))
    arch = Arch.from_config(read_config(tmp_path).to_dict())
    assert arch.num_parameters == num_parameters
    assert arch.num_non_embedding_parameters == num_non_embedding
    assert arch.resized(num_hidden_layers=arch.sizes["num_hidden_layers"] - 1).num_parameters < num_parameters


def test_count_equals_the_model_on_the_meta_device(teacher: Checkpoint) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(teacher.config)
    assert teacher.arch.num_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_sizes_are_checked(teacher: Checkpoint) -> None:
    arch = teacher.arch
    with pytest.raises(UserError, match="did you mean 'hidden_size'"):
        arch.resized(hiden_size=32)
    with pytest.raises(UserError, match="at least 1"):
        arch.resized(hidden_size=0)
    arch.require_prunable_to(arch.resized(vocab_size=100))
    for name in {"head_dim", "ssm_state_size"} & arch.sizes.keys():
        if arch.family.product is None:
            with pytest.raises(UserError, match=f"{name} cannot be pruned"):
                arch.require_prunable_to(arch.resized(**{name: arch.sizes[name] // 2}))
    if "intermediate_size" in arch.sizes:
        with pytest.raises(UserError, match="above the teacher's 64"):
            arch.require_prunable_to(arch.resized(intermediate_size=72))
    for axis in {"query", "mhead"} & set(arch.axes):
        with pytest.raises(UserError, match=r"is not (a multiple of|48)"):
            arch.resized(**{AXES[axis]: 5})
    if "expert" in arch.axes:
        with pytest.raises(UserError, match="num_local_experts 1 is below num_experts_per_tok 2"):
            arch.resized(num_local_experts=1)
        with pytest.raises(UserError, match="20 must be a multiple of 8, which experts need"):
            arch.resized(**{AXES["expert_ffn" if "expert_ffn" in arch.axes else "ffn"]: 20})
    if "kv" in arch.prunable_axes:
        with pytest.raises(UserError, match="6 a group, above the teacher's 2"):
            arch.require_prunable_to(arch.resized(num_key_value_heads=1))
    elif "num_key_value_heads" in arch.sizes:
        with pytest.raises(UserError, match="num_key_value_heads cannot be pruned"):
            arch.require_prunable_to(arch.resized(num_key_value_heads=1))


def test_depth_is_shared_out_to_the_kinds_of_layers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Nemotron-Nano-12B-v2"][0]))
    arch = Arch.from_config(read_config(tmp_path).to_dict())
    assert arch.layer_counts == {"attention": 6, "mamba": 28, "mlp": 28}
    assert arch.resized(num_hidden_layers=31).layer_counts == {"attention": 3, "mamba": 14, "mlp": 14}
    assert arch.resized(num_hidden_layers=3).layer_counts == {"attention": 1, "mamba": 1, "mlp": 1}
    assert arch.resized(num_hidden_layers=62).layers == arch.layers
    for depth in range(3, 63):
        counts = arch.resized(num_hidden_layers=depth).layer_counts
        assert sum(counts.values()) == depth
        assert all(
            abs(counts[kind] - depth * all_ / 62) < 1 or counts[kind] == 1 for kind, all_ in arch.layer_counts.items()
        )
    by_kind = arch.resized(num_mamba_layers=27, num_mlp_layers=25, num_attention_layers=4)
    assert by_kind.sizes["num_hidden_layers"] == 56
    with pytest.raises(UserError, match="one layer of each kind"):
        arch.resized(num_hidden_layers=2)
    with pytest.raises(UserError, match="num_hidden_layers 56 is not the sum of"):
        arch.resized(num_hidden_layers=56, num_mamba_layers=28, num_mlp_layers=25, num_attention_layers=4)
    # What is not given is split in proportion: 52 layers among 28 and 28.
    some = arch.resized(num_hidden_layers=56, num_attention_layers=4)
    assert some.layer_counts == {"attention": 4, "mamba": 26, "mlp": 26}
    assert arch.resized(num_hidden_layers=56).layer_counts["attention"] == 6
    with pytest.raises(UserError, match="must be from 6, one layer of each kind beside num_attention_layers 4, to 60"):
        arch.resized(num_hidden_layers=62, num_attention_layers=4)
