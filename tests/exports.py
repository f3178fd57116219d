"""Tiny models that llama.cpp runs, one or more of each family, with a tokenizer that has merges."""

import shutil
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from tests.conftest import make_model

VOCABULARY = 320
TEXT = (
    "Merges are learnt from words that are repeated here and there: the letters of a word that often stand beside "
    "each other become a token, then these tokens are merged further, until there are as many tokens as were asked for."
)
TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<s>system\nBe brief.</s>\n{% endif %}"
    "{% for message in messages %}<s>{{ message['role'] }}\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)
WIDE = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
"""Heads that together are wider than the residual stream."""
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [1.5, 2.0, 2.5, 3.0],
    "original_max_position_embeddings": 256,
    "partial_rotary_factor": 1.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}

EXPORTED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama-tied", {}),
    "llama-biases": ("llama-biases", {}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-yarn": ("llama", {"rope_parameters": YARN}),
    "llama-linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "mistral-wide": ("mistral", WIDE),
    "ministral3": ("ministral3", {}),
    "mixtral": ("mixtral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2-wide": ("qwen2", WIDE),
    "qwen3-tied": ("qwen3-tied", {}),
    "qwen3_moe": ("qwen3_moe", {"mlp_only_layers": [], "norm_topk_prob": True}),
    "nemotron": ("nemotron", {}),
    "gemma2": ("gemma2", {}),
    "gemma2-odd": ("gemma2", {"layer_types": ["full_attention", *["sliding_attention"] * 2, "full_attention"]}),
    "gemma3": ("gemma3", {}),
    "phi3": ("phi3", {}),
    "phi3-wide": ("phi3", WIDE),
    "phi3-longrope": (
        "phi3",
        {"rope_parameters": LONGROPE, "original_max_position_embeddings": 256, "max_position_embeddings": 512},
    ),
    "olmo2": ("olmo2", {"attention_bias": False}),
    "olmo2-tied": ("olmo2", {"attention_bias": False, "tie_word_embeddings": True}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 1, 1, 0]}),
    "granite": ("granite", {}),
    "granite-wide": ("granite", {**WIDE, "attention_multiplier": 0.2}),
    "gpt2": ("gpt2", {}),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False}),
    "gpt_oss": ("gpt_oss", {}),
    "mamba2": ("mamba2", {"use_bias": False}),
    "nemotron_h": ("nemotron_h", {"hybrid_override_pattern": "M-*M-*M-", "use_bias": False}),
    "nemotron_h-experts": (
        "nemotron_h",
        {"hybrid_override_pattern": "ME*MEM*E", "use_bias": False, "routed_scaling_factor": 2.5},
    ),
    "nemotron_h-latent": ("nemotron_h-latent", {"mlp_bias": False, "use_bias": False}),
    "bamba": ("bamba", {"mamba_proj_bias": False}),
    "falcon_h1": (
        "falcon_h1",
        {
            "mamba_rms_norm": False,
            "embedding_multiplier": 2.0,
            "mlp_multipliers": [0.8, 1.2],
            "attention_in_multiplier": 0.9,
            "attention_out_multiplier": 1.1,
            "ssm_out_multiplier": 0.7,
        },
    ),
    "falcon_h1-norm": ("falcon_h1", {"mamba_norm_before_gate": False}),
}  # fmt: skip
"""Models by name: a variant of `conftest`, and the config entries that differ from it."""


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Return a BPE tokenizer of bytes with some merges, special tokens and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([TEXT] * 9, trainer)
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in ("<s>", "</s>")])
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = TEMPLATE
    return fast


def make_exported(folder: Path, name: str) -> Path:
    """Make one of the models of `EXPORTED`."""
    variant, changes = EXPORTED[name]
    return make_served(folder, variant, **changes)


def make_served(folder: Path, variant: str, **changes: Any) -> Path:
    """Make a model of a variant with a tokenizer that has fewer tokens than the model embeddings."""
    make_model(folder, variant, vocab_size=VOCABULARY, **changes)
    for path in folder.glob("*token*"):
        path.unlink()
    merging_tokenizer().save_pretrained(folder)
    return folder


def copy_of(folder: Path, target: Path) -> Path:
    """Copy a model folder, to change it."""
    shutil.copytree(folder, target)
    return target
