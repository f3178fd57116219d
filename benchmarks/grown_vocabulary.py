"""Writes a teacher with a vocabulary for many languages: a byte-level BPE model grown by tokens of other scripts.

    python benchmarks/grown_vocabulary.py TEACHER OUT [--tokens 131072]

No small model with a large multilingual vocabulary is at hand offline. Random words of 15 scripts are built up by
merges at the end of the tokenizer's list, so that text in Latin letters is written as before. The row of a new token is
that of a random token of the teacher that is not ASCII, with noise: such rows get little probability.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

SCRIPTS = {
    "greek": (0x3B1, 0x3C9), "cyrillic": (0x430, 0x44F), "armenian": (0x561, 0x586), "hebrew": (0x5D0, 0x5EA),
    "arabic": (0x627, 0x64A), "devanagari": (0x905, 0x939), "bengali": (0x985, 0x9A8), "tamil": (0xB85, 0xBB9),
    "thai": (0xE01, 0xE2E), "georgian": (0x10D0, 0x10F0), "ethiopic": (0x1200, 0x1248), "hiragana": (0x3041, 0x3096),
    "katakana": (0x30A1, 0x30FA), "han": (0x4E00, 0x9FA5), "hangul": (0xAC00, 0xD7A3),
}  # fmt: skip
NOISE = 0.1
"""The noise in a row, as a share of the spread of all rows."""


def main() -> None:
    """Write the grown model and its tokenizer."""
    parser = argparse.ArgumentParser()
    parser.add_argument("teacher", type=Path, help="a folder")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=131_072)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(options.teacher, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(options.teacher, trust_remote_code=False)
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    foreign = [n for token, n in content["model"]["vocab"].items() if not token.lstrip("Ġ").isascii()]
    grow(content["model"], options.tokens)
    rows = model.get_input_embeddings().weight
    first = rows.shape[0]
    model.resize_token_embeddings(options.tokens, mean_resizing=False)
    torch.manual_seed(0)
    with torch.no_grad():
        rows = model.get_input_embeddings().weight
        drawn = torch.tensor(foreign)[torch.randint(len(foreign), (options.tokens - first,))]
        rows[first:] = rows[drawn] + NOISE * rows[:first].std() * torch.randn(len(drawn), rows.shape[1])
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    path = options.out / "tokenizer.json"
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    PreTrainedTokenizerFast.from_pretrained(options.out)


def grow(bpe: dict[str, Any], size: int) -> None:
    """Add merges of random words of the scripts to a byte-level BPE, until it has `size` tokens."""
    vocab, letters, draw = bpe["vocab"], bytes_to_unicode(), random.Random(0)
    while len(vocab) < size:
        script = draw.choice(list(SCRIPTS))
        word = [chr(draw.randint(*SCRIPTS[script])) for _ in range(draw.randint(1, 3))]
        token = ""
        for character in word:
            symbol = ""
            for byte in character.encode():
                symbol = joined(bpe, symbol, letters[byte], size)
            token = joined(bpe, token, symbol, size)


def joined(bpe: dict[str, Any], left: str, right: str, size: int) -> str:
    """Return two tokens as one, which is made if it is missing and there is room."""
    if left and left + right not in bpe["vocab"] and len(bpe["vocab"]) < size:
        bpe["merges"].append([left, right])
        bpe["vocab"][left + right] = len(bpe["vocab"])
    return left + right


if __name__ == "__main__":
    main()
