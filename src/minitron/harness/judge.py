"""A judge: a model behind an endpoint that speaks OpenAI's chat completions."""

import os
import time
from dataclasses import dataclass
from typing import Any

import httpx

from minitron.errors import UserError
from minitron.harness.answers import Messages

ATTEMPTS = 5
TIMEOUT = 300.0
"""Seconds for one judgement."""


@dataclass(frozen=True)
class Judge:
    """Where it is (`http://localhost:8000/v1`), and which model is asked there; the key is `OPENAI_API_KEY`."""

    url: str
    model: str
    wait: float = 2.0
    """Seconds before the second attempt, doubled for every further one."""

    def says(self, messages: Messages, max_tokens: int = 2048) -> str:
        """What the judge answers, at a temperature of 0; asked again when it is busy or out of reach.

        Raises:
            UserError: it refuses, does not answer, or answers in another form.
        """
        asked = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}
        where, answer = f"{self.url.rstrip('/')}/chat/completions", None
        for attempt in range(ATTEMPTS):
            time.sleep(self.wait * 2 ** (attempt - 1) if attempt else 0)
            try:
                answer = httpx.post(where, json=asked, headers=self._headers(), timeout=TIMEOUT)
            except (httpx.TransportError, httpx.InvalidURL) as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if answer.is_success:
                return _content(answer, where)
            problem = f"status {answer.status_code}: {answer.text[:200]}"
            if answer.status_code not in {408, 409, 429} and answer.status_code < 500:
                break
        raise UserError(f"the judge at {where} does not answer: {problem}")

    def _headers(self) -> dict[str, str]:
        key = os.environ.get("OPENAI_API_KEY")
        return {"Authorization": f"Bearer {key}"} if key else {}


def _content(answer: Any, where: str) -> str:
    try:
        return str(answer.json()["choices"][0]["message"]["content"])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise UserError(f"{where} does not answer as OpenAI's chat completions do: {answer.text[:200]}") from error
