"""Writes a model with the first N tokens of a byte-level BPE vocabulary: rows of the embeddings, tokenizer and config.

    python benchmarks/first_tokens.py MODEL OUT --tokens 16384

The merges of such a tokenizer are in the order in which they were learnt, and the tokens of a merge are older than what
it makes, so that the first tokens are a vocabulary of their own, which says all that the whole one says. Benchmarks of
exports use it; it says nothing about which tokens a text needs.
"""

import argparse
import json
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from minitron import open_teacher


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("out", type=Path)
    parser.add_argument("--tokens", type=int, default=16_384)
    return parser.parse_args()


def first_tokens(tokenizer: PreTrainedTokenizerFast, count: int) -> str:
    """Return tokenizer.json with the tokens below `count` and the merges that make them."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    model["vocab"] = {token: number for token, number in model["vocab"].items() if number < count}
    model["merges"] = [merge for merge in model["merges"] if "".join(merge) in model["vocab"]]
    return json.dumps(state, ensure_ascii=False)


def main() -> None:
    """Write the model to OUT."""
    given = arguments()
    folder = open_teacher(given.model).folder
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", trust_remote_code=False)
    model.resize_token_embeddings(given.tokens)
    model.save_pretrained(given.out)
    tokenizer.save_pretrained(given.out)
    (given.out / "tokenizer.json").write_text(first_tokens(tokenizer, given.tokens), encoding="utf-8")


if __name__ == "__main__":
    main()
