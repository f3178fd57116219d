"""Measures how often a model prefers the right continuation: multiple choice and last words, from jsonl files."""

import gzip
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from minitron.errors import UserError
from minitron.model.language_model import Head, Headless


@dataclass(frozen=True)
class Item:
    """Pairs of a context and a continuation, of which number `gold` is right.

    An item with one pair is right if the model predicts the continuation greedily.
    """

    pairs: tuple[tuple[str, str], ...]
    gold: int


def read_items(path: Path, limit: int | None = None) -> list[Item]:
    """Read the first `limit` items of a jsonl file, which may be gzipped. Each line has one of three forms:

    - `{"context": …, "choices": [ … ], "gold": 0}`, with any number of choices;
    - WinoGrande's `{"sentence": "… _ …", "option1": …, "option2": …, "answer": "1"}`, of which the text after the gap
      is scored;
    - LAMBADA's `{"text": …}`, whose last word is predicted token by token.

    Raises:
        UserError: the file is missing or empty, or a line has none of these forms.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        items: list[Item] = []
        for number, line in enumerate(file, 1):
            if limit is not None and len(items) == limit:
                break
            if line.strip():
                items.append(_item(line, f"{path}:{number}"))
    if not items:
        raise UserError(f"{path} holds no items")
    return items


def _item(line: str, where: str) -> Item:
    try:
        row = json.loads(line)
        if "sentence" in row:
            before, after = row["sentence"].split("_")
            return Item(tuple((before + row[f"option{n}"], after) for n in (1, 2)), int(row["answer"]) - 1)
        if "text" in row:
            before, after = row["text"].rstrip().rsplit(" ", 1)
            return Item(((before, f" {after}"),), 0)
        pairs = tuple((str(row["context"]), f" {str(choice).strip()}") for choice in row["choices"])
        if not 0 <= int(row["gold"]) < len(pairs):
            raise IndexError
        return Item(pairs, int(row["gold"]))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{where} is not an item: it must hold context, choices and gold; or sentence, option1, option2 and "
            "answer; or text"
        ) from error


@torch.no_grad()
def accuracy(
    model: nn.Module, tokenizer: Any, items: list[Item], advance: Callable[[int], None] = lambda _: None
) -> float:
    """Return the share of items whose right continuation has the highest log-likelihood, summed over its tokens.

    `advance` is called with 1 after each item.
    """
    headless = model if isinstance(model, Headless) else Headless(model)
    device, num_right = next(model.parameters()).device, 0
    for item in items:
        scores, is_greedy = [], False
        for ids, num_context in _encoded(tokenizer, item):
            score, is_greedy = headless(
                ids.to(device), lambda hidden, head, n=num_context, ids=ids: _score_continuation(hidden, head, ids, n)
            )
            scores.append(score)
        num_right += is_greedy if len(scores) == 1 else max(range(len(scores)), key=scores.__getitem__) == item.gold
        advance(1)
    return num_right / len(items)


def _encoded(tokenizer: Any, item: Item) -> Iterator[tuple[Tensor, int]]:
    """Yield, for each pair, the token ids (1, T) of context and continuation, and how many belong to the context."""
    for context, continuation in item.pairs:
        context_ids = tokenizer(context).input_ids
        ids = tokenizer(context + continuation).input_ids
        num_context = min(len(context_ids), len(ids) - 1)  # a tokenizer may join the end of one and the other's start
        yield torch.tensor([ids]), max(1, num_context)


def _score_continuation(hidden: Tensor, head: Head, ids: Tensor, num_context: int) -> tuple[float, bool]:
    """Return the log-likelihood of the tokens after the context, and whether each of them is the likeliest token."""
    logits = head.logits(hidden[0, num_context - 1 : -1])  # (continuation, vocab)
    targets = ids[0, num_context:].to(logits.device)
    likelihood = logits.log_softmax(dim=-1).gather(1, targets[:, None]).sum()
    return float(likelihood), bool((logits.argmax(dim=-1) == targets).all())
