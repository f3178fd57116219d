"""llama.cpp: what it runs of a model that a GGUF file holds; each fact with the file in which it was read."""

from functools import partial

from minitron.model.anatomy import AXES
from minitron.model.engines.engine import Config, Engine, Limit, names
from minitron.model.engines.limits import (
    entry_unlike,
    full_attention_out_of_step,
    heads_unlike_hidden,
    kinds_out_of_step,
    mlp_in_place_of_experts,
    window_ignored,
)


def _scale_by_depth(config: Config, depth: int) -> str | None:
    layers, heads = config[AXES["layer"]], config[AXES["query"]]
    scale = config["hidden_size"] // heads if layers == depth else config["head_dim"]
    if config.get("query_pre_attn_scalar") in {None, scale}:
        return None
    return (
        f"with {layers} layers it divides attention scores by the root of {scale}, the model by that of "
        f"{config['query_pre_attn_scalar']}"
    )


def _dense_layers(config: Config) -> str | None:
    is_listed = "mlp" in (config.get("layers_block_type") or [])
    return "its converter does not read MLP layers from layers_block_type" if is_listed else None


LLAMA_CPP = Engine(
    name="llama.cpp",
    version="commit 0c1e57098",
    repository="https://github.com/ggml-org/llama.cpp",
    families=names(
        "llama mistral mixtral ministral3 nemotron qwen2 qwen3 qwen3_moe gemma2 gemma3_text phi3 olmo2 smollm3 granite "
        "gpt2 gpt_neox gpt_oss mamba2 nemotron_h bamba falcon_h1"
    ),
    unsupported={"opt": "its converter does not know OPTForCausalLM"},
    limits=(
        Limit(
            names("qwen2 phi3"),
            heads_unlike_hidden,
            "src/models/{qwen2,phi3}.cpp: load_arch_tensors makes attn_q with n_embd rows",
            is_overcome=True,
        ),
        Limit(
            names("nemotron olmo2"),
            heads_unlike_hidden,
            "src/models/{nemotron,olmo2}.cpp: load_arch_tensors makes attn_q with n_embd rows",
        ),
        Limit(
            names("granite bamba"),
            heads_unlike_hidden,
            "conversion/granite.py: GraniteModel.set_gguf_parameters drops head_dim",
            is_overcome=True,
        ),
        Limit(
            names("gemma2 gpt_oss"),
            full_attention_out_of_step(2),
            "src/models/{gemma2,openai-moe}.cpp: load_swa_pattern(ml, 2); the converters write no pattern",
            is_overcome=True,
        ),
        Limit(
            names("gemma3_text"),
            full_attention_out_of_step(6),
            "src/models/gemma3.cpp: load_swa_pattern(ml, 6); conversion/gemma.py writes no pattern",
            is_overcome=True,
        ),
        Limit(
            names("smollm3"),
            partial(kinds_out_of_step, period=4, entry="no_rope_layers", every=0, what="no rotary embedding"),
            "src/models/smollm3.cpp: n_no_rope_layer_step = 4; conversion/llama.py writes no pattern",
        ),
        Limit(
            names("gemma2"),
            partial(_scale_by_depth, depth=46),
            "src/models/gemma2.cpp: f_attention_scale by the type, which is the number of layers",
        ),
        Limit(
            names("gemma3_text"),
            partial(_scale_by_depth, depth=62),
            "src/models/gemma3.cpp: f_attention_scale by the type, which is the number of layers",
        ),
        Limit(
            names("mistral mixtral ministral3 qwen2 qwen3 qwen3_moe phi3"),
            window_ignored,
            "src/models/{llama,mistral3,qwen2,qwen3,qwen3moe}.cpp read no sliding window; phi3.cpp switches it off",
            is_overcome=True,
        ),
        Limit(
            names("qwen3_moe"),
            mlp_in_place_of_experts,
            "src/models/qwen3moe.cpp: load_arch_tensors makes experts in every layer",
        ),
        Limit(
            names("bamba"),
            partial(entry_unlike, entry="mamba_expand", value=2, what="it expects mixers of twice the hidden size"),
            "src/models/granite-hybrid.cpp: GGML_ASSERT(2 * n_embd == d_inner)",
        ),
        Limit(
            names("nemotron_h"),
            _dense_layers,
            "conversion/nemotron.py: NemotronHModel._MLP_LAYER_TYPES holds moe alone",
            is_overcome=True,
        ),
    ),
    commands="""python convert_hf_to_gguf.py PATH --outfile student.gguf          # llama.cpp: convert, then
llama-cli -m student.gguf""",
)
