"""MT-Bench: eighty questions of two turns, each answer rated from 1 to 10 by a judge (arXiv 2306.05685).

Files are FastChat's, read and written: `question.jsonl`, `judge_prompts.jsonl` and, for questions that have one right
answer, `reference_answer/gpt-4.jsonl` (or `reference_gpt-4.jsonl`).
"""

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron.errors import UserError
from minitron.harness.answers import Answerer, Messages, Request, kept
from minitron.harness.judge import Judge
from minitron.harness.task_files import located, read_items
from minitron.progress import Progress

MAX_NEW_TOKENS = 1024
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""As the benchmark has them; the likeliest tokens elsewhere."""
WITH_REFERENCE = {"math", "reasoning", "coding"}
QUESTIONS, PROMPTS = ("mt_bench/question.jsonl", "question.jsonl"), ("judge_prompts.jsonl",)
REFERENCES = ("mt_bench/reference_answer/gpt-4.jsonl", "reference_answer/gpt-4.jsonl", "reference_gpt-4.jsonl")
RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]|\[(\d+\.?\d*)\]")


def missing(data: Path | None) -> str | None:
    """Why it cannot be run with these files."""
    if data is None:
        return "its questions are read from files: --tasks-data with FastChat's question.jsonl and judge_prompts.jsonl"
    lacking = [names[-1] for names in (QUESTIONS, PROMPTS) if located(data, *names) is None]
    return f"{data} holds no {lacking[0]}" if lacking else None


def run(answerer: Answerer, data: Path, folder: Path, limit: int | None, judge: Judge | None) -> dict[str, Any]:
    """Metrics of the answers, which are kept in `folder`; without a judge there are none."""
    questions = {row["question_id"]: row for row in _rows(data, QUESTIONS)[:limit]}
    told = kept(
        "MT-Bench answers", folder / "model_answer" / f"{answerer.name}.jsonl", list(questions), "question_id",
        lambda ids, stage: _answered(answerer, [questions[each] for each in ids], stage),
    )  # fmt: skip
    answers = {key: row["choices"][0]["turns"] for key, row in told.items()}
    if judge is None:
        return {"metrics": {}, "items": len(answers), "note": "not judged: name a judge with --judge"}
    references = {row["question_id"]: row["choices"][0]["turns"] for row in _rows(data, REFERENCES)}
    prompts = {row["name"]: row for row in _rows(data, PROMPTS)}

    def judged(keys: list[str], stage: str) -> list[dict[str, Any]]:
        rows = []
        with Progress(stage, len(keys), "judgements") as progress:
            for key in keys:
                number, turn = map(int, key.split("-"))
                rows.append(_judged(
                    judge, answerer.name, prompts, questions[number], references.get(number), answers[number], turn
                ))  # fmt: skip
                progress.advance(1)
        return rows

    found: dict[str, Any] = {"items": len(questions), "judge": judge.model}
    try:
        ratings = kept(
            "MT-Bench judgements",
            folder / "model_judgment" / f"{judge.model.replace('/', '_')}_single" / f"{answerer.name}.jsonl",
            [f"{key}-{turn}" for key in questions for turn in (1, 2)], "id", judged,
        )  # fmt: skip
    except UserError as error:  # the answers, and other benchmarks, are worth keeping
        return {**found, "metrics": {}, "note": f"not judged: {error}"}
    return {**found, "metrics": _means(questions, list(ratings.values()))}


def _answered(answerer: Answerer, questions: list[dict[str, Any]], stage: str) -> list[dict[str, Any]]:
    """Both turns of each question, the second with the model's own first answer before it."""
    chats: list[Messages] = [[] for _ in questions]
    for turn in range(2):
        for chat, question in zip(chats, questions, strict=True):
            chat.append({"role": "user", "content": question["turns"][turn]})
        answers = answerer.answers(
            [
                Request(list(chat), _room(answerer), TEMPERATURES.get(question["category"], 0.0))
                for chat, question in zip(chats, questions, strict=True)
            ],
            f"{stage}, turn {turn + 1}",
        )
        for chat, answer in zip(chats, answers, strict=True):
            chat.append({"role": "assistant", "content": answer})
    return [
        {
            "question_id": question["question_id"], "answer_id": f"{answerer.name}-{question['question_id']}",
            "model_id": answerer.name, "tstamp": time.time(),
            "choices": [{"index": 0, "turns": [message["content"] for message in chat[1::2]]}],
        }
        for chat, question in zip(chats, questions, strict=True)
    ]  # fmt: skip


def _room(answerer: Answerer) -> int:
    """Of a short context at most half, so that the question is not cut off."""
    return min(MAX_NEW_TOKENS, answerer.context // 2)


def _rows(data: Path, names: tuple[str, ...]) -> list[dict[str, Any]]:
    path = located(data, *names)
    return read_items(path) if path else []


def _judged(
    judge: Judge, name: str, prompts: Mapping[str, Any], question: dict[str, Any], reference: list[str] | None,
    answers: list[str], turn: int,
) -> dict[str, Any]:  # fmt: skip
    """A row of a single-answer judgement, the rating -1 where the judge gave none."""
    with_reference = question["category"] in WITH_REFERENCE
    if with_reference and reference is None:
        raise UserError(f"question {question['question_id']} needs a reference answer: reference_gpt-4.jsonl")
    prompt = prompts[f"single{'-math' if with_reference else ''}-v1{'-multi-turn' if turn == 2 else ''}"]
    filled = {"question": question["turns"][0], "answer": answers[0]}
    for i in range(2):
        filled |= {f"question_{i + 1}": question["turns"][i], f"answer_{i + 1}": answers[i]}
        filled |= {f"ref_answer_{i + 1}": reference[i]} if with_reference and reference else {}
    said = judge.says(
        [
            {"role": "system", "content": prompt["system_prompt"]},
            {"role": "user", "content": prompt["prompt_template"].format(**filled)},
        ]
    )
    found = RATING.search(said)
    return {
        "id": f"{question['question_id']}-{turn}", "question_id": question["question_id"], "model": name,
        "judge": [judge.model, prompt["name"]], "judgment": said, "turn": turn, "tstamp": time.time(),
        "score": float(found[1] or found[2]) if found else -1,
    }  # fmt: skip


def _means(questions: Mapping[int, dict[str, Any]], rows: list[dict[str, Any]]) -> dict[str, float]:
    """The mean rating, that of each turn and of each category, and how many answers got none."""
    rated = [row for row in rows if row["score"] >= 0]
    groups = {"rating": rated} | {f"turn_{turn}": [row for row in rated if row["turn"] == turn] for turn in (1, 2)}
    for row in rated:
        groups.setdefault(questions[row["question_id"]]["category"], []).append(row)
    means = {name: sum(row["score"] for row in part) / len(part) for name, part in groups.items() if part}
    return {**means, "unrated": float(len(rows) - len(rated))}
