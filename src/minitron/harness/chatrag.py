"""Runs ChatRAG-Bench: questions about documents and tables, asked in conversations (arXiv 2401.10225).

The data is read from a copy of the data set nvidia/ChatRAG-Bench: `data/coqa/dev.json` and similar files, each a list
of objects with `messages`, `ctxs` (passages, best first) and `answers`. The score is the F1 of words; for ConvFinQA it
is whether the answer holds the right number or formula. The benchmark's own scripts score likewise.
"""

import re
import string
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.files import read_json
from minitron.harness.answers import Answerer, Messages, Request, cached_rows
from minitron.harness.interface import Benchmark, Inputs
from minitron.harness.local_files import find_path

MAX_NEW_TOKENS = 64
NUM_PASSAGES = 5
"""The number of passages in a prompt."""
NUM_TURNS = 7
"""The number of last messages of a conversation in a prompt."""

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
"""In QuAC and DoQA, an answer that matches counts as `NO_ANSWER`."""


@dataclass(frozen=True)
class DataSet:
    """One of the benchmark's data sets: its file, and the instruction that precedes a question."""

    file: str
    instruction: str = FULL
    is_first_turn: bool = False
    """Whether the instruction precedes the user's first message rather than the last."""
    may_refuse: bool = False
    """Whether a refusal to answer counts as `NO_ANSWER`."""
    adds_refusal: bool = False
    """Whether its file adds `NO_ANSWER` to all right answers."""
    is_number: bool = False
    """Whether answers are numbers."""
    group: str | None = None
    """The name under which several data sets count as one in the mean."""


DATA_SETS = {
    "doc2dial": DataSet("doc2dial/test.json", is_first_turn=True),
    "quac": DataSet("quac/test.json", is_first_turn=True, may_refuse=True),
    "qrecc": DataSet("qrecc/test.json", is_first_turn=True),
    "topiocqa": DataSet(
        "topiocqa/dev.json", "Answer the following question with a short span, or a full and complete answer. "
    ),
    "inscit": DataSet("inscit/dev.json", is_first_turn=True, adds_refusal=True),
    "coqa": DataSet(
        "coqa/dev.json",
        "Answer the following question with a short span. The answer needs to be just in a few words. ",
    ),
    "hybridial": DataSet("hybridial/test.json", is_first_turn=True),
    "sqa": DataSet("sqa/test.json", "Answer the following question with one or a list of items. "),
    "doqa_cooking": DataSet("doqa/test_cooking.json", is_first_turn=True, may_refuse=True, group="doqa"),
    "doqa_travel": DataSet("doqa/test_travel.json", is_first_turn=True, may_refuse=True, group="doqa"),
    "doqa_movies": DataSet("doqa/test_movies.json", is_first_turn=True, may_refuse=True, group="doqa"),
    "convfinqa": DataSet("convfinqa/dev.json", is_first_turn=True, is_number=True),
}


def obstacle(inputs: Inputs) -> str | None:
    """Return the reason why the benchmark cannot be run, or None."""
    if inputs.data is None:
        return "its questions are read from files: --tasks-data with a copy of the data set nvidia/ChatRAG-Bench"
    return None if _paths(inputs.data) else f"{inputs.data} holds none of its files, such as coqa/dev.json"


def run(answerer: Answerer, inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Return the score of each data set whose file exists, and their mean, in which DoQA's three count as one.

    The answers are cached in `folder`; the limit applies to each data set.
    """
    assert inputs.data is not None
    scores, items, paths = {}, 0, _paths(inputs.data)
    for name, path in paths.items():
        data_set, rows = DATA_SETS[name], read_json(path)[: inputs.limit]

        def make(numbers: list[int], stage: str, part: DataSet = data_set, rows: Any = rows) -> list[dict[str, Any]]:
            answers = answerer.answers([_request(answerer, part, rows[i]) for i in numbers], stage)
            return [{"item": i, "answer": answer} for i, answer in zip(numbers, answers, strict=True)]

        answers = cached_rows(f"ChatRAG {name}", folder / f"{name}.jsonl", list(range(len(rows))), "item", make)
        scores[name] = 100 * sum(_score(data_set, row, answers[i]["answer"]) for i, row in enumerate(rows)) / len(rows)
        items += len(rows)
    groups: dict[str, list[float]] = {}
    for name, score in scores.items():
        groups.setdefault(DATA_SETS[name].group or name, []).append(score)
    means = [sum(group) / len(group) for group in groups.values()]
    missing = sorted(DATA_SETS.keys() - paths.keys())
    note = {"note": f"without {', '.join(missing)}: no files"} if missing else {}
    return {"metrics": {"average": sum(means) / len(means), **scores}, "items": items, **note}


BENCHMARK = Benchmark(obstacle, run, longest_answer=MAX_NEW_TOKENS)


def _paths(data: Path) -> dict[str, Path]:
    paths = {name: find_path(data, data_set.file) for name, data_set in DATA_SETS.items()}
    return {name: path for name, path in paths.items() if path}


def _request(answerer: Answerer, data_set: DataSet, row: Mapping[str, Any]) -> Request:
    """Return system prompt, passages and conversation as a request; passages that exceed the context are cut off."""
    turns = [dict(turn) for turn in row["messages"][-NUM_TURNS:]]
    user_turns = [turn for turn in turns if turn["role"] == "user"]
    question = user_turns[0 if data_set.is_first_turn else -1]
    question["content"] = data_set.instruction + question["content"]
    passages = "\n\n".join(f"title: {ctx['title']}, source: {ctx['text']}" for ctx in row["ctxs"][:NUM_PASSAGES])
    room = answerer.context - MAX_NEW_TOKENS - answerer.num_tokens(SYSTEM + "".join(turn["content"] for turn in turns))
    passages = answerer.beginning(passages, max(0, room - 16 * len(turns) - 16))
    messages: Messages = [{"role": "system", "content": f"{SYSTEM}\n\n{passages}"}, *turns]
    return Request(messages, MAX_NEW_TOKENS)


def _score(data_set: DataSet, row: Mapping[str, Any], answer: str) -> float:
    if data_set.is_number:
        return _has_number(row, answer)
    if data_set.may_refuse and REFUSALS.search(answer.lower()):
        answer = NO_ANSWER
    right_answers = _right_answers(row)
    if data_set.adds_refusal:
        right_answers = [right for right in right_answers if right != NO_ANSWER] or right_answers
    return max(word_f1(answer, right) for right in right_answers)


def _right_answers(row: Mapping[str, Any]) -> list[str]:
    answers = row.get("answers", row.get("answer"))
    return [str(answer) for answer in answers] if isinstance(answers, list) else [str(answers)]


def word_f1(answer: str, right: str) -> float:
    """Return the harmonic mean of precision and recall of words, without case, punctuation and articles."""
    words, right_words = _words(answer), _words(right)
    num_common = sum((words & right_words).values())
    return 2 * num_common / (words.total() + right_words.total()) if num_common else 0.0


def _words(text: str) -> Counter[str]:
    plain = "".join(" " if letter in string.punctuation else letter for letter in text.lower())
    return Counter(word for word in plain.split() if word not in {"a", "an", "the"})


def _has_number(row: Mapping[str, Any], answer: str) -> bool:
    """Return whether the answer holds the right number, in one of the ways to write it, or its formula."""
    answer = re.sub(r"\((\b\w+\b)\)", "", re.sub(r"[$,]|million|billion", "", answer))
    answer = " ".join(answer.split())
    gold = row.get("exe_answer")
    ways = [str(gold), *_right_answers(row)[:1]]
    try:
        number = float(str(gold))
    except ValueError:
        return any(way in answer for way in ways)
    ways += [str(round(number, 3)), str(round(number, 2))]
    if "percent" in row["messages"][-1]["content"]:
        ways += [str(number * 100), str(round(number * 100, 1)), str(round(number * 100, 2))]
    if number == int(number):
        ways.append(str(int(number)))
    if isinstance(gold, (int, float)) and gold < 0 and "decrease" in answer:
        ways.append(str(-gold))
    return any(way in answer for way in ways)
