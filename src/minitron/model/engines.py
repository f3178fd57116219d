"""What llama.cpp and vLLM can run of a model folder: facts read in their sources, each with its file.

An engine that reads a folder takes some sizes from the config, computes others, and holds some as constants. A student
has the teacher's family and other sizes, so that an engine may refuse it, or compute another function, although it runs
the teacher. Families whose sources were not read for an engine are not in its table: nothing is stated about them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from minitron.model.anatomy import AXES

Config = Mapping[str, Any]
"""The entries of a `config.json` as transformers writes it, defaults included."""

ORDERS = ("layer_types", "no_rope_layers")
"""The entries that list what each layer is, of which an engine may hold a constant order instead."""


@dataclass(frozen=True)
class Limit:
    """A condition without which an engine does not run a model, or runs another network."""

    families: frozenset[str]
    """The `model_type` of the models that it concerns."""
    lacks: Callable[[Config], str | None]
    """Returns what a config has that the engine cannot express, or None."""
    source: str
    """The files of the engine's repository in which this was read."""
    is_overcome: bool = False
    """Whether a file that `minitron export` writes is free of it: by metadata that the engine's own converter does not
    write, by another name of an identical network, or by a context within the window."""


@dataclass(frozen=True)
class Engine:
    """An inference engine, as it was at the version that was read."""

    name: str
    version: str
    repository: str
    families: frozenset[str]
    """The `model_type` of the models that it runs, within its limits."""
    unsupported: Mapping[str, str]
    """Families that it does not run at all, with the reason."""
    limits: tuple[Limit, ...]
    commands: str
    """How a model folder PATH is run."""

    @property
    def title(self) -> str:
        """Its name and the version that was read."""
        return f"{self.name} ({self.version})"

    def obstacles(self, config: Config) -> dict[str, str]:
        """Return why the engine does not run a model, or runs another function, each with the source of the fact.

        It is empty where the engine runs the model as transformers does, and where nothing is known about the family.
        """
        family = str(config["model_type"])
        if family in self.unsupported:
            return {self.version: self.unsupported[family]}
        limits = (limit for limit in self.limits if family in limit.families)
        return {limit.source: reason for limit in limits if (reason := limit.lacks(config))}

    def runs(self, config: Config) -> bool:
        """Return whether the engine is known to run a model as transformers does."""
        return config["model_type"] in self.families and not self.obstacles(config)


def _heads_unlike_hidden(config: Config) -> str | None:
    heads, width, hidden = (config.get(AXES[axis]) for axis in ("query", "head_dim", "hidden"))
    if not heads or not width or heads * width == hidden:
        return None
    return f"it takes {AXES['hidden']} for {AXES['query']} × {AXES['head_dim']}, and {hidden} is not {heads} × {width}"


def _kinds_out_of_step(config: Config, period: int, entry: str, every: Any, what: str) -> str | None:
    kinds = config.get(entry)
    if not kinds or [kind == every for kind in kinds] == [(i + 1) % period == 0 for i in range(len(kinds))]:
        return None
    places = ", ".join(str(i + 1) for i, kind in enumerate(kinds) if kind == every)
    return f"it has {what} in every {period}th layer, the model in layers {places or 'none'} of {len(kinds)}"


def _window_ignored(config: Config) -> str | None:
    window, longest = config.get("sliding_window"), config.get(AXES["position"], 0)
    if (
        not window
        or window >= longest
        or "sliding_attention" not in (config.get("layer_types") or ["sliding_attention"])
    ):
        return None
    return f"it has no sliding window for this family, the model one of {window} tokens"


def _scale_by_depth(config: Config, depth: int) -> str | None:
    layers, heads = config[AXES["layer"]], config[AXES["query"]]
    scale = config["hidden_size"] // heads if layers == depth else config["head_dim"]
    if config.get("query_pre_attn_scalar") in {None, scale}:
        return None
    return (
        f"with {layers} layers it divides attention scores by the root of {scale}, the model by that of "
        f"{config['query_pre_attn_scalar']}"
    )


def _entry_unlike(config: Config, entry: str, value: Any, what: str) -> str | None:
    return None if config.get(entry, value) == value else f"{what}, and {entry} is {config[entry]}"


def _dense_layers(config: Config) -> str | None:
    is_listed = "mlp" in (config.get("layers_block_type") or [])
    return "its converter does not read MLP layers from layers_block_type" if is_listed else None


def _mlp_in_place_of_experts(config: Config) -> str | None:
    has_mlp = config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1
    return "it expects experts in every layer, and the model has layers with an MLP" if has_mlp else None


def _mixed_windows(config: Config) -> str | None:
    is_mixed = len(set(config.get("layer_types") or [])) > 1
    return "it refuses models in which some layers have a sliding window and others have none" if is_mixed else None


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_full = partial(_kinds_out_of_step, entry="layer_types", every="full_attention", what="full attention")

LLAMA_CPP = Engine(
    name="llama.cpp",
    version="commit 0c1e57098",
    repository="https://github.com/ggml-org/llama.cpp",
    families=_names(
        "llama mistral mixtral ministral3 nemotron qwen2 qwen3 qwen3_moe gemma2 gemma3_text phi3 olmo2 smollm3 granite "
        "gpt2 gpt_neox gpt_oss mamba2 nemotron_h bamba falcon_h1"
    ),
    unsupported={"opt": "its converter does not know OPTForCausalLM"},
    limits=(
        Limit(
            _names("qwen2 phi3"),
            _heads_unlike_hidden,
            "src/models/{qwen2,phi3}.cpp: load_arch_tensors makes attn_q with n_embd rows",
            is_overcome=True,
        ),
        Limit(
            _names("nemotron olmo2"),
            _heads_unlike_hidden,
            "src/models/{nemotron,olmo2}.cpp: load_arch_tensors makes attn_q with n_embd rows",
        ),
        Limit(
            _names("granite bamba"),
            _heads_unlike_hidden,
            "conversion/granite.py: GraniteModel.set_gguf_parameters drops head_dim",
            is_overcome=True,
        ),
        Limit(
            _names("gemma2 gpt_oss"),
            partial(_full, period=2),
            "src/models/{gemma2,openai-moe}.cpp: load_swa_pattern(ml, 2); the converters write no pattern",
            is_overcome=True,
        ),
        Limit(
            _names("gemma3_text"),
            partial(_full, period=6),
            "src/models/gemma3.cpp: load_swa_pattern(ml, 6); conversion/gemma.py writes no pattern",
            is_overcome=True,
        ),
        Limit(
            _names("smollm3"),
            partial(_kinds_out_of_step, period=4, entry="no_rope_layers", every=0, what="no rotary embedding"),
            "src/models/smollm3.cpp: n_no_rope_layer_step = 4; conversion/llama.py writes no pattern",
        ),
        Limit(
            _names("gemma2"),
            partial(_scale_by_depth, depth=46),
            "src/models/gemma2.cpp: f_attention_scale by the type, which is the number of layers",
        ),
        Limit(
            _names("gemma3_text"),
            partial(_scale_by_depth, depth=62),
            "src/models/gemma3.cpp: f_attention_scale by the type, which is the number of layers",
        ),
        Limit(
            _names("mistral mixtral ministral3 qwen2 qwen3 qwen3_moe phi3"),
            _window_ignored,
            "src/models/{llama,mistral3,qwen2,qwen3,qwen3moe}.cpp read no sliding window; phi3.cpp switches it off",
            is_overcome=True,
        ),
        Limit(
            _names("qwen3_moe"),
            _mlp_in_place_of_experts,
            "src/models/qwen3moe.cpp: load_arch_tensors makes experts in every layer",
        ),
        Limit(
            _names("bamba"),
            partial(_entry_unlike, entry="mamba_expand", value=2, what="it expects mixers of twice the hidden size"),
            "src/models/granite-hybrid.cpp: GGML_ASSERT(2 * n_embd == d_inner)",
        ),
        Limit(
            _names("nemotron_h"),
            _dense_layers,
            "conversion/nemotron.py: NemotronHModel._MLP_LAYER_TYPES holds moe alone",
            is_overcome=True,
        ),
    ),
    commands="""python convert_hf_to_gguf.py PATH --outfile student.gguf          # llama.cpp: convert, then
llama-cli -m student.gguf""",
)

VLLM = Engine(
    name="vLLM",
    version="0.33.0",
    repository="https://github.com/vllm-project/vllm",
    families=_names(
        "llama mistral mixtral ministral3 nemotron qwen2 qwen3 qwen3_moe gemma2 gemma3_text phi3 olmo2 smollm3 granite "
        "gpt2 gpt_neox opt gpt_oss mamba2 nemotron_h falcon_h1"
    ),
    unsupported={"bamba": "it has had no BambaForCausalLM since version 0.23.0"},
    limits=(
        Limit(
            _names("qwen2"),
            _heads_unlike_hidden,
            "vllm/model_executor/models/qwen2.py: Qwen2Attention computes head_dim as hidden_size // num_heads",
        ),
        Limit(
            _names("qwen2"),
            _mixed_windows,
            "vllm/model_executor/models/qwen2.py: Qwen2Model asserts max_window_layers == num_hidden_layers",
        ),
        Limit(
            _names("gpt_oss"),
            partial(_full, period=2),
            "vllm/model_executor/models/gpt_oss.py: OAIAttention has the window in layers of even number",
        ),
    ),
    commands="vllm serve PATH                                                   # vLLM",
)

ENGINES = (VLLM, LLAMA_CPP)


def added_obstacles(teacher: Config, student: Config) -> dict[str, str]:
    """Return, by the name of each engine that a cut takes away from a teacher's models, a line with the reasons."""
    lines = {}
    for engine in ENGINES:
        before = engine.obstacles(teacher)
        new = [reason for source, reason in engine.obstacles(student).items() if source not in before]
        if new:
            lines[engine.name] = f"{engine.title} does not run such a student as transformers does: {'; '.join(new)}"
    return lines


def order_obstacles(teacher: Config) -> dict[str, str]:
    """Return, by the name of each engine that takes the order of a teacher's layers for a constant, a line about it.

    Which layers are cut is known once they are scored; those that stay may have the order that the engine expects.
    """
    lists = {name: entries for name in ORDERS if isinstance(entries := teacher.get(name), list)}
    shifted = {**teacher, **{name: entries[1:] for name, entries in lists.items()}}
    taken = {engine.name: engine.title for engine in ENGINES}
    return {
        name: f"{taken[name]} takes the order of this family's layers for a constant: it runs a student with fewer "
        "layers as transformers does only where those that stay are in that order"
        for name in added_obstacles(teacher, shifted)
    }
