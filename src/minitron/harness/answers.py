"""Generates answers to conversations in lm-eval's batches, and caches them in files so that a later run continues."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from minitron.errors import UserError
from minitron.files import read_json, read_jsonl, write_json, write_jsonl

Messages = list[dict[str, str]]
"""A conversation as chat templates take it: messages with `role` (system, user or assistant) and `content`."""

SAVED_AT_ONCE = 32
"""The number of answers between two writes of a cache: an interruption loses at most this number."""


@dataclass(frozen=True)
class Request:
    """A conversation that ends with a message of the user, and how to answer it; a temperature of 0 is greedy."""

    messages: Messages
    max_new_tokens: int
    temperature: float = 0.0


@dataclass(frozen=True)
class Decoding:
    """How texts are continued; a temperature of 0 is greedy."""

    stops: tuple[str, ...]
    """Texts that end a continuation."""
    max_new_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    """The share of probability from which a token is drawn, of the likeliest tokens (nucleus sampling)."""

    def to_options(self) -> dict[str, Any]:
        """Return the options of one of lm-eval's requests."""
        options: dict[str, Any] = {"until": list(self.stops), "max_gen_toks": self.max_new_tokens, "do_sample": False}
        if self.temperature > 0:
            # Without `top_k` transformers would draw from the 50 likeliest tokens.
            options |= {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return options


class Answerer:
    """A model that lm-eval has loaded (an `HFLM`); it generates in batches of that model's batch size."""

    def __init__(self, model: Any, name: str, seed: int) -> None:
        self.model, self.name, self.seed = model, name, seed

    @property
    def context(self) -> int:
        """The most tokens that conversation and answer may have together; the beginning of a longer one is cut off."""
        return int(self.model.max_length)

    def answers(self, requests: Sequence[Request], stage: str = "answers") -> list[str]:
        """Generate answers, in the order of the requests; `stage` is the name under which progress is shown.

        Raises:
            UserError: an answer may be longer than the model's context.
        """
        prompts = []
        for request in requests:
            prompt, stops = self._prompt(request.messages)
            decoding = Decoding(tuple(stops), request.max_new_tokens, request.temperature)
            prompts.append((prompt, decoding.to_options()))
        return [answer.strip() for answer in self._generate(prompts, self.seed, stage)]

    def continuations(
        self, prompts: Sequence[str], decoding: Decoding, *, draw: str, stage: str = "answers"
    ) -> list[str]:
        """Continue texts. What is sampled depends on the seed and on `draw`, so that two draws of a text differ."""
        seed = int.from_bytes(sha256(f"{self.seed} {draw}".encode()).digest()[:7])
        return self._generate([(prompt, decoding.to_options()) for prompt in prompts], seed, stage)

    def _generate(self, prompts: list[tuple[str, dict[str, Any]]], seed: int, stage: str) -> list[str]:
        from lm_eval.api.instance import Instance

        longest = max((options["max_gen_toks"] for _, options in prompts), default=0)
        if longest >= self.context:
            raise UserError(f"answers of {longest} tokens do not fit in a context of {self.context}")
        torch.manual_seed(seed)
        self.model.stage = stage
        instances = [Instance("generate_until", {}, prompt, i) for i, prompt in enumerate(prompts)]
        return [str(answer) for answer in self.model.generate_until(instances)]

    def num_tokens(self, text: str) -> int:
        """Count the tokens of a text."""
        return len(self.model.tok_encode(text))

    def beginning(self, text: str, num_tokens: int) -> str:
        """Return the first `num_tokens` tokens of a text, as text."""
        ids = self.model.tok_encode(text)
        return text if len(ids) <= num_tokens else str(self.model.tokenizer.decode(ids[:num_tokens]))

    def _prompt(self, messages: Messages) -> tuple[str, list[str]]:
        """Return a conversation as text, and the texts that end an answer in addition to the model's EOS token.

        Without a chat template the conversation is a dialogue of `User:` and `Assistant:` that a base model continues.
        """
        if self.model.tokenizer.chat_template:
            return self.model.apply_chat_template(messages), []
        turns = "".join(f"{message['role'].capitalize()}: {message['content']}\n\n" for message in messages)
        return f"{turns}Assistant:", ["\n\nUser:"]


@contextmanager
def answers_folder(folder: Path | None, identity: Mapping[str, Any]) -> Iterator[Path]:
    """Yield the folder that caches answers, marked with their identity; without one, a temporary folder.

    Raises:
        UserError: the folder holds answers with another identity.
    """
    if folder is None:
        with TemporaryDirectory() as temporary:
            yield Path(temporary)
        return
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "answers.json"
    if record.exists() and (stored := read_json(record)) != identity:
        differing = ", ".join(key for key in identity if stored.get(key) != identity[key])
        raise UserError(
            f"the answers in {folder} are from another run ({differing} differs): choose another folder for --answers"
        )
    write_json(record, dict(identity))
    yield folder


def cached_rows(
    stage: str, path: Path, keys: Sequence[Any], key_name: str, make: Callable[[list[Any], str], list[dict[str, Any]]]
) -> dict[Any, dict[str, Any]]:
    """Return the rows of a jsonl file by key; make the missing ones in batches and add each batch to the file.

    `make` receives keys and the name under which progress is shown, and returns one row per key, with the key under
    `key_name`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = {row[key_name]: row for row in read_jsonl(path)}
    missing = [key for key in keys if key not in rows]
    for start in range(0, len(missing), SAVED_AT_ONCE):
        part = missing[start : start + SAVED_AT_ONCE]
        done = len(keys) - len(missing) + start
        rows |= {row[key_name]: row for row in make(part, f"{stage} {done + 1} to {done + len(part)} of {len(keys)}")}
        write_jsonl(path, list(rows.values()))
    return {key: rows[key] for key in keys}
