"""The Modelfile with which Ollama runs a GGUF file: its chat template, where answers end, and a default system prompt.

Ollama writes chats by Go templates (https://docs.ollama.com/template) and reads no Jinja. A chat template of a model is
translated where it writes the messages one after the other, each between two texts that depend on its role alone, which
is seen by running it. Templates of other kinds are left to Ollama, which knows the usual ones.
"""

from dataclasses import dataclass
from typing import Any

ROLES = ("system", "user", "assistant")
MARK = "\u2063{}\u2063"
"""A message that no template contains."""


@dataclass(frozen=True)
class Turns:
    """A chat template that writes messages one after the other."""

    around: dict[str, tuple[str, str]]
    """The texts before and after a message of each role."""
    invitation: str
    """What is written for an answer to begin."""
    default_system: str | None = None
    """The system prompt of a chat that has none."""


def modelfile(file: str, tokenizer: Any, ends: list[int], context: int) -> str:
    """Return the Modelfile of a GGUF file in the same folder; `ends` are the tokens at which an answer ends."""
    lines = [f"FROM ./{file}", f"PARAMETER num_ctx {min(context, 4096)}"]
    turns = read_turns(tokenizer) if tokenizer.chat_template else None
    if turns:
        cases = [
            f'{{{{ {"if" if role == "system" else "else if"} eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}'
            for role, (before, after) in turns.around.items()
        ]
        body = "{{- range .Messages }}" + "".join(cases) + "{{ end }}{{ end }}" + turns.invitation
        lines.append(f'TEMPLATE """{body}"""')
        if turns.default_system:
            lines.append(f'SYSTEM """{turns.default_system}"""')
    elif tokenizer.chat_template:
        lines.append("# This model's chat template is not written here: Ollama chooses one from those that it knows.")
    lines += [f'PARAMETER stop "{tokenizer.convert_ids_to_tokens(number)}"' for number in ends]
    return "\n".join(lines) + "\n"


def read_turns(tokenizer: Any) -> Turns | None:
    """Return what a chat template writes around messages, or None if it does not write one after the other."""
    messages = [{"role": role, "content": MARK.format(role)} for role in ROLES]
    try:
        written = [_write(tokenizer, messages[: i + 1]) for i in range(len(ROLES))]
        invited = _write(tokenizer, messages[:2], add_generation_prompt=True)
        alone = _write(tokenizer, messages[1:2])
        again = _write(tokenizer, [*messages, messages[1]])
    except Exception:  # templates raise errors of their own, of many kinds, where a role is not theirs
        return None
    pieces, before = {}, ""
    for role, text in zip(ROLES, written, strict=True):
        if not text.startswith(before):
            return None
        first, mark, last = text.removeprefix(before).partition(MARK.format(role))
        if not mark or '"""' in first + last or "{{" in first + last:
            return None
        pieces[role], before = (first, last), text
    start = tokenizer.bos_token or ""
    if start and _adds_start(tokenizer):  # the engine writes this token itself
        pieces["system"] = (pieces["system"][0].removeprefix(start), pieces["system"][1])
    user = MARK.format("user").join(pieces["user"])
    if not invited.startswith(written[1]) or again != written[2] + user or not alone.endswith(user):
        return None
    head, tail = pieces["system"]
    opening = alone.removesuffix(user).removeprefix(start if _adds_start(tokenizer) else "")
    if not opening:
        return Turns(pieces, invited.removeprefix(written[1]))
    if not (opening.startswith(head) and opening.endswith(tail)):
        return None
    return Turns(pieces, invited.removeprefix(written[1]), opening.removeprefix(head).removesuffix(tail))


def _write(tokenizer: Any, messages: list[dict[str, str]], **options: Any) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


def _adds_start(tokenizer: Any) -> bool:
    return bool(tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id])
