"""Sizes of the teachers of released models, as their configs state them."""

NEMOTRON_15B = {
    "model_type": "nemotron", "vocab_size": 256000, "hidden_size": 6144, "intermediate_size": 24576, "head_dim": 128,
    "num_hidden_layers": 32, "num_attention_heads": 48, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip
LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip
NEMO_12B = {
    "model_type": "mistral", "vocab_size": 131072, "hidden_size": 5120, "intermediate_size": 14336, "head_dim": 128,
    "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": False,
}  # fmt: skip
NEMOTRON_H = {
    "model_type": "nemotron_h", "vocab_size": 131072, "n_groups": 8, "ssm_state_size": 128, "conv_kernel": 4,
    "num_key_value_heads": 8, "head_dim": 128, "mamba_num_heads": 128,
}  # fmt: skip
NEMOTRON_H_8B = {
    **NEMOTRON_H, "hidden_size": 4096, "intermediate_size": 21504, "mamba_head_dim": 64, "num_attention_heads": 32,
    "hybrid_override_pattern": "M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M*-M-M-M-M-M-",
}  # fmt: skip
NANO_12B = {
    **NEMOTRON_H, "hidden_size": 5120, "intermediate_size": 20480, "mamba_head_dim": 80, "num_attention_heads": 40,
    "hybrid_override_pattern": "M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
}  # fmt: skip
