"""Runs MT-Bench: 80 questions of two turns, with answers that a judge rates from 1 to 10 (arXiv 2306.05685).

The files read and written have FastChat's formats: `question.jsonl`, `judge_prompts.jsonl` and, for questions with one
right answer, `reference_answer/gpt-4.jsonl` (or `reference_gpt-4.jsonl`).
"""

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.errors import UserError
from minitron.harness.answers import Answerer, Messages, Request, cached_rows
from minitron.harness.interface import Benchmark, Inputs
from minitron.harness.judge import Judge
from minitron.harness.local_files import find_path, read_rows
from minitron.progress import Progress

Question = dict[str, Any]

MAX_NEW_TOKENS = 1024
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""The benchmark's sampling temperatures by category; the other categories are greedy."""
WITH_REFERENCE = {"math", "reasoning", "coding"}
"""The categories whose answers are rated against a reference answer."""
QUESTIONS, PROMPTS = ("mt_bench/question.jsonl", "question.jsonl"), ("judge_prompts.jsonl",)
REFERENCES = ("mt_bench/reference_answer/gpt-4.jsonl", "reference_answer/gpt-4.jsonl", "reference_gpt-4.jsonl")
RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]|\[(\d+\.?\d*)\]")


def obstacle(inputs: Inputs) -> str | None:
    """Return the reason why the benchmark cannot be run, or None.

    Raises:
        UserError: see `read_rows`.
    """
    data = inputs.data
    if data is None:
        return "its questions are read from files: --tasks-data with FastChat's question.jsonl and judge_prompts.jsonl"
    for names in (QUESTIONS, PROMPTS):
        if find_path(data, *names) is None:
            return f"{data} holds no {names[-1]}"
    if inputs.judge is not None:
        references = _references(data)
        for number, question in _questions(inputs).items():
            if question["category"] in WITH_REFERENCE and number not in references:
                return f"{data} holds no reference answer to question {number}, which its judge needs: {REFERENCES[-1]}"
    return None


def run(answerer: Answerer, inputs: Inputs, folder: Path) -> dict[str, Any]:
    """Return the mean ratings; answers and judgements are cached in `folder`. Without a judge there are no metrics."""
    assert inputs.data is not None
    questions = _questions(inputs)

    def answer(numbers: list[int], stage: str) -> list[dict[str, Any]]:
        return _answer(answerer, [questions[number] for number in numbers], stage)

    path = folder / "model_answer" / f"{answerer.name}.jsonl"
    rows = cached_rows("MT-Bench answers", path, list(questions), "question_id", answer)
    answers = {number: row["choices"][0]["turns"] for number, row in rows.items()}
    judge = inputs.judge
    if judge is None:
        return {"metrics": {}, "items": len(answers), "note": "not judged: name a judge with --judge"}
    prompts = {row["name"]: row for row in _rows(inputs.data, PROMPTS)}
    grading = _Grading(judge, prompts, _references(inputs.data), answerer.name)

    def grade(keys: list[str], stage: str) -> list[dict[str, Any]]:
        judgements = []
        with Progress(stage, len(keys), "judgements") as progress:
            for key in keys:
                number, turn = map(int, key.split("-"))
                judgements.append(grading.grade(questions[number], answers[number], turn))
                progress.advance(1)
        return judgements

    path = folder / "model_judgment" / f"{judge.model.replace('/', '_')}_single" / f"{answerer.name}.jsonl"
    keys = [f"{number}-{turn}" for number in questions for turn in (1, 2)]
    result: dict[str, Any] = {"items": len(questions), "judge": judge.model}
    try:
        judgements = cached_rows("MT-Bench judgements", path, keys, "id", grade)
    except UserError as error:  # the answers, and the results of other benchmarks, are worth keeping
        return {**result, "metrics": {}, "note": f"not judged: {error}"}
    return {**result, "metrics": _means(questions, list(judgements.values()))}


BENCHMARK = Benchmark(obstacle, run)


@dataclass(frozen=True)
class _Grading:
    """Single-answer grading by a judge."""

    judge: Judge
    prompts: Mapping[str, Any]
    """The judge's prompts by name."""
    references: Mapping[int, list[str]]
    """The reference answers to both turns by question."""
    model_name: str

    def grade(self, question: Question, answers: list[str], turn: int) -> dict[str, Any]:
        """Return the row of one judgement; its score is −1 if the judge's answer holds no rating."""
        has_reference = question["category"] in WITH_REFERENCE
        prompt = self.prompts[f"single{'-math' if has_reference else ''}-v1{'-multi-turn' if turn == 2 else ''}"]
        fields = {"question": question["turns"][0], "answer": answers[0]}
        for i in range(2):
            fields |= {f"question_{i + 1}": question["turns"][i], f"answer_{i + 1}": answers[i]}
            if has_reference:
                fields[f"ref_answer_{i + 1}"] = self.references[question["question_id"]][i]
        messages = [
            {"role": "system", "content": prompt["system_prompt"]},
            {"role": "user", "content": prompt["prompt_template"].format(**fields)},
        ]
        judgement = self.judge.complete(messages)
        rating = RATING.search(judgement)
        return {
            "id": f"{question['question_id']}-{turn}",
            "question_id": question["question_id"],
            "model": self.model_name,
            "judge": [self.judge.model, prompt["name"]],
            "judgment": judgement,
            "turn": turn,
            "tstamp": time.time(),
            "score": float(rating[1] or rating[2]) if rating else -1,
        }


def _answer(answerer: Answerer, questions: list[Question], stage: str) -> list[dict[str, Any]]:
    """Answer both turns of each question, the second turn after the model's own first answer."""
    # At most half of a short context, so that the question is not cut off.
    max_new_tokens = min(MAX_NEW_TOKENS, answerer.context // 2)
    chats: list[Messages] = [[] for _ in questions]
    for turn in range(2):
        requests = []
        for chat, question in zip(chats, questions, strict=True):
            chat.append({"role": "user", "content": question["turns"][turn]})
            requests.append(Request(list(chat), max_new_tokens, TEMPERATURES.get(question["category"], 0.0)))
        answers = answerer.answers(requests, f"{stage}, turn {turn + 1}")
        for chat, answer in zip(chats, answers, strict=True):
            chat.append({"role": "assistant", "content": answer})
    return [
        {
            "question_id": question["question_id"],
            "answer_id": f"{answerer.name}-{question['question_id']}",
            "model_id": answerer.name,
            "tstamp": time.time(),
            "choices": [{"index": 0, "turns": [message["content"] for message in chat[1::2]]}],
        }
        for chat, question in zip(chats, questions, strict=True)
    ]


def _questions(inputs: Inputs) -> dict[int, Question]:
    assert inputs.data is not None
    return {row["question_id"]: row for row in _rows(inputs.data, QUESTIONS)[: inputs.limit]}


def _references(data: Path) -> dict[int, list[str]]:
    return {row["question_id"]: row["choices"][0]["turns"] for row in _rows(data, REFERENCES)}


def _rows(data: Path, names: tuple[str, ...]) -> list[dict[str, Any]]:
    path = find_path(data, *names)
    return read_rows(path) if path else []


def _means(questions: Mapping[int, Question], judgements: list[dict[str, Any]]) -> dict[str, float]:
    """Return the mean rating, the means by turn and by category, and the number of answers without a rating."""
    rated = [row for row in judgements if row["score"] >= 0]
    groups = {"rating": rated} | {f"turn_{turn}": [row for row in rated if row["turn"] == turn] for turn in (1, 2)}
    for row in rated:
        groups.setdefault(questions[row["question_id"]]["category"], []).append(row)
    means = {name: sum(row["score"] for row in group) / len(group) for name, group in groups.items() if group}
    return {**means, "unrated": float(len(judgements) - len(rated))}
