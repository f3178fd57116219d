"""What on-policy steps at the end of a distillation do to free text: repetition, variety, and what the teacher expects.

    python benchmarks/on_policy.py MODEL [--teacher smollm2] [--ways 0 0.1 0.3 0.3:reverse_kl] [--tokens 25600]
        [--rate 5e-4] [--start pruned] [--seeds 0] [--wikitext FILE]
        [--results benchmarks/results/on_policy.jsonl]

A way is `distill.on_policy.share` and, if given, its loss. Each way distils the model, a pruned one or a student that
is trained further (`--start` names it in the results), on its own full schedule of equal tokens, one block of 512 per
step. Students then continue the first 32 tokens of 24 held-out blocks, or of 16 of WikiText-2 (`--wikitext`), by 96
tokens, greedily and drawn at temperature 1; of each continuation are measured: the share of its 4-grams that occurred
before in it, distinct pairs of tokens per token, and the teacher's nats per token. Held-out perplexity is beside them.
"""

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from prune_quality import read_wikitext
from torch import Tensor

import minitron
from minitron.data.blocks import Blocks
from minitron.data.tokens import load_tokenizer
from minitron.evaluation.perplexity import measure_perplexity
from minitron.files import read_json, read_jsonl
from minitron.model.checkpoint import open_checkpoint
from minitron.model.language_model import load_model
from minitron.recipe import Recipe
from minitron.run import versions
from minitron.session import Session

CONTEXT, PROMPTS, PROMPT, LENGTH = 512, 24, 32, 96


def main() -> None:
    """Distil and measure all ways that the results lack; a line of JSON for each."""
    minitron.configure_backends()
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--start", default="pruned")
    parser.add_argument("--wikitext", type=Path)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--teacher", default="smollm2")
    parser.add_argument("--ways", nargs="+", default=["0", "0.1", "0.3", "0.3:reverse_kl"])
    parser.add_argument("--tokens", type=int, default=25_600)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "on_policy.jsonl")
    options = parser.parse_args()
    for seed in options.seeds:
        for way in ["teacher", "start", *options.ways]:
            key = {"start": options.start, "rate": options.rate, "way": way, "tokens": options.tokens, "seed": seed}
            done = read_jsonl(options.results) if options.results.exists() else []
            if not any(key.items() <= row.items() for row in done):
                row = key | measured(way, options, seed) | {"versions": versions()}
                with options.results.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)


def measured(way: str, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Distil one way, and measure the student on held-out text."""
    base: dict[str, Any] = {
        "context": CONTEXT,
        "dtype": "bfloat16",
        "seed": seed,
        "evaluation": {"tokens": 32 * CONTEXT},
    }
    session = Session(Recipe.model_validate({"teacher": options.teacher, **base}))
    share, _, loss = way.partition(":")
    figures: dict[str, Any] = {}
    with TemporaryDirectory() as folder:
        student = Path(options.model) if way == "start" else session.teacher.folder
        if way not in ("teacher", "start"):
            student = Path(folder) / "student"
            on_policy = {"share": float(share), "loss": loss or "forward_kl"}
            distill = {
                "tokens": options.tokens,
                "batch_size": 1,
                "learning_rate": options.rate,
                "on_policy": on_policy,
                "checkpoint_seconds": 1e6,
            }
            started = time.monotonic()
            minitron.distill(options.teacher, options.model, student, recipe=Recipe.model_validate(
                {"teacher": options.teacher, **base, "distill": distill, "search": {"tokens": CONTEXT}}))  # fmt: skip
            figures["seconds"] = round(time.monotonic() - started)
            figures["loss"] = read_json(student / "minitron.json")["steps"][-1]["loss"]
        blocks = session.splits.evaluation
        if options.wikitext:  # of a student that has read most of the text
            blocks = read_wikitext(options.wikitext, session)
        return figures | free_text(session, student, blocks)


@torch.no_grad()
def free_text(session: Session, folder: Path, blocks: Blocks) -> dict[str, Any]:
    """Measure perplexity, and continuations of the beginnings of held-out blocks."""
    device, dtype = session.runtime.device, session.runtime.dtype
    model, teacher = (load_model(open_checkpoint(place), device, dtype) for place in (folder, session.teacher.folder))
    found: dict[str, Any] = {"perplexity": measure_perplexity(model, blocks[:16]).perplexity}
    prompts = blocks.ids[:PROMPTS, :PROMPT]
    for name, drawing in (("greedy", {"do_sample": False}), ("drawn", {"do_sample": True, "top_k": 0})):
        torch.manual_seed(session.recipe.seed)
        text = model.generate(
            inputs=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=LENGTH, eos_token_id=-1,
            pad_token_id=0, **drawing,
        )  # fmt: skip
        logits = teacher(text).logits[:, PROMPT - 1 : -1].float().log_softmax(-1)
        nats = -logits.gather(-1, text[:, PROMPT:, None]).mean()
        rows = text[:, PROMPT:]
        found[name] = {"repeated": repeated(rows), "distinct": distinct(rows), "teacher_nats": float(nats)}
    found["sample"] = load_tokenizer(session.teacher.folder).decode(rows[0].tolist())
    return found


def repeated(rows: Tensor, n: int = 4) -> float:
    """Return the share of n-grams of a row that occurred before in it, over all rows."""
    total = again = 0
    for row in rows.tolist():
        grams = [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]
        total, again = total + len(grams), again + len(grams) - len(set(grams))
    return again / total


def distinct(rows: Tensor) -> float:
    """Return distinct pairs of tokens over all pairs, of all rows together."""
    pairs = [pair for row in rows.tolist() for pair in pairwise(row)]
    return len(set(pairs)) / len(pairs)


if __name__ == "__main__":
    main()
