"""ChatRAG-Bench: questions on documents and tables, asked in conversations (arXiv 2401.10225).

Read from a copy of the data set nvidia/ChatRAG-Bench: `data/coqa/dev.json` and so on, each a list of `messages`,
`ctxs` (passages, best first) and `answers`. What is measured is the F1 of words, for ConvFinQA whether the number or
formula is in the answer, as the benchmark's own scripts do.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.files import read_json
from minitron.harness.answers import Answerer, Messages, Request, kept
from minitron.harness.judge import Judge
from minitron.harness.task_files import located

MAX_NEW_TOKENS = 64
NUM_PASSAGES = 5
NUM_TURNS = 7
"""Of a conversation the last ones."""

SYSTEM = (
    "This is a chat between a user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions based on the context. The assistant should also indicate when the "
    "answer cannot be found in the context."
)
FULL = "Please give a full and complete answer for the question. "
NO_ANSWER = "Sorry. I cannot find the answer based on the context."
REFUSALS = re.compile(
    r"(can ?no?t|could ?no?t|can't|couldn't) (find|answer|be found|be determined|provide)|(un|not )able to"
    r"|(does not|doesn't) (provide|mention|specify|include|contain|indicate|disclose)|(do not|don't) have|don't know"
    r"|no information|there is no|not (mentioned|provided)|not explicitly (mentioned|explain)"
)
"""What counts as saying that the answer is not there, in QuAC and DoQA."""


@dataclass(frozen=True)
class Part:
    """One of the ten data sets: where it lies, and what the user is made to say before a question."""

    file: str
    asks: str = FULL
    is_first_turn: bool = False
    """The words go before the first of the user's turns, not the last."""
    may_refuse: bool = False
    adds_refusal: bool = False
    """Its files add `NO_ANSWER` to all right answers."""
    is_number: bool = False
    counts_with: str | None = None
    """Of several that count as one in the mean, their common name."""


PARTS = {
    "doc2dial": Part("doc2dial/test.json", is_first_turn=True),
    "quac": Part("quac/test.json", is_first_turn=True, may_refuse=True),
    "qrecc": Part("qrecc/test.json", is_first_turn=True),
    "topiocqa": Part(
        "topiocqa/dev.json", "Answer the following question with a short span, or a full and complete answer. "
    ),
    "inscit": Part("inscit/dev.json", is_first_turn=True, adds_refusal=True),
    "coqa": Part(
        "coqa/dev.json",
        "Answer the following question with a short span. The answer needs to be just in a few words. ",
    ),
    "hybridial": Part("hybridial/test.json", is_first_turn=True),
    "sqa": Part("sqa/test.json", "Answer the following question with one or a list of items. "),
    "doqa_cooking": Part("doqa/test_cooking.json", is_first_turn=True, may_refuse=True, counts_with="doqa"),
    "doqa_travel": Part("doqa/test_travel.json", is_first_turn=True, may_refuse=True, counts_with="doqa"),
    "doqa_movies": Part("doqa/test_movies.json", is_first_turn=True, may_refuse=True, counts_with="doqa"),
    "convfinqa": Part("convfinqa/dev.json", is_first_turn=True, is_number=True),
}


def missing(data: Path | None) -> str | None:
    """Why it cannot be run with these files."""
    if data is None:
        return "its questions are read from files: --tasks-data with a copy of the data set nvidia/ChatRAG-Bench"
    return None if _found(data) else f"{data} holds none of its files, such as coqa/dev.json"


def run(answerer: Answerer, data: Path, folder: Path, limit: int | None, judge: Judge | None) -> dict[str, Any]:
    """The score of each data set whose file is there, and their mean; DoQA's three count as one.

    `limit` is that of each data set.
    """
    scores, items, found = {}, 0, _found(data)
    for name, path in found.items():
        rows = read_json(path)[:limit]

        def answered(ids: list[int], stage: str, part: Part = PARTS[name], rows: Any = rows) -> list[dict[str, Any]]:
            told = answerer.answers([_request(answerer, part, rows[i]) for i in ids], stage)
            return [{"item": i, "answer": answer} for i, answer in zip(ids, told, strict=True)]

        answers = kept(f"ChatRAG {name}", folder / f"{name}.jsonl", list(range(len(rows))), "item", answered)
        scores[name] = (
            100 * sum(_score(PARTS[name], row, answers[i]["answer"]) for i, row in enumerate(rows)) / len(rows)
        )
        items += len(rows)
    groups: dict[str, list[float]] = {}
    for name, score in scores.items():
        groups.setdefault(PARTS[name].counts_with or name, []).append(score)
    means = [sum(group) / len(group) for group in groups.values()]
    lacking = sorted(PARTS.keys() - found.keys())
    note = {"note": f"without {', '.join(lacking)}: no files"} if lacking else {}
    return {"metrics": {"average": sum(means) / len(means), **scores}, "items": items, **note}


def _found(data: Path) -> dict[str, Path]:
    paths = {name: located(data, part.file) for name, part in PARTS.items()}
    return {name: path for name, path in paths.items() if path}


def _request(answerer: Answerer, part: Part, row: Mapping[str, Any]) -> Request:
    """The passages, as many words of them as there is room for, under the system's text; then the conversation."""
    turns = [dict(turn) for turn in row["messages"][-NUM_TURNS:]]
    of_user = [turn for turn in turns if turn["role"] == "user"]
    asked = of_user[0 if part.is_first_turn else -1]
    asked["content"] = part.asks + asked["content"]
    passages = "\n\n".join(f"title: {ctx['title']}, source: {ctx['text']}" for ctx in row["ctxs"][:NUM_PASSAGES])
    room = answerer.context - MAX_NEW_TOKENS - answerer.num_tokens(SYSTEM + "".join(turn["content"] for turn in turns))
    passages = answerer.beginning(passages, max(0, room - 16 * len(turns) - 16))
    messages: Messages = [{"role": "system", "content": f"{SYSTEM}\n\n{passages}"}, *turns]
    return Request(messages, MAX_NEW_TOKENS)


def _score(part: Part, row: Mapping[str, Any], answer: str) -> float:
    if part.is_number:
        return _has_number(row, answer)
    if part.may_refuse and REFUSALS.search(answer.lower()):
        answer = NO_ANSWER
    right = _answers(row)
    if part.adds_refusal:
        right = [each for each in right if each != NO_ANSWER] or right
    return max(word_f1(answer, each) for each in right)


def _answers(row: Mapping[str, Any]) -> list[str]:
    found = row.get("answers", row.get("answer"))
    return [str(each) for each in found] if isinstance(found, list) else [str(found)]


def word_f1(answer: str, right: str) -> float:
    """Harmonic mean of precision and recall of words, without case, punctuation and articles."""
    ours, theirs = _words(answer), _words(right)
    common = sum((ours & theirs).values())
    return 2 * common / (ours.total() + theirs.total()) if common else 0.0


def _words(text: str) -> Counter[str]:
    plain = "".join(" " if letter in string.punctuation else letter for letter in text.lower())
    return Counter(word for word in plain.split() if word not in {"a", "an", "the"})


def _has_number(row: Mapping[str, Any], answer: str) -> bool:
    """Whether the answer holds the number that is right, in one of the ways to write it, or its formula."""
    said = re.sub(r"\((\b\w+\b)\)", "", re.sub(r"[$,]|million|billion", "", answer))
    said = " ".join(said.split())
    gold = row.get("exe_answer")
    ways = [str(gold), *_answers(row)[:1]]
    try:
        number = float(str(gold))
    except ValueError:
        return any(way in said for way in ways)
    ways += [str(round(number, 3)), str(round(number, 2))]
    if "percent" in row["messages"][-1]["content"]:
        ways += [str(number * 100), str(round(number * 100, 1)), str(round(number * 100, 2))]
    if number == int(number):
        ways.append(str(int(number)))
    if isinstance(gold, (int, float)) and gold < 0 and "decrease" in said:
        ways.append(str(-gold))
    return any(way in said for way in ways)
