"""Chats that a teacher answers itself, for its student to learn from, and answers by which both are compared."""

import math
from pathlib import Path
from typing import Any

import torch

from minitron.data.chats import Chat
from minitron.data.prompts import built_in_prompts, read_prompts
from minitron.data.tokens import load_tokenizer
from minitron.errors import UserError
from minitron.evaluation.answering import Answerer, write_answers
from minitron.evaluation.generation import Sampling
from minitron.evaluation.perplexity import next_token_nll
from minitron.model.checkpoint import Checkpoint
from minitron.model.language_model import Head, Headless
from minitron.progress import announce
from minitron.session import Session

CHATS = "chats.jsonl"
"""The file of a run that holds the teacher's chats."""
TOKENS_PER_CHAT, LEAST_CHATS = 96, 8
"""About how many tokens a chat is expected to have, and how many chats are made at least."""
ANSWER_TOKENS = 64
"""The most tokens of an answer by which models are compared."""


def require_conversing(session: Session) -> None:
    """Check that the teacher can answer chats where the recipe asks for them, before any work.

    Raises:
        UserError: it has no chat template, or the prompts cannot be read.
    """
    recipe = session.recipe.chats
    if not recipe.share:
        return
    if not load_tokenizer(session.teacher.folder).chat_template:
        raise UserError("chats.share: the teacher has no chat template, so it answers no chats: leave it out")
    if recipe.prompts is not None:
        read_prompts(Path(recipe.prompts).expanduser())


def announce_silence(session: Session) -> None:
    """State that a student of a chat model will hardly answer, where its training text holds no chats."""
    if session.recipe.chats.share or session.splits.train.leaves_text_unlearnt:
        return
    if load_tokenizer(session.teacher.folder).chat_template:
        announce(
            "the teacher answers chats and the text holds none, so that the student will hardly answer; --chats 0.1 "
            "mixes in chats of the teacher"
        )


def write_chats(session: Session, out: Path) -> None:
    """Let the teacher answer prompts into the file `out`: as many as fill the share of the training text.

    These are fewer where the list of prompts ends; training reads them again then.
    """
    recipe, distill = session.recipe.chats, session.recipe.distill
    chats = read_prompts(Path(recipe.prompts).expanduser()) if recipe.prompts else built_in_prompts()[0]
    tokens = max(recipe.share * distill.tokens, 2 * session.context)
    chats = chats[: max(LEAST_CHATS, math.ceil(tokens / TOKENS_PER_CHAT))]
    with session.teacher_model() as model:
        sampling = Sampling(max_new_tokens=recipe.max_new_tokens, seed=session.recipe.seed)
        answerer = Answerer(model, load_tokenizer(session.teacher.folder), sampling)
        write_answers(out, answerer, chats, {"model": session.teacher.fingerprint()})


def answers_of(session: Session, checkpoint: Checkpoint, model: Any) -> list[dict[str, str]]:
    """Return what a model answers, greedily, to the built-in questions that no training reads."""
    answerer = Answerer(model, load_tokenizer(checkpoint.folder), Sampling(max_new_tokens=ANSWER_TOKENS))
    prompts = [(chat, answerer.prompt(chat)) for chat in built_in_prompts()[1]]
    answers = answerer.answers([prompt for _, prompt in prompts], 0)
    pairs = zip(prompts, answers, strict=True)
    return [{"asked": _asked(chat), "prompt": prompt, "answer": answer} for (chat, prompt), (answer, _) in pairs]


@torch.no_grad()
def teacher_nats(session: Session, answers: list[dict[str, str]]) -> float | None:
    """Return the teacher's negative log-likelihood of answers, in nats per token of its own; None: all are empty."""
    tokenizer, nats, num_tokens = load_tokenizer(session.teacher.folder), 0.0, 0
    with session.teacher_model() as model:
        headless, device = Headless(model), next(model.parameters()).device
        for each in answers:
            prompt, answer = (
                tokenizer(each[name], add_special_tokens=False).input_ids for name in ("prompt", "answer")
            )
            ids = torch.tensor([[*prompt, *answer]], device=device)
            targets = torch.full_like(ids, -100)
            targets[0, len(prompt) - 1 : -1] = ids[0, len(prompt) :]

            def read(hidden: torch.Tensor, head: Head, targets: torch.Tensor = targets) -> torch.Tensor:
                return next_token_nll(hidden, head, targets)

            if answer:
                nats += float(headless(ids, read))
                num_tokens += len(answer)
    return nats / num_tokens if num_tokens else None


def _asked(chat: Chat) -> str:
    return str(chat.messages[-1]["content"])
