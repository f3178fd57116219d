"""Reads pairs of answers to a prompt, of which one is preferred."""

import math
import random
from dataclasses import dataclass, replace
from typing import Any

from minitron.data.chats import Message
from minitron.data.corpus import read_all_rows
from minitron.data.rows import CONTEXTS, PAIR, SYSTEM, turns_of
from minitron.errors import UserError

ASKED = ("prompt", "question", "instruction")
"""Columns of what both answers answer; without one, both are chats that begin alike."""
REWARDS = tuple(
    tuple(form.format(name, answer) for answer in PAIR)
    for name in ("score", "rating", "reward")
    for form in ("{1}_{0}", "{1}-{0}", "{0}_{1}")
)
"""Names of two columns that rate both answers, such as `chosen_score` and `rejected_score`."""


@dataclass(frozen=True)
class Preference:
    """A conversation and two answers, each as turns."""

    prompt: tuple[Message, ...]
    chosen: tuple[Message, ...]
    rejected: tuple[Message, ...]
    gap: float | None = None
    """The reward of the preferred answer less that of the other; None: the row rates neither."""

    @property
    def turned(self) -> "Preference":
        """The pair with its answers exchanged."""
        return replace(self, chosen=self.rejected, rejected=self.chosen, gap=self.gap and -self.gap)

    def to_row(self, *, has_template: bool) -> dict[str, Any]:
        """Return the row as trl reads it: turns, which a chat template writes, or texts for models without one."""
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


def turned_by_reward(pairs: list[Preference], scale: float, seed: int) -> list[Preference]:
    """Return pairs of which each has its answers exchanged with the probability 1 − σ(scale · gap).

    DPO on pairs that are drawn so is, on average over the draws, reward-aware preference optimization (RPO, arXiv
    2406.11704, section 3.3.2): its gradient σ(a) − σ(scale · gap), a being the gap of the model's own rewards, is the
    mean of DPO's σ(a) − 1 for the pair and σ(a) for the exchanged one.

    Raises:
        UserError: a pair has no rewards.
    """
    drawn, turned = random.Random(seed), []
    for pair in pairs:
        if pair.gap is None:
            raise UserError(
                "prefer.reward_scale needs pairs that rate both answers, such as chosen_score and rejected_score; "
                f"{sum(each.gap is None for each in pairs)} of {len(pairs)} do not"
            )
        likely = 1 / (1 + math.exp(-min(700.0, max(-700.0, scale * pair.gap))))
        turned.append(pair if drawn.random() < likely else pair.turned)
    return turned


def _preference(row: Any, where: str) -> Preference:
    if not isinstance(row, dict) or not set(PAIR) <= {name for name, value in row.items() if value is not None}:
        columns = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
        raise UserError(f"data {where} must be a pair, with 'chosen' and 'rejected'; it has {columns}")
    chosen, rejected = (_turns(row[name], "assistant", where) for name in PAIR)
    prompt = _asked(row, where)
    if prompt is None or all(turns[:1] and turns[0]["role"] != "assistant" for turns in (chosen, rejected)):
        # Whole chats, also where a column repeats what they begin with.
        if any(isinstance(row[name], str) for name in PAIR):
            raise UserError(f"data {where}: two texts need a column 'prompt', 'question' or 'instruction'")
        alike = next(
            (i for i, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other),
            min(len(chosen), len(rejected)),
        )
        prompt, chosen, rejected = chosen[:alike], chosen[alike:], rejected[alike:]
    for turn in (*prompt, *chosen, *rejected):
        if turn.keys() - {"role", "content"}:
            raise UserError(f"data {where}: pairs hold texts; a turn has {min(turn.keys() - {'role', 'content'})}")
    if not prompt:
        raise UserError(f"data {where}: the two chats do not begin alike, so there is no prompt")
    if not chosen or not rejected or chosen == rejected:
        raise UserError(f"data {where}: the two answers are equal, or one is missing")
    return Preference(prompt, chosen, rejected, _gap(row, where))


def _gap(row: dict[str, Any], where: str) -> float | None:
    """Return by how much the preferred answer is rated higher; None without ratings."""
    names = next((names for names in REWARDS if all(row.get(name) is not None for name in names)), None)
    if names is None:
        return None
    chosen, rejected = (row[name] for name in names)
    for name, value in zip(names, (chosen, rejected), strict=True):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise UserError(f"data {where}: {name} must be a number, not {value!r}")
    return float(chosen - rejected)


def _asked(row: dict[str, Any], where: str) -> tuple[Message, ...] | None:
    """Return what both answers answer, with a system turn and the columns that add to a question; None: no column."""
    name = next((name for name in ASKED if row.get(name)), None)
    if name is None:
        return None
    turns = list(_turns(row[name], "user", where))
    more = [str(row[column]) for column in CONTEXTS.get(name, ()) if row.get(column)]
    if more and isinstance(row[name], str):
        turns[0] = {**turns[0], "content": "\n\n".join([row[name], *more])}
    system = next((row[column] for column in SYSTEM if row.get(column)), None)
    if isinstance(system, str) and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system})
    return tuple(turns)


def _turns(value: Any, role: str, where: str) -> tuple[Message, ...]:
    if isinstance(value, str):
        return ({"role": role, "content": value},)
    return turns_of(value, where).messages


def _plain(turn: Message) -> dict[str, Any]:
    return {"role": turn["role"], "content": turn.get("content", "")}
