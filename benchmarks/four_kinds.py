"""Trains a small Llama, GPT-NeoX, Qwen3-MoE and Nemotron-H from scratch, then compresses each.

    python benchmarks/four_kinds.py FOLDER [--tokens 2M] [--distill-tokens 200k] [KIND …]

FOLDER receives `tokenizer/`, and for each kind `teacher/` and the run directory `run/`. The teachers are trained by the
project's own loop on the built-in `wiki` corpus, with a tokenizer of 2,048 tokens made from that corpus; the blocks
that `compress` evaluates on are kept out of the training. Prints one line of JSON per kind.
"""

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from minitron.data.corpus import read_documents
from minitron.distillation import correct
from minitron.pipeline import compress
from minitron.quantities import parse_count
from minitron.recipe import Recipe
from minitron.session import Session

VOCABULARY, CONTEXT, SEED = 2048, 256, 0
TEXT = {"context": CONTEXT, "seed": SEED, "search": {"tokens": 4_096}, "evaluation": {"tokens": 16_384}}
"""The part of the recipe that decides how the text is split, for training from scratch and for `compress`."""
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 384,
    "num_hidden_layers": 6,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
    "dtype": "float32",
}
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt_neox": {"intermediate_size": 512},
    "qwen3_moe": {
        "num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 192, "mlp_only_layers": [0],
        "norm_topk_prob": True,
    },
    "nemotron_h": {
        "hybrid_override_pattern": "M-M*-M-M-", "mamba_num_heads": 16, "mamba_head_dim": 16, "n_groups": 4,
        "ssm_state_size": 32, "chunk_size": 64,
    },
}  # fmt: skip
"""The kinds by their differences from `SIZES`, of 1.5 to 4 million parameters each."""


def make_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE tokenizer trained on the corpus."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(read_documents("wiki", SEED), trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(folder)


def train_teacher(kind: str, folder: Path, tokenizer_folder: Path, num_tokens: int) -> None:
    """Train a random model of a kind on the corpus, without the blocks that `compress` evaluates on."""
    torch.manual_seed(SEED)
    random = folder / "random"
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | KINDS[kind])).save_pretrained(random)
    AutoTokenizer.from_pretrained(tokenizer_folder).save_pretrained(random)
    training = {
        "tokens": num_tokens, "batch_size": 8, "micro_batch_size": 8, "learning_rate": 3e-3, "weight_decay": 0.1,
        "warmup_ratio": 0.1,
    }  # fmt: skip
    work = folder / "work"
    work.mkdir(exist_ok=True)
    recipe = Recipe.model_validate({"teacher": str(random), "device": "cpu", "distill": training, **TEXT})
    correct(Session(recipe), folder / "teacher", work)
    shutil.rmtree(random)
    shutil.rmtree(work)


def main() -> None:
    """Make everything that is not there yet and print one line per kind."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--tokens", type=parse_count, default=2_000_000)
    parser.add_argument("--distill-tokens", type=parse_count, default=200_000)
    parser.add_argument("--target-params", default=0.7)
    options = parser.parse_args()
    if not (options.folder / "tokenizer").exists():
        make_tokenizer(options.folder / "tokenizer")
    for kind in options.kinds:
        folder, started = options.folder / kind, time.monotonic()
        folder.mkdir(exist_ok=True)
        if not (folder / "teacher").exists():
            train_teacher(kind, folder, options.folder / "tokenizer", options.tokens)
        trained = time.monotonic()
        results = compress(
            Recipe.model_validate({
                "teacher": str(folder / "teacher"), "target_params": options.target_params, **TEXT,
                "distill": {"tokens": options.distill_tokens, "learning_rate": 1e-3, "micro_batch_size": 8},
            }),
            folder / "run",
        )  # fmt: skip
        arch = json.loads((folder / "run" / "arch.json").read_text())
        print(json.dumps({
            "kind": kind,
            "train_seconds": round(trained - started), "compress_seconds": round(time.monotonic() - trained),
            **{name: {key: round(results[name][key], 2) for key in ("num_parameters", "perplexity", "bits_per_byte")}
               for name in ("teacher", "pruned", "student")},
            "arch": {name: size for name, size in arch.items() if type(size) is int},
        }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
