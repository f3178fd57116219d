"""Loads a model as lm-eval's `HFLM`, and lm-eval's definitions of tasks."""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from minitron.errors import UserError
from minitron.progress import Progress


def load_lm(folder: Path, device: str, dtype: str, batch_size: int = 8) -> Any:
    """Load a model folder as lm-eval's `HFLM`, with this project's progress lines instead of lm-eval's.

    Raises:
        UserError: lm-eval is not installed.
    """
    lm_eval()
    from lm_eval.models.huggingface import HFLM

    class HFLMWithProgress(HFLM):  # type: ignore[misc]
        stage = ""
        num_cut = 0
        """The number of prompts so far that lost their beginning, as they were longer than the context."""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            with Progress(self.stage, len(requests), "answers") as self.progress:
                results = super().loglikelihood(requests, disable_tqdm=True)
                # Requests that continue one text by a single token are answered by one call of the model.
                self.progress.advance(len(requests) - self.progress.done)
                return results

        def _loglikelihood_tokens(self, requests: Any, *args: Any, **options: Any) -> Any:
            self.num_cut += sum(len(text) + len(answer) > self.max_length + 1 for _, text, answer in requests)
            return super()._loglikelihood_tokens(requests, *args, **options)

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            for text, options in (request.args for request in requests):
                room = self.max_length - options.get("max_gen_toks", self.max_gen_toks)
                self.num_cut += len(self.tok_encode(text)) > room
            with Progress(self.stage, len(requests), "answers") as self.progress:
                return super().generate_until(requests, disable_tqdm=True)

        def _model_call(self, inps: Any, *args: Any, **options: Any) -> Any:
            logits = super()._model_call(inps, *args, **options)
            self.progress.advance(len(inps))
            return logits

        def _model_generate(self, context: Any, *args: Any, **options: Any) -> Any:
            tokens = super()._model_generate(context, *args, **options)
            self.progress.advance(len(context))
            return tokens

    with warnings.catch_warnings(action="ignore"):
        return HFLMWithProgress(pretrained=str(folder), device=device, dtype=dtype, batch_size=batch_size)


@cache  # reads more than ten thousand files
def task_manager() -> Any:
    """Return lm-eval's task manager, which knows its definitions of tasks and those in `definitions`."""
    lm_eval()
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(Path(__file__).parent / "definitions"))


@contextmanager
def defined_in(folder: Path | None) -> Iterator[Any]:
    """Yield the task manager of `task_manager`, where the definitions in `folder` replace lm-eval's own meanwhile."""
    from lm_eval.tasks import TaskManager

    index = task_manager().task_index
    own = dict(index)
    index.update(TaskManager(include_path=str(folder), include_defaults=False).task_index if folder else {})
    try:
        yield task_manager()
    finally:
        index.clear()
        index.update(own)


def lm_eval() -> Any:
    """Import and return the package lm-eval, with its log reduced to errors.

    Raises:
        UserError: lm-eval is not installed.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns about every prompt that it truncates
    try:
        import lm_eval as package
    except ImportError as error:
        raise UserError("tasks need lm-eval: pip install 'minitron[eval]'") from error
    return package
