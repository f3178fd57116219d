"""The texts and the teachers of the papers' tables: small models, trained from random weights by `minitron correct`.

Both texts are at hand wherever Minitron is installed: the built-in wiki, and the docstrings of Python's standard
library as the text that a teacher has not seen. Every twentieth document of a text is kept out of all trainings.
"""

import ast
import json
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import minitron
from minitron.data.corpus import read_documents
from minitron.files import whole_folder

CONTEXT = 128
KEPT_OUT = 20
"""One document of this number is kept out of all trainings."""
END = "<|end|>"

Text = Literal["wiki", "docstrings"]
TEXTS: tuple[Text, ...] = ("wiki", "docstrings")


@dataclass(frozen=True)
class Training:
    """A teacher: its config, and how it is trained on the wiki."""

    model_type: str
    config: dict[str, Any]
    tokens: str = "4M"
    vocab_size: int = 1024
    learning_rate: float = 2e-3
    seed: int = 0


TEACHERS = {
    # The papers' architecture: two matrices per MLP, squared ReLU, LayerNorm, grouped queries, untied embeddings.
    "deep": Training(
        "nemotron",
        {
            "hidden_size": 96,
            "intermediate_size": 384,
            "num_hidden_layers": 12,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 512,
            "initializer_range": 0.03,
        },
    ),
    "hybrid": Training(
        "nemotron_h",
        {
            "hidden_size": 64,
            "intermediate_size": 256,
            "hybrid_override_pattern": "M-M-*-M-",
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "mamba_num_heads": 16,
            "mamba_head_dim": 8,
            "n_groups": 4,
            "ssm_state_size": 16,
            "chunk_size": 64,
            "max_position_embeddings": 512,
            "initializer_range": 0.03,
        },
        tokens="300k",
    ),
}


def write_texts(folder: Path) -> None:
    """Write `TEXT.jsonl` and `TEXT-kept-out.jsonl` for every text, unless the folder holds them."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = {"wiki": lambda: read_documents("wiki", seed=0), "docstrings": _docstrings}
    for text in TEXTS:
        if (folder / f"{text}-kept-out.jsonl").exists():
            continue
        parts: tuple[list[str], list[str]] = ([], [])
        for number, document in enumerate(sources[text]()):
            parts[number % KEPT_OUT == 0].append(json.dumps({"text": document}))
        for name, lines in zip((text, f"{text}-kept-out"), parts, strict=True):
            (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _docstrings() -> Iterator[str]:
    """Yield the docstrings of each module of Python's standard library, joined, in the order of file names."""
    folder = Path(sysconfig.get_path("stdlib"))
    for path in sorted(folder.rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib"} & set(path.relative_to(folder).parts):
            continue
        try:
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        except (SyntaxError, UnicodeDecodeError):  # samples of bad or old code
            continue
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
        found = [text for node in nodes if isinstance(node, kinds) and (text := ast.get_docstring(node))]
        if found:
            yield "\n\n".join(found)


def train_teacher(name: str, folder: Path, texts: Path, tokens: str | None = None) -> Path:
    """Return the folder of a teacher, which is trained first if the folder does not exist."""
    training = TEACHERS[name]
    out, start = folder / name, folder / f"{name}-untrained"
    if not start.exists():
        with whole_folder(start) as staging:
            tokenizer = _tokenizer(texts / "wiki.jsonl", training.vocab_size)
            ends = {"bos_token_id": None, "pad_token_id": None, "eos_token_id": tokenizer.eos_token_id}
            torch.manual_seed(training.seed)
            config = AutoConfig.for_model(
                training.model_type, vocab_size=training.vocab_size, **training.config, **ends
            )
            AutoModelForCausalLM.from_config(config).save_pretrained(staging)
            tokenizer.save_pretrained(staging)
    if not (out / "config.json").exists():
        minitron.correct(
            start, out, data=str(texts / "wiki.jsonl"), context=CONTEXT, seed=training.seed, search={"tokens": 8_192},
            distill={
                "tokens": tokens or training.tokens, "batch_size": 16, "micro_batch_size": 16,
                "learning_rate": training.learning_rate, "min_learning_rate_ratio": 0.05, "weight_decay": 0.01,
            },
        )  # fmt: skip
    return out


def _tokenizer(text: Path, vocab_size: int) -> PreTrainedTokenizerFast:
    tokenizer = ByteLevelBPETokenizer()
    documents = (json.loads(line)["text"] for line in text.read_text(encoding="utf-8").splitlines())
    tokenizer.train_from_iterator(documents, vocab_size, special_tokens=[END], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, eos_token=END)
