"""What a model answers to conversations, by lm-eval's batches, in files that a later run goes on with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minitron.errors import UserError
from minitron.files import read_jsonl, write_jsonl

Messages = list[dict[str, str]]
"""A conversation as chat templates take it: `role` (system, user or assistant) and `content`."""

KEPT_AT_ONCE = 32
"""Answers that an interruption loses at most."""


@dataclass(frozen=True)
class Request:
    """A conversation that ends with the user, and how it is to be answered; a temperature of 0 takes the likeliest."""

    messages: Messages
    max_new_tokens: int
    temperature: float = 0.0


class Answerer:
    """A model that lm-eval has loaded (an `HFLM`), asked in batches of its own size."""

    def __init__(self, model: Any, name: str, seed: int) -> None:
        self.model, self.name, self.seed = model, name, seed

    @property
    def context(self) -> int:
        """The most tokens that conversation and answer may have together; what is above is cut off in front."""
        return int(self.model.max_length)

    def answers(self, requests: Sequence[Request], stage: str = "answers") -> list[str]:
        """The answers, in the order of the requests; `stage` is what progress is shown under.

        Raises:
            UserError: an answer may be longer than the model's context.
        """
        asked = []
        for request in requests:
            sampling: dict[str, Any] = {"do_sample": request.temperature > 0}
            if request.temperature > 0:
                sampling["temperature"] = request.temperature
            prompt, ends = self._prompt(request.messages)
            asked.append((prompt, {"until": ends, "max_gen_toks": request.max_new_tokens, **sampling}))
        return [answer.strip() for answer in self._generated(asked, stage)]

    def continuations(
        self, prompts: Sequence[str], ends: Sequence[str], max_new_tokens: int, stage: str = "answers"
    ) -> list[str]:
        """How texts go on, by the likeliest tokens, up to any of the `ends`."""
        options = {"until": list(ends), "max_gen_toks": max_new_tokens, "do_sample": False}
        return self._generated([(prompt, options) for prompt in prompts], stage)

    def _generated(self, asked: list[tuple[str, dict[str, Any]]], stage: str) -> list[str]:
        from lm_eval.api.instance import Instance

        longest = max((options["max_gen_toks"] for _, options in asked), default=0)
        if longest >= self.context:
            raise UserError(f"answers of {longest} tokens do not fit in a context of {self.context}")
        torch.manual_seed(self.seed)
        self.model.stage = stage
        instances = [Instance("generate_until", {}, each, i) for i, each in enumerate(asked)]
        return [str(answer) for answer in self.model.generate_until(instances)]

    def num_tokens(self, text: str) -> int:
        """Of a text by itself."""
        return len(self.model.tok_encode(text))

    def beginning(self, text: str, num_tokens: int) -> str:
        """So many tokens of a text, as text."""
        ids = self.model.tok_encode(text)
        return text if len(ids) <= num_tokens else str(self.model.tokenizer.decode(ids[:num_tokens]))

    def _prompt(self, messages: Messages) -> tuple[str, list[str]]:
        """The conversation as text, and what ends an answer beside the model's own token; a base model continues it."""
        if self.model.tokenizer.chat_template:
            return self.model.apply_chat_template(messages), []
        turns = "".join(f"{message['role'].capitalize()}: {message['content']}\n\n" for message in messages)
        return f"{turns}Assistant:", ["\n\nUser:"]


def kept(
    stage: str, path: Path, keys: Sequence[Any], key_name: str, make: Callable[[list[Any], str], list[dict[str, Any]]]
) -> dict[Any, dict[str, Any]]:
    """The rows of a jsonl file by key; those that are missing are made, some at a time, and added to it.

    `make` is given keys, and words for what it does, and returns their rows, each with its key under `key_name`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {row[key_name]: row for row in read_jsonl(path)}
    left = [key for key in keys if key not in rows]
    for start in range(0, len(left), KEPT_AT_ONCE):
        part = left[start : start + KEPT_AT_ONCE]
        done = len(keys) - len(left) + start
        rows |= {row[key_name]: row for row in make(part, f"{stage} {done + 1} to {done + len(part)} of {len(keys)}")}
        write_jsonl(path, list(rows.values()))
    return {key: rows[key] for key in keys}
