"""A model's answer as it is made, piece by piece, to be stopped at any moment."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from minitron.errors import UserError

LONGEST_WAIT = 600.0
"""Seconds for one token, after which whoever waits for it gives up."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; a temperature of 0 takes the likeliest."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """What there is of an answer so far."""

    text: str
    num_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """The prompt's reading included."""
        return self.num_tokens / max(self.seconds, 1e-9)


class Speaker:
    """A model with its tokenizer; chats are put into words by the tokenizer's template, if it has one."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    @property
    def is_chatty(self) -> bool:
        """Whether it takes turns, rather than going on from a text."""
        return bool(self.tokenizer.chat_template)

    @property
    def context(self) -> int | None:
        """The most tokens that prompt and answer may have together; None: nothing is said."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def prompt(self, turns: list[dict[str, str]]) -> torch.Tensor:
        """Token ids (1, T): of the whole chat with a template, of the last turn alone without one."""
        if self.is_chatty:
            text = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
        else:
            ids = self.tokenizer(turns[-1]["content"], return_tensors="pt").input_ids
        found: torch.Tensor = ids
        return found

    def answer(self, turns: list[dict[str, str]], sampling: Sampling) -> Iterator[Answer]:
        """The answer as it grows; whoever stops asking stops the model.

        Raises:
            UserError: the prompt is empty, or leaves no room for an answer.
        """
        ids = self.prompt(turns)
        if not ids.numel():
            raise UserError("the prompt is empty")
        if self.context is not None and ids.shape[1] + sampling.max_new_tokens > self.context:
            raise UserError(
                f"the prompt has {ids.shape[1]:,} tokens, which with {sampling.max_new_tokens:,} new ones is above the "
                f"model's {self.context:,}: shorten it, ask for fewer, or begin a new chat"
            )
        yield from self._stream(ids, sampling)

    def _stream(self, ids: torch.Tensor, sampling: Sampling) -> Iterator[Answer]:
        told_to_stop, device = Event(), next(self.model.parameters()).device
        streamer = TextIteratorStreamer(
            self.tokenizer, skip_prompt=True, timeout=LONGEST_WAIT, skip_special_tokens=True
        )
        counter = _Counter(told_to_stop)
        options: dict[str, Any] = {"do_sample": sampling.temperature > 0}
        if sampling.temperature > 0:
            options |= {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        failures: list[BaseException] = []

        def generate() -> None:
            try:
                with torch.no_grad():
                    prompt = ids.to(device)
                    self.model.generate(
                        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=sampling.max_new_tokens,
                        streamer=streamer, stopping_criteria=StoppingCriteriaList([counter]),
                        pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0, **options,
                    )  # fmt: skip
            except BaseException as error:
                failures.append(error)
                streamer.end()

        torch.manual_seed(sampling.seed)
        text, started = "", time.monotonic()
        thread = Thread(target=generate, daemon=True)
        thread.start()
        try:
            for piece in streamer:
                text += piece
                yield Answer(text, counter.count, time.monotonic() - started)
            thread.join()
            if failures:
                raise failures[0]
            yield Answer(text, counter.count, time.monotonic() - started)
        finally:
            told_to_stop.set()


class _Counter(StoppingCriteria):  # type: ignore[misc]
    """Counts new tokens, and ends the answer when nobody listens any more."""

    def __init__(self, told_to_stop: Event) -> None:
        self.told_to_stop, self.count = told_to_stop, 0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.count += 1
        return torch.full((input_ids.shape[0],), self.told_to_stop.is_set(), device=input_ids.device)
