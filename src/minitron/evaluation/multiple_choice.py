"""How often a model prefers the right continuation: multiple choice and last words, from local jsonl files."""

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
    """Contexts with their continuations, of which number `gold` is right; a single one must be predicted greedily."""

    pairs: tuple[tuple[str, str], ...]
    gold: int


def read_items(path: Path, limit: int | None = None) -> list[Item]:
    """The first items of a jsonl file (which may be gzipped), of any of three forms:

    - `{"context": …, "choices": [ … ], "gold": 0}`, as many choices as there are;
    - WinoGrande's `{"sentence": "… _ …", "option1": …, "option2": …, "answer": "1"}`: what is scored is what
      follows the gap;
    - LAMBADA's `{"text": …}`: the last word, to be predicted token by token.

    Raises:
        UserError: the file is missing, holds nothing, or a line is of none of these forms.
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
            f"{where} is no item; accepted: context, choices and gold; sentence, option1, option2 and answer; or text"
        ) from error


@torch.no_grad()
def accuracy(
    model: nn.Module, tokenizer: Any, items: list[Item], advance: Callable[[int], None] = lambda _: None
) -> float:
    """The share of items whose right continuation has the highest log-likelihood, summed over its tokens."""
    headless = model if isinstance(model, Headless) else Headless(model)
    device, right = next(model.parameters()).device, 0
    for item in items:
        scores, greedy = [], False
        for ids, num_known in _encoded(tokenizer, item):
            likelihood, greedy = headless(
                ids.to(device), lambda hidden, head, n=num_known, ids=ids: _tail(hidden, head, ids, n)
            )
            scores.append(likelihood)
        right += greedy if len(scores) == 1 else max(range(len(scores)), key=scores.__getitem__) == item.gold
        advance(1)
    return right / len(items)


def _encoded(tokenizer: Any, item: Item) -> Iterator[tuple[Tensor, int]]:
    """For each pair the token ids (1, T) of the whole and how many of them are context."""
    for context, continuation in item.pairs:
        known = tokenizer(context).input_ids
        whole = tokenizer(context + continuation).input_ids
        num_known = min(len(known), len(whole) - 1)  # a tokenizer may join the two
        yield torch.tensor([whole]), max(1, num_known)


def _tail(hidden: Tensor, head: Head, ids: Tensor, num_known: int) -> tuple[float, bool]:
    """Log-likelihood of the tokens from `num_known` on, and whether each is the likeliest; logits for these alone."""
    logits = hidden[0, num_known - 1 : -1].float() @ head.weight.float().T
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    targets = ids[0, num_known:].to(logits.device)
    likelihood = logits.log_softmax(dim=-1).gather(1, targets[:, None]).sum()
    return float(likelihood), bool((logits.argmax(dim=-1) == targets).all())
