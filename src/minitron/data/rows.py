"""Turns a row of a data file or data set into a text or a chat, by the names of its columns."""

import json
from dataclasses import replace
from typing import Any

from minitron.data.chats import Chat, Message
from minitron.errors import UserError

Document = str | Chat
Row = dict[str, Any]

CHATS = ("messages", "conversations", "conversation")
"""Columns of whole chats: turns with `role` and `content`, or as ShareGPT has them with `from` and `value`."""
ANSWERED = (
    ("instruction", "output"),
    ("instruction", "response"),
    ("prompt", "completion"),
    ("prompt", "response"),
    ("question", "answer"),
    ("question", "response"),
    ("query", "response"),
    ("input", "output"),
)
"""Pairs of columns that are a chat of two turns; the first pair that a row has decides."""
JOINED = (("input", "output"), ("prompt", "completion"))
"""Pairs whose texts follow each other directly where there is no chat template (LMFlow's text2text among them); the
texts of other pairs are kept apart by an empty line."""
CONTEXTS = {"instruction": ("input", "context"), "question": ("context",)}
"""What the user's turn holds in addition (Alpaca, Dolly), by the first column of a pair."""
SYSTEM = ("system", "system_prompt")
OTHER_TEXTS = ("content", "document")
"""Columns of text in a row without `text` and without a chat."""
FORMS = (("text",), *((name,) for name in CHATS), *ANSWERED, *((name,) for name in OTHER_TEXTS))
"""Sets of columns, each of which makes a document."""
PAIR = ("chosen", "rejected")
"""Columns of two answers of which the first is preferred (`data/preferences.py`)."""
COLUMNS = frozenset(
    [name for form in (*FORMS, PAIR) for name in form] + ["context", *SYSTEM, "tools", "chat_template_kwargs"]
)
"""All columns that are read."""
ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant"}
"""What data sets call the roles of chat templates."""
ACCEPTED = "'text', 'messages' or 'conversations', or a pair such as 'instruction' and 'output'"


def document(row: Any, where: str) -> Document | None:
    """Return the text or the chat of a row; None if its columns are null.

    `where` names file and line, or data set and row, for error messages.

    Raises:
        UserError: the row has none of the columns that are read, or they hold something else than text or turns.
    """
    if row is None or isinstance(row, str):
        return row
    if isinstance(row, list):
        row = {"messages": row}
    if not isinstance(row, dict):
        raise UserError(f"data {where} is a {_kind(row)}; accepted: a row with {ACCEPTED}")
    given = {name: value for name, value in row.items() if value is not None}
    if "text" in given:
        return _text(given["text"], "text", where)
    if name := next((name for name in CHATS if name in given), None):
        return _chat(given[name], given, where) if given[name] else None
    if pair := next((pair for pair in ANSWERED if all(name in given for name in pair)), None):
        return _answered(given, pair, where)
    texts = [name for name in OTHER_TEXTS if name in given]
    if len(texts) == 1:
        return _text(given[texts[0]], texts[0], where)
    if not texts and any(all(name in row for name in form) for form in FORMS):
        return None
    columns = ", ".join(map(str, row)) or "no columns"
    raise UserError(f"data {where} has no column that is read: {ACCEPTED}; it has {columns}")


def turns_of(value: Any, where: str) -> Chat:
    """Return a list of turns, or a mapping that holds one, as a chat.

    Raises:
        UserError: it holds something else.
    """
    row = value if isinstance(value, dict) else {"messages": value}
    name = next((name for name in CHATS if name in row), None)
    if name is None:
        raise UserError(f"data {where} has no turns: it has {', '.join(map(str, row)) or 'no columns'}")
    return _chat(row[name], row, where)


def _text(value: Any, name: str, where: str) -> str:
    """Return a text, which some writers of parquet store as bytes."""
    try:
        value = value.decode() if isinstance(value, bytes) else value
    except UnicodeDecodeError as error:
        raise UserError(f"data {where}: the bytes of column '{name}' are not UTF-8 text: {error.reason}") from error
    if not isinstance(value, str):
        raise UserError(f"data {where}: column '{name}' holds a {_kind(value)}; accepted: text")
    return value


def _answered(row: Row, pair: tuple[str, str], where: str) -> Chat:
    """Return the chat of a question and its answer, each a text or a list of turns."""
    asked, answer = (row[name] for name in pair)
    if isinstance(asked, list) and isinstance(answer, list):
        return _chat([*asked, *answer], row, where)
    parts = [_text(asked, pair[0], where)]
    parts += [_text(row[name], name, where) for name in CONTEXTS.get(pair[0], ()) if row.get(name)]
    turns = [{"role": "user", "content": "\n\n".join(parts)}]
    chat = _chat([*turns, {"role": "assistant", "content": _text(answer, pair[1], where)}], row, where)
    return replace(chat, between="" if pair in JOINED else "\n\n")


def _chat(turns: Any, row: Row, where: str) -> Chat:
    turns = _parsed(turns)
    if not isinstance(turns, list):
        raise UserError(f"data {where} holds a {_kind(turns)}; accepted: a list of turns")
    messages = [_message(turn, f"{where}, turn {number}") for number, turn in enumerate(turns, start=1)]
    system = next((row[name] for name in SYSTEM if row.get(name)), None)
    if isinstance(system, str) and all(message["role"] != "system" for message in messages[:1]):
        messages.insert(0, {"role": "system", "content": system})
    tools, options = _parsed(row.get("tools")), _parsed(row.get("chat_template_kwargs"))
    if not (tools is None or isinstance(tools, list)) or not (options is None or isinstance(options, dict)):
        raise UserError(f"data {where}: accepted are a list of 'tools' and a mapping 'chat_template_kwargs'")
    return Chat(tuple(messages), tuple(tools) if tools else None, options or {}, where=where)


def _message(turn: Any, where: str) -> Message:
    """Return a turn with the names that chat templates read; further keys are passed on to the template.

    Nulls are left out, as transformers does. Parts of text are joined, since not every template reads parts.
    """
    if not isinstance(turn, dict):
        raise UserError(f"data {where} is a {_kind(turn)}; accepted: a mapping with role and content")
    given = {key: value for key, value in turn.items() if value is not None}
    if "role" not in given and "from" in given:
        given = {"role": given.pop("from"), "content": given.pop("value", None), **given}
    role = given.get("role")
    if not isinstance(role, str):
        raise UserError(f"data {where} has no role; it has {', '.join(map(str, turn)) or 'no keys'}")
    message = {**given, "role": ROLES.get(role, role)}
    if given.get("content") is None:
        message.pop("content", None)
        if not any(given.get(key) for key in ("tool_calls", "function_call", "reasoning_content", "thinking")):
            raise UserError(f"data {where} ({role}) has neither content nor tool_calls")
    else:
        message["content"] = _content(given["content"], f"{where} ({role})")
    if "tool_calls" in given:
        message["tool_calls"] = _tool_calls(given["tool_calls"], where)
    return message


def _content(content: Any, where: str) -> str:
    """Return the content of a turn as text."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise UserError(f"data {where} has a {_kind(content)} as content; accepted: text, or parts of text")
    texts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    for part in texts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, dict) else _kind(part)
            raise UserError(f"data {where} holds a part of type '{kind}'; accepted: text alone")
    return "".join(part["text"] for part in texts)


def _tool_calls(calls: Any, where: str) -> list[Any]:
    """Return tool calls with their arguments as a mapping, which chat templates write as JSON themselves."""
    calls = _parsed(calls)
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise UserError(f"data {where} has tool_calls that are not a list of mappings")
    return [
        {**call, "function": _with_arguments(call["function"])}
        if isinstance(call.get("function"), dict)
        else _with_arguments(call)
        for call in calls
    ]


def _with_arguments(function: Row) -> Row:
    arguments = _parsed(function.get("arguments"))
    return {**function, "arguments": arguments} if isinstance(arguments, dict) else function


def _parsed(value: Any) -> Any:
    """Return what a text holds as JSON; columns of files hold lists and mappings of many forms as text."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError:
        return value


def _kind(value: Any) -> str:
    names = {str: "text", dict: "mapping", list: "list", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), type(value).__name__)
