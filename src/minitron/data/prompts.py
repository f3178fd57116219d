"""Reads prompts, each of which a model is to answer."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from minitron.data.chats import Chat
from minitron.data.readers import is_readable, kinds, read_rows
from minitron.data.rows import ANSWERED, CHATS, document
from minitron.errors import UserError

NUM_HELD_BACK = 3
"""The number of built-in prompts that are kept for measuring."""


def read_prompts(path: Path) -> list[Chat]:
    """Return the conversations of a file up to the turn that is to be answered.

    Of a text file, each line is a question. Rows of other files are what `--data` reads, with an answer, which is left
    out, or without it: `{"prompt": …}`, `{"question": …}`, `{"messages": […]}`.

    Raises:
        UserError: the file is missing or of another kind, holds no prompt, or a row has no column that is read.
    """
    if not path.is_file():
        raise UserError(f"prompts '{path}' does not exist")
    if not is_readable(path):
        raise UserError(f"prompts {path}: cannot read '{path.suffix}' files; accepted: {kinds()}")
    chats = [_prompt(row, where) for row, where in _rows(path)]
    if not chats:
        raise UserError(f"prompts {path} is empty")
    return chats


def built_in_prompts() -> tuple[list[Chat], list[Chat]]:
    """Return the questions of `prompts.txt`: those to train on, and three that no training reads."""
    chats = read_prompts(Path(__file__).with_name("prompts.txt"))
    return chats[:-NUM_HELD_BACK], chats[-NUM_HELD_BACK:]


def _rows(path: Path) -> Iterator[tuple[Any, str]]:
    is_text = ".txt" in path.suffixes[-2:]
    for row, where in read_rows(path):
        lines = row.splitlines() if is_text else [row]
        yield from ((line, where) for line in lines if line and (not isinstance(line, str) or line.strip()))


def _prompt(row: Any, where: str) -> Chat:
    if isinstance(row, dict) and not row.keys() & {"text", *CHATS}:
        given = {name: value for name, value in row.items() if value is not None}
        pair = next((pair for pair in ANSWERED if pair[0] in given), None)
        if pair is not None and not any(all(name in given for name in each) for each in ANSWERED):
            row = {**given, pair[1]: [] if isinstance(given[pair[0]], list) else ""}
    found = document(row, where)
    if found is None:
        raise UserError(f"prompts {where} holds nothing to answer")
    if isinstance(found, str):
        found = Chat(({"role": "user", "content": found},), between="", where=where)
    messages = list(found.messages)
    while messages and messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise UserError(f"prompts {where} holds nothing to answer")
    return replace(found, messages=tuple(messages))
