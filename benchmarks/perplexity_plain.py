"""Compares perplexity with a plain loop over transformers' own loss, and bits per byte under two numberings of tokens.

    python benchmarks/perplexity_plain.py [MODEL...] [--data wiki] [--tokens 4k] [--context 512]

Prints one line per model: both perplexities and their relative difference; bits per byte with the model's tokenizer,
and with one that numbers its tokens in another order, with the embeddings reordered likewise.
"""

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from minitron.data.packing import Packing, read_blocks
from minitron.data.tokens import load_tokenizer
from minitron.evaluation.perplexity import measure_perplexity
from minitron.model.language_model import load_model
from minitron.model.source import open_teacher
from minitron.quantities import parse_count


def main() -> None:
    """Print one line per model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="*", default=["smollm2"])
    parser.add_argument("--data", default="wiki")
    parser.add_argument("--tokens", type=parse_count, default=4096)
    parser.add_argument("--context", type=int, default=512)
    options = parser.parse_args()
    for name in options.models:
        checkpoint = open_teacher(name)
        model = load_model(checkpoint, torch.device("cpu"), torch.float32)
        vocab_size = checkpoint.arch.sizes["vocab_size"]
        packing = Packing(load_tokenizer(checkpoint.folder), vocab_size, options.context)
        blocks = read_blocks(options.data, packing, options.tokens)
        ours = measure_perplexity(model, blocks)
        with torch.no_grad():
            losses = [float(model(input_ids=ids[None], labels=ids[None]).loss) for ids in blocks.ids]
        plain = math.exp(sum(losses) / len(losses))

        places = torch.randperm(vocab_size, generator=torch.Generator().manual_seed(0))
        with TemporaryDirectory() as folder:
            renumbered = replace(packing, tokenizer=_renumbered(packing.tokenizer, places.tolist(), Path(folder)))
        for matrix in {id(part.weight): part.weight for part in _matrices(model)}.values():
            matrix.data.copy_(matrix.data[places.argsort()])
        moved = measure_perplexity(model, read_blocks(options.data, renumbered, options.tokens))
        row = {
            "model": name,
            "data": options.data,
            "tokens": ours.num_tokens,
            "context": options.context,
            "perplexity": ours.perplexity,
            "plain loop": plain,
            "off by": abs(ours.perplexity / plain - 1),
            "bits per byte": ours.bits_per_byte,
            "renumbered": moved.bits_per_byte,
        }
        print(json.dumps(row), flush=True)


def _matrices(model: Any) -> list[Any]:
    return [model.get_input_embeddings(), model.get_output_embeddings()]


def _renumbered(tokenizer: Any, places: list[int], folder: Path) -> PreTrainedTokenizerFast:
    """Return a copy of a tokenizer that gives token i the number `places[i]`."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["model"]["vocab"] = {word: places[i] for word, i in content["model"]["vocab"].items()}
    for added in content["added_tokens"]:
        added["id"] = places[added["id"]]
    for mark in ((content["post_processor"] or {}).get("special_tokens") or {}).values():
        mark["ids"] = [places[i] for i in mark["ids"]]
    tokenizer.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(Tokenizer.from_str(json.dumps(content)).to_str(), encoding="utf-8")
    renumbered: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(folder)
    return renumbered


if __name__ == "__main__":
    main()
