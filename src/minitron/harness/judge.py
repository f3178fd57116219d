"""Asks a judge, a model at an endpoint with OpenAI's chat completions, to rate answers."""

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
    """A model at an endpoint such as `http://localhost:8000/v1`; the environment's OPENAI_API_KEY is its key.

    Raises:
        UserError: `url` is not an address of http or https.
    """

    url: str
    model: str
    wait: float = 2.0
    """Seconds before the second attempt, doubled for every further one."""

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"--judge {self.url}: must be an address such as http://localhost:8000/v1")

    def complete(self, messages: Messages, max_tokens: int = 2048) -> str:
        """Return the judge's answer at temperature 0; try again when the endpoint is busy or cannot be reached.

        Raises:
            UserError: the endpoint refuses the request, does not answer, or answers in another format.
        """
        request = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": max_tokens}
        endpoint = f"{self.url.rstrip('/')}/chat/completions"
        for attempt in range(ATTEMPTS):
            time.sleep(self.wait * 2 ** (attempt - 1) if attempt else 0)
            try:
                response = httpx.post(endpoint, json=request, headers=self._headers(), timeout=TIMEOUT)
            except (httpx.TransportError, httpx.InvalidURL) as error:
                problem = f"{type(error).__name__}: {error}"
                continue
            if response.is_success:
                return _content(response, endpoint)
            problem = f"status {response.status_code}: {response.text[:200]}"
            if response.status_code not in {408, 409, 429} and response.status_code < 500:
                break
        raise UserError(f"the judge at {endpoint} does not answer: {' '.join(problem.split())}")

    def _headers(self) -> dict[str, str]:
        key = os.environ.get("OPENAI_API_KEY")
        return {"Authorization": f"Bearer {key}"} if key else {}


def _content(response: Any, endpoint: str) -> str:
    try:
        return str(response.json()["choices"][0]["message"]["content"])
    except (ValueError, KeyError, IndexError, TypeError) as error:
        start = " ".join(response.text[:200].split())
        raise UserError(f"{endpoint} does not answer in the format of OpenAI's chat completions: {start}") from error
