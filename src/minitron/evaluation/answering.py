"""Answers many prompts with a model, in batches, into a file that an interrupted run continues."""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from minitron.data.chats import Chat, RefusedError, plain_question, written
from minitron.data.tokens import padding_token
from minitron.errors import UserError
from minitron.evaluation.generation import Sampling
from minitron.files import parents_of, whole_file
from minitron.progress import Progress


@dataclass(frozen=True)
class Answerer:
    """A model, its tokenizer, and how it answers."""

    model: Any
    tokenizer: Any
    sampling: Sampling
    batch_size: int = 8

    def prompt(self, chat: Chat) -> str:
        """Return a conversation as text up to the answer, with its special tokens.

        Raises:
            UserError: the chat template refuses it, or there is none and the conversation has several turns.
        """
        messages = list(chat.messages)
        if self.tokenizer.chat_template:
            try:
                tools = list(chat.tools) if chat.tools else None
                return written(self.tokenizer, messages, adds_prompt=True, tools=tools, **chat.options)
            except RefusedError as error:
                raise UserError(f"prompts {chat.where}: the chat template cannot write this chat: {error}") from error
        if chat.between is None:
            raise UserError(f"prompts {chat.where} is a chat, but the tokenizer has no chat template: give texts")
        return plain_question(chat, self.tokenizer)

    @torch.no_grad()
    def answers(self, prompts: Sequence[str], number: int) -> list[tuple[str, bool]]:
        """Return the answers to a batch, and whether each ended by itself; draws depend on the seed and `number`."""
        device, eos = next(self.model.parameters()).device, self.tokenizer.eos_token_id
        pad = padding_token(self.tokenizer, self.model.config.vocab_size)
        rows = [self._ids(prompt) for prompt in prompts]
        longest = max(map(len, rows))
        ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        ends = _ends(self.model, eos)
        torch.manual_seed(self.sampling.seed * 1_000_003 + number)
        output = self.model.generate(
            inputs=ids, attention_mask=mask, pad_token_id=pad, eos_token_id=sorted(ends) or None,
            **self.sampling.to_options(),
        )[:, longest:].tolist()  # fmt: skip
        found = []
        for row in output:
            is_finished = any(token in ends for token in row)
            text = self.tokenizer.decode(row, skip_special_tokens=True)
            found.append((text.strip() if self.tokenizer.chat_template else text, is_finished))
        return found

    def require_room(self, prompts: Sequence[str]) -> None:
        """Check that the model was made for as many tokens as each prompt and its answer may have.

        Raises:
            UserError: it was not.
        """
        limit = getattr(self.model.config, "max_position_embeddings", None)
        longest = max(len(self._ids(prompt)) for prompt in prompts)
        if limit is not None and longest + self.sampling.max_new_tokens > limit:
            raise UserError(
                f"a prompt of {longest:,} tokens with {self.sampling.max_new_tokens:,} new ones is above the {limit:,} "
                "that the model was made for: lower --max-new-tokens, or leave long prompts out"
            )

    def _ids(self, prompt: str) -> list[int]:
        ids: list[int] = self.tokenizer(prompt, add_special_tokens=False).input_ids
        return ids


def write_answers(out: Path, answerer: Answerer, chats: Sequence[Chat], identity: dict[str, Any]) -> int:
    """Answer all prompts into the JSON lines file `out`; return how many answers ended by themselves.

    A row is a chat with its answer, or without a chat template `prompt` and `completion`; `finished` is false where
    the limit of tokens cut the answer off. Rows are kept in a hidden file next to `out` until all are there, from which
    an interrupted run continues if `identity`, prompts and sampling are equal.

    Raises:
        UserError: see `Answerer`.
    """
    prompts = [answerer.prompt(chat) for chat in chats]
    answerer.require_room(prompts)
    record = identity | asdict(answerer.sampling) | {"batch_size": answerer.batch_size}
    head = json.dumps(record | {"prompts": sha256(json.dumps(prompts).encode()).hexdigest()})
    partial = out.with_name(f".{out.name}.answers")
    with parents_of(out):
        rows = list(_rows_of(partial, head, answerer.batch_size))
        with partial.open("w", encoding="utf-8") as file, Progress("answer", len(prompts), "answers") as progress:
            file.writelines(f"{line}\n" for line in (head, *rows))
            progress.advance(len(rows))
            for start in range(len(rows), len(prompts), answerer.batch_size):
                batch = slice(start, start + answerer.batch_size)
                for chat, (answer, is_finished) in zip(
                    chats[batch], answerer.answers(prompts[batch], start), strict=True
                ):
                    rows.append(_row(chat, answer, is_finished, has_template=bool(answerer.tokenizer.chat_template)))
                    file.write(f"{rows[-1]}\n")
                file.flush()
                os.fsync(file.fileno())
                progress.advance(len(prompts[batch]))
        with whole_file(out) as staging:
            staging.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        partial.unlink()
    return sum(json.loads(row)["finished"] for row in rows)


def _rows_of(partial: Path, head: str, batch_size: int) -> Iterator[str]:
    """Yield the rows of whole batches of an interrupted run that began with `head`."""
    if not partial.is_file():
        return
    first, *lines = partial.read_text(encoding="utf-8").split("\n")
    if first == head:
        complete = lines[:-1]  # the last part is empty, or a line that was not finished
        yield from complete[: len(complete) // batch_size * batch_size]


def _row(chat: Chat, answer: str, is_finished: bool, *, has_template: bool) -> str:
    if has_template:
        row: dict[str, Any] = {"messages": [*chat.messages, {"role": "assistant", "content": answer}]}
        if chat.tools:
            row["tools"] = list(chat.tools)
        if chat.options:
            row["chat_template_kwargs"] = chat.options
    else:  # prompt and completion follow each other directly when they are read
        asked = "\n\n".join(message["content"] for message in chat.messages)
        row = {"prompt": f"{asked}{chat.between}", "completion": answer}
    return json.dumps(row | {"finished": is_finished}, ensure_ascii=False)


def _ends(model: Any, eos: int | None) -> set[int]:
    """Return the tokens at which a model ends."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    listed = ends if isinstance(ends, list) else [ends]
    return {token for token in (*listed, eos) if token is not None}
