"""Reads pairs of answers to a prompt, of which one is preferred."""

import random
from dataclasses import dataclass
from typing import Any

from minitron.data.chats import Message
from minitron.data.corpus import read_all_rows
from minitron.data.rows import PAIR, turns_of
from minitron.errors import UserError

ASKED = ("prompt", "question", "instruction")
"""Columns of what both answers answer; without one, both are chats that begin alike."""


@dataclass(frozen=True)
class Preference:
    """A conversation and two answers, each as turns."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]

    def to_row(self, *, has_template: bool) -> dict[str, Any]:
        """Return the row as trl reads it: turns, or where there is no chat template texts."""
        parts = {"prompt": self.prompt, "chosen": self.chosen, "rejected": self.rejected}
        if has_template:
            return {name: [_plain(turn) for turn in turns] for name, turns in parts.items()}
        texts = {name: "\n\n".join(turn["content"] for turn in turns) for name, turns in parts.items()}
        return {**texts, "prompt": f"{texts['prompt']}\n\n"}


def read_preferences(source: str, seed: int) -> list[Preference]:
    """Return the pairs of a file, a folder, a glob or a hub data set, in the seed's order.

    Rows hold `chosen` and `rejected`: texts with a `prompt`, turns, or LMFlow's mappings with `messages`.

    Raises:
        UserError: a row does not fit; the message names file and line. Or there are fewer than two pairs.
    """
    pairs = [_preference(row, where) for row, where in read_all_rows(source)]
    if len(pairs) < 2:
        raise UserError(f"data '{source}' has {len(pairs)} pair(s); training and held-out data need at least one each")
    random.Random(seed).shuffle(pairs)
    return pairs


def _preference(row: Any, where: str) -> Preference:
    if not isinstance(row, dict) or not set(PAIR) <= {name for name, value in row.items() if value is not None}:
        columns = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"data {where} must be a pair, with 'chosen' and 'rejected'; it has {columns}")
    asked = next((row[name] for name in ASKED if row.get(name)), None)
    prompt = () if asked is None else _turns(asked, "user", where)
    chosen, rejected = (_turns(row[name], "assistant", where) for name in PAIR)
    if asked is None:
        if any(isinstance(row[name], str) for name in PAIR):
            raise UserError(f"data {where}: two texts need a column 'prompt', 'question' or 'instruction'")
        alike = next(
            (i for i, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other),
            min(len(chosen), len(rejected)),
        )
        prompt, chosen, rejected = chosen[:alike], chosen[alike:], rejected[alike:]
    if not prompt:
        raise UserError(f"data {where}: the two chats do not begin alike, so there is no prompt")
    if not chosen or not rejected or chosen == rejected:
        raise UserError(f"data {where}: the two answers are equal, or one is missing")
    return Preference(prompt, chosen, rejected)


def _turns(value: Any, role: str, where: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        return ({"role": role, "content": value},)
    return turns_of(value, where).messages


def _plain(turn: Message) -> dict[str, Any]:
    return {"role": turn["role"], "content": turn.get("content", "")}
