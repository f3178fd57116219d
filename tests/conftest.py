"""Tiny random models of every family, as the Hugging Face folders that the true pipeline reads."""

import atexit
import json
import os
import random
import shutil
import tempfile
from collections.abc import Callable, Collection
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from minitron import cli
from minitron.evaluation import generation
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.runtime import configure_backends
from tests.small_tokenizers import LINES, tokenizer_of

# Several threads would cost time on tiny tensors, here and in the processes that tests start.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
# As the command line does, so that all tests and the processes that they start compute to equal bits.
configure_backends()
# The tests use no network.
os.environ["HF_HUB_OFFLINE"] = "1"
# Long continuations of tiny models would take a quarter of a run's time.
generation.CONTINUATION_TOKENS = 4

SIZES = {
    "vocab_size": 258,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "max_position_embeddings": 256,
}

MAMBA = {
    "mamba_num_heads": 6,
    "mamba_head_dim": 8,
    "n_groups": 3,
    "ssm_state_size": 16,
    "chunk_size": 16,
    "eos_token_id": 257,
}
HYBRID = {"mamba_n_groups": 3, "mamba_d_state": 16, "mamba_chunk_size": 16, "eos_token_id": 257}
EXPERTS = {
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 40,
}

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"tie_word_embeddings": False}),
    "llama-tied": ("llama", {"tie_word_embeddings": True}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "mistral": ("mistral", {"sliding_window": 16, "tie_word_embeddings": False}),
    "qwen2": ("qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
    "qwen3-tied": ("qwen3", {"tie_word_embeddings": True}),
    "ministral3": (
        "ministral3",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 2.0,
                "original_max_position_embeddings": 32,
                "llama_4_scaling_beta": 0.1,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            }
        },
    ),
    "nemotron": ("nemotron", {"attention_bias": True, "mlp_bias": True}),
    "gemma2": ("gemma2", {"sliding_window": 16, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0}),
    "gemma3": (
        "gemma3_text",
        {"sliding_window": 16, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "phi3": ("phi3", {"pad_token_id": 0, "eos_token_id": 257, "sliding_window": 16}),
    "olmo2": ("olmo2", {"attention_bias": True, "eos_token_id": 257}),
    "smollm3": (
        "smollm3",
        {"no_rope_layers": [1, 1, 0, 1], "pad_token_id": 0, "bos_token_id": 256, "eos_token_id": 257},
    ),
    "granite": ("granite", {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 3.0}),
    "gpt2": (
        "gpt2",
        {
            "n_embd": 48,
            "n_inner": 64,
            "n_layer": 4,
            "n_head": 6,
            "n_positions": 256,
            "bos_token_id": 256,
            "eos_token_id": 257,
        },
    ),
    "gpt_neox": ("gpt_neox", {"eos_token_id": 257, "bos_token_id": 256}),
    "gpt_neox-sequential": ("gpt_neox", {"eos_token_id": 257, "use_parallel_residual": False, "attention_bias": False}),
    "opt": ("opt", {"ffn_dim": 64, "word_embed_proj_dim": 48, "pad_token_id": 1}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}),
    "qwen3_moe": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "mlp_only_layers": [1, 2]},
    ),
    "qwen3_moe-period": (
        "qwen3_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "decoder_sparse_step": 2,
            "norm_topk_prob": True,
            "attention_bias": True,
        },
    ),
    "gpt_oss": ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}),
    "mamba2": (
        "mamba2",
        {"num_heads": 12, "n_groups": 2, "state_size": 16, "chunk_size": 16, "use_bias": True, "eos_token_id": 257},
    ),
    "nemotron_h": (
        "nemotron_h",
        {**MAMBA, **EXPERTS, "hybrid_override_pattern": "M-*EM-*E", "use_bias": True},
    ),
    "nemotron_h-latent": (
        "nemotron_h",
        {**MAMBA, **EXPERTS, "hybrid_override_pattern": "ME*MEM*E", "moe_latent_size": 16, "mlp_bias": True},
    ),
    "bamba": (
        "bamba",
        {"attn_layer_indices": [1, 2], "mamba_n_heads": 12, "mamba_d_head": 8, **HYBRID, "mamba_proj_bias": True},
    ),
    "falcon_h1": (
        "falcon_h1",
        {
            "mamba_d_ssm": 48,
            "mamba_n_heads": 6,
            **HYBRID,
            "mamba_rms_norm": True,
            "lm_head_multiplier": 0.5,
            "ssm_multipliers": [0.5, 1.5, 0.7, 1.2, 0.9],
            "ssm_in_multiplier": 1.3,
            "key_multiplier": 0.6,
        },
    ),
    "falcon_h1-biases": (
        "falcon_h1",
        {
            "mamba_d_ssm": 48,
            "mamba_n_heads": 6,
            **HYBRID,
            "attention_bias": True,
            "mlp_bias": True,
            "mamba_proj_bias": True,
            "projectors_bias": True,
        },
    ),
    "qwen3-bias": ("qwen3", {"attention_bias": True, "tie_word_embeddings": False}),
}
"""Every family, and within it every row that a config can switch on or off."""


MECHANISMS = (
    "llama-tied",  # a gated MLP, RMSNorm, grouped queries, tied embeddings
    "gpt2",  # a plain MLP, LayerNorm, transposed matrices with queries, keys and values in one, learned positions
    "gpt_neox",  # queries, keys and values in one matrix head by head, parallel blocks, an output matrix of its own
    "gemma2",  # norms after its blocks too, with an offset; soft-capped logits
    "phi3",  # the MLP's gate in one matrix with what it gates
    "gpt_oss",  # experts with biases in one tensor, sinks
    "qwen3_moe",  # experts in some of the layers, norms of queries and keys
    "mamba2",  # Mamba alone
    "nemotron_h",  # layers of one kind each: Mamba, attention, a plain MLP, experts beside a shared one
    "falcon_h1",  # attention and Mamba side by side, multipliers
)
"""A variant for each mechanism that families share: enough for what is built on their tables."""


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, then `<s>` and `</s>`, which it does not add by itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate([*alphabet, "<s>", "</s>"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def make_config(variant: str, **changes: Any) -> Any:
    """Return the config of a variant."""
    model_type, flags = VARIANTS[variant]
    sizes = {"vocab_size": SIZES["vocab_size"]} if model_type == "gpt2" else SIZES
    return AutoConfig.for_model(model_type, **{**sizes, **flags, **changes})


def make_model(folder: Path, variant: str, seed: int = 0, **changes: Any) -> Path:
    """Save a random model of a variant, its biases and norms random too, with a byte tokenizer.

    It is a copy of the model that the first call with the same arguments has made.
    """
    torch.manual_seed(seed)  # of whatever follows, too
    shutil.copytree(_made(variant, seed, json.dumps(changes, sort_keys=True)), folder, dirs_exist_ok=True)
    return folder


@cache
def _made(variant: str, seed: int, changes: str) -> Path:
    """Return the folder of a model, in which nothing may be changed."""
    folder = Path(tempfile.mkdtemp(prefix=f"minitron-test-{variant}-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _save_random_model(folder, make_config(variant, **json.loads(changes)))
    return folder


def _save_random_model(folder: Path, config: Any) -> None:
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or name.endswith("bias"):
                parameter.copy_(torch.randn_like(parameter) * 0.2 + (1.0 if "norm" in name else 0.0))
            else:
                parameter.mul_(4.0)  # away from the near-uniform outputs of a fresh initialisation
        for name, buffer in model.named_buffers():
            if name.endswith("bias"):
                buffer.copy_(torch.randn_like(buffer) * 0.2)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)


@cache
def variant_arch(variant: str) -> Arch:
    """Return the architecture of a variant without making its model."""
    return Arch.from_config(make_config(variant).to_dict())


@pytest.fixture(scope="session", autouse=True)
def _caches(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep what tests cache out of the user's home, and what the user has cached out of the tests."""
    for name in ("HF_DATASETS_CACHE", "MINITRON_CACHE"):
        os.environ[name] = str(tmp_path_factory.mktemp("cache"))


def variants_that(are: Callable[[Arch], bool]) -> list[str]:
    """Return the variants whose architecture passes a check: values of the parameter `teacher`."""
    return [variant for variant in VARIANTS if are(variant_arch(variant))]


def variants_by(choices: Collection[str], have: Callable[[Arch, str], bool]) -> list[tuple[str, str]]:
    """Return the pairs of a variant and a choice that its architecture has: values of `teacher` and of the choice."""
    return [(variant, choice) for variant in VARIANTS for choice in choices if have(variant_arch(variant), choice)]


@pytest.fixture(scope="session")
def teachers() -> Callable[[str], Checkpoint]:
    """Return the tiny model of a variant, made once for all tests, which only read it."""
    return cache(lambda variant: open_checkpoint(_made(variant, 0, "{}")))


@pytest.fixture(params=VARIANTS)
def teacher(request: pytest.FixtureRequest, teachers: Callable[[str], Checkpoint]) -> Checkpoint:
    """Return a tiny model of each variant in turn; `parametrize` with `indirect` chooses the variants."""
    return teachers(request.param)


@pytest.fixture
def model_folder(tmp_path: Path) -> Callable[..., Path]:
    """Makes tiny models in the test's own folder."""
    return lambda variant="llama-tied", **changes: make_model(tmp_path / f"model-{variant}", variant, **changes)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """Some 9 kB of pseudo-English."""
    rng = random.Random(0)
    words = ["".join(rng.choice("etaoinshrdlu") for _ in range(rng.randint(2, 8))) for _ in range(200)]
    lines = [" ".join(rng.choice(words) for _ in range(12)) + "." for _ in range(150)]
    path = tmp_path / "text.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def wordy(tmp_path: Path) -> Path:
    """A tiny model whose tokenizer has merges, a chat template and an added token."""
    tokenizer = tokenizer_of("byte_level")
    folder = make_model(tmp_path / "wordy", "llama-tied", vocab_size=960)
    tokenizer.save_pretrained(folder)
    return folder


CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def chatty(tmp_path: Path) -> Path:
    """A tiny model that answers chats, of one token a byte."""
    folder = make_model(tmp_path / "chatty", "llama-tied")
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    """Text of which that tokenizer has learnt."""
    path = tmp_path / "lines.txt"
    path.write_text(LINES[:200_000], encoding="utf-8")
    return path


INPUT_IDS = torch.randint(0, SIZES["vocab_size"], (2, 40), generator=torch.Generator().manual_seed(1))
"""Token ids longer than the variants' sliding windows."""


@pytest.fixture
def input_ids() -> torch.Tensor:
    return INPUT_IDS.clone()


Verb = Callable[..., dict[str, Any]]


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Verb:
    """Run a verb with --json and give the one object that it prints on standard output."""

    def run(*arguments: str | Path) -> dict[str, Any]:
        monkeypatch.setattr("sys.argv", ["minitron", *map(str, arguments), "--json"])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        assert not stopped.value.code, captured.err
        return json.loads(captured.out)  # type: ignore[no-any-return]

    return run
