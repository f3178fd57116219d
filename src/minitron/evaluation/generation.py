"""Generates text with a model: a greedy continuation for reports, and completions streamed as they are made."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from minitron.errors import UserError

PROMPT_TOKENS = 16
"""The number of tokens of a block that `measure` uses as a prompt."""
CONTINUATION_TOKENS = 32
"""The number of tokens that `greedy_continuation` generates."""
LONGEST_WAIT = 600.0
"""Seconds to wait for one token of a streamed completion before giving up."""


@torch.no_grad()
def greedy_continuation(model: Any, tokenizer: Any, ids: Tensor) -> str:
    """Generate 32 tokens greedily after the prompt `ids` (1, T); return prompt and continuation as one text."""
    options = {"max_new_tokens": CONTINUATION_TOKENS, "do_sample": False}
    output = model.generate(**_inputs(model, tokenizer, ids), **options)
    return str(tokenizer.decode(output[0].tolist()))


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; a temperature of 0 is greedy."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def to_options(self) -> dict[str, Any]:
        """Return the arguments of transformers' `generate`."""
        options: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "do_sample": self.temperature > 0}
        if self.temperature > 0:
            options |= {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0}
        return options


@dataclass(frozen=True)
class Completion:
    """The text generated so far, without the prompt."""

    text: str
    num_tokens: int
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Generated tokens per second, with the time for the prompt included."""
        return self.num_tokens / max(self.seconds, 1e-9)


class TextGenerator:
    """A model and its tokenizer; messages are written by the tokenizer's chat template if there is one."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer

    @property
    def has_chat_template(self) -> bool:
        """Whether the model takes conversations; otherwise it continues a text."""
        return bool(self.tokenizer.chat_template)

    @property
    def context(self) -> int | None:
        """The most tokens that prompt and completion may have together; None: the config names no limit."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def prompt(self, messages: list[dict[str, str]]) -> Tensor:
        """Return token ids (1, T) of the whole chat, or of the last message alone without a chat template.

        Raises:
            UserError: the template refuses the chat.
        """
        if self.has_chat_template:
            try:
                text = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
            except Exception as error:  # a template is a program, which can raise anything
                raise UserError(f"the chat template refuses this chat: {error}") from error
            encoding = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)
        else:
            encoding = self.tokenizer(messages[-1]["content"], return_tensors="pt")
        ids: Tensor = encoding.input_ids
        return ids

    def stream(self, messages: list[dict[str, str]], sampling: Sampling) -> Iterator[Completion]:
        """Yield the completion as it grows; closing the iterator stops the model.

        Raises:
            UserError: the template refuses the chat; the prompt is empty, or leaves no room for a completion.
        """
        ids = self.prompt(messages)
        if not ids.numel():
            raise UserError("the prompt is empty")
        if self.context is not None and ids.shape[1] + sampling.max_new_tokens > self.context:
            raise UserError(
                f"the prompt has {ids.shape[1]:,} tokens, which with {sampling.max_new_tokens:,} new ones is above the "
                f"model's {self.context:,}: shorten it, ask for fewer, or begin a new chat"
            )
        yield from self._stream(ids, sampling)

    def _stream(self, ids: Tensor, sampling: Sampling) -> Iterator[Completion]:
        stop = Event()
        streamer = TextIteratorStreamer(
            self.tokenizer, skip_prompt=True, timeout=LONGEST_WAIT, skip_special_tokens=True
        )
        counter = _Counter(stop)
        options = {**sampling.to_options(), "streamer": streamer, "stopping_criteria": StoppingCriteriaList([counter])}
        failures: list[BaseException] = []

        def generate() -> None:
            try:
                with torch.no_grad():
                    self.model.generate(**_inputs(self.model, self.tokenizer, ids), **options)
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
                yield Completion(text, counter.count, time.monotonic() - started)
            thread.join()
            if failures:
                raise failures[0]
            yield Completion(text, counter.count, time.monotonic() - started)
        finally:
            stop.set()


def _inputs(model: Any, tokenizer: Any, ids: Tensor) -> dict[str, Any]:
    """Return what `generate` needs besides the sampling: the prompt (1, T) on the model's device, and a pad token."""
    ids = ids.to(next(model.parameters()).device)
    pad_token_id = tokenizer.pad_token_id or tokenizer.eos_token_id or 0
    return {"inputs": ids, "attention_mask": torch.ones_like(ids), "pad_token_id": pad_token_id}


class _Counter(StoppingCriteria):  # type: ignore[misc]
    """Counts the generated tokens, and ends the generation once `stop` is set."""

    def __init__(self, stop: Event) -> None:
        self.stop, self.count = stop, 0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.count += 1
        return torch.full((input_ids.shape[0],), self.stop.is_set(), device=input_ids.device)
