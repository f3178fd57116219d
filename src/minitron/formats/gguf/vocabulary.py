"""The tokenizer as GGUF files hold it: tokens, their scores and types, merges, special tokens and the chat template.

Everything is read from the tokenizer that transformers runs, not from the files that it was made of, so that the file
tokenises as the model was trained to read.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from gguf import TokenType

from minitron.errors import UserError

SPACE = "\u2581"
"""What SentencePiece writes for a space."""

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_SLASHED = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

LLAMA3 = _WORDS + r"\p{N}{1,3}" + _REST
QWEN2 = _WORDS + r"\p{N}" + _REST
GPT4O = f"{_UPPER}*{_LOWER}+{_ENDING}|{_UPPER}+{_LOWER}*{_ENDING}|" + r"\p{N}{1,3}" + _SLASHED
TEKKEN = f"{_UPPER}*{_LOWER}+|{_UPPER}+{_LOWER}*|" + r"\p{N}" + _SLASHED
DIGITS = "one digit at a time"

SPLITS = {
    ((GPT2,), False): "gpt-2",
    ((DIGITS, GPT2), False): "smollm",
    ((LLAMA3,), False): "dbrx",
    ((LLAMA3,), True): "llama-bpe",
    ((QWEN2,), False): "qwen2",
    ((GPT4O,), False): "gpt-4o",
    ((TEKKEN,), True): "tekken",
}
"""llama.cpp's names for how text is split before it is merged (`src/llama-vocab.cpp`, llm_tokenizer_bpe), by the
patterns in order, and by whether a piece that is a token stays whole whatever the merges are.

The patterns are those that tokenizers have. llama.cpp's converter finds the names by a hash of token ids instead, which
a vocabulary that was trimmed does not have any more.
"""


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF file states about a tokenizer."""

    model: str
    """`gpt2` for merges of bytes, `llama` for SentencePiece."""
    split: str
    tokens: list[str]
    types: list[int]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    special: dict[str, int] = field(default_factory=dict)
    """The ids of special tokens, by role: bos, eos, eot and so on."""
    adds: dict[str, bool] = field(default_factory=dict)
    """Whether a text gets a `bos` and an `eos` token."""
    adds_space: bool | None = None
    """Whether a text gets a space before it; None where the model has no such rule."""
    template: str | list[dict[str, str]] | None = None


def read_vocabulary(tokenizer: Any, size: int, ends: list[int]) -> Vocabulary:
    """Read the tokenizer of a model that has `size` embeddings and stops at any token of `ends`.

    Raises:
        UserError: llama.cpp has no tokenizer of this kind.
    """
    stated = json.loads(tokenizer.backend_tokenizer.to_str())
    model = stated["model"]
    if model["type"] != "BPE":
        raise UserError(f"llama.cpp runs this family with BPE tokenizers only, and this one is {model['type']}")
    added = {token["id"]: token for token in stated["added_tokens"]}
    texts = {number: text for text, number in model["vocab"].items()}
    texts |= {number: token["content"] for number, token in added.items()}
    if max(texts) >= size:
        raise UserError(f"the tokenizer has a token {max(texts)}, and the model embeddings for {size} tokens")
    is_sentencepiece = bool(model["byte_fallback"])
    tokens = [texts.get(i, f"[PAD{i}]") for i in range(size)]
    types = [int(_type(i, texts, added, model)) for i in range(size)]
    shared: dict[str, Any] = {
        "special": _special(tokenizer, ends),
        "adds": _added_around(tokenizer),
        "template": _template(tokenizer),
    }
    merges = [tuple(merge.split(" ")) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    if not merges:
        raise UserError("the tokenizer has no merges, and llama.cpp does not load a BPE tokenizer without them")
    if is_sentencepiece:
        tokens = [token.replace(SPACE, " ") if i in added else token for i, token in enumerate(tokens)]
        adds_space = _adds_space(stated)
        return Vocabulary("llama", "default", tokens, types, _scores(tokens, merges), adds_space=adds_space, **shared)
    if stated["normalizer"] not in (None, {"type": "NFC"}):  # text is NFC as a rule; llama.cpp normalises none
        raise UserError(f"llama.cpp does not normalise text, and this tokenizer does: {stated['normalizer']['type']}")
    lines = [" ".join(merge) for merge in merges]
    return Vocabulary("gpt2", _split(stated), tokens, types, merges=lines, **shared)


def _type(number: int, texts: dict[int, str], added: dict[int, Any], model: dict[str, Any]) -> TokenType:
    if number not in texts:
        return TokenType.UNUSED
    text = texts[number]
    if model["byte_fallback"] and text == model.get("unk_token"):
        return TokenType.UNKNOWN
    if number in added:
        return TokenType.CONTROL if added[number]["special"] else TokenType.USER_DEFINED
    is_byte = model["byte_fallback"] and len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return TokenType.BYTE if is_byte else TokenType.NORMAL


def _scores(tokens: list[str], merges: list[tuple[str, ...]]) -> list[float]:
    """Return scores with which the best pair is merged first, as the order of merges does."""
    ranks: dict[str, int] = {}
    for rank, merge in enumerate(merges):
        ranks.setdefault("".join(merge), rank)
    return [-float(ranks.get(token, len(merges))) for token in tokens]


def _split(stated: dict[str, Any]) -> str:
    steps = stated["pre_tokenizer"] or {"type": "none"}
    patterns: list[str] = []
    for step in steps.get("pretokenizers", [steps]):
        if step["type"] == "ByteLevel" and not step.get("add_prefix_space"):
            patterns += [GPT2] if step.get("use_regex", True) else []
        elif step["type"] == "Digits" and step["individual_digits"]:
            patterns.append(DIGITS)
        elif step["type"] == "Split" and (step["behavior"], step["invert"]) in {("Isolated", False), ("Removed", True)}:
            patterns.append(str(step["pattern"].get("Regex")))
        else:
            patterns.append(step["type"])
    name = SPLITS.get((tuple(patterns), bool(stated["model"].get("ignore_merges"))))
    if name is None:
        raise UserError(
            f"llama.cpp has no name known here for how this tokenizer splits text: {' then '.join(patterns) or 'not'}"
        )
    return name


def _adds_space(stated: dict[str, Any]) -> bool:
    """Return whether a SentencePiece tokenizer puts a space before a text."""
    normalizer, before = stated["normalizer"] or {}, stated["pre_tokenizer"] or {}
    steps = normalizer.get("normalizers", [normalizer]) + before.get("pretokenizers", [before])
    return any(
        step.get("type") == "Prepend" or (step.get("type") == "Metaspace" and step.get("prepend_scheme") != "never")
        for step in steps
    )


def _added_around(tokenizer: Any) -> dict[str, bool]:
    """Return whether `bos` and `eos` are added to a text, from what the tokenizer does."""
    text = "a"
    plain, whole = (tokenizer(text, add_special_tokens=adds)["input_ids"] for adds in (False, True))
    start = next((i for i in range(len(whole) + 1) if whole[i : i + len(plain)] == plain), 0)
    before, after = whole[:start], whole[start + len(plain) :]
    if before not in ([], [tokenizer.bos_token_id]) or after not in ([], [tokenizer.eos_token_id]):
        raise UserError("llama.cpp adds one bos and one eos token at most to a text, and this tokenizer adds others")
    return {"bos": bool(before), "eos": bool(after)}


def _special(tokenizer: Any, ends: list[int]) -> dict[str, int]:
    roles = ("bos", "eos", "unk", "sep", "pad", "mask")
    found = {role: getattr(tokenizer, f"{role}_token_id", None) for role in roles}
    further = [number for number in ends if number != found["eos"]]
    found |= dict(zip(("eot", "eom"), further, strict=False))
    return {role: int(number) for role, number in found.items() if number is not None}


def _template(tokenizer: Any) -> str | list[dict[str, str]] | None:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        return [{"name": name, "template": text} for name, text in template.items()]
    return template or None
