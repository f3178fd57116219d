"""lm-eval: a model as it has one, and the definitions that it knows."""

import logging
import os
import warnings
from functools import cache
from pathlib import Path
from typing import Any

from minitron.errors import UserError
from minitron.progress import Progress


def load_lm(folder: Path, device: str, dtype: str, batch_size: int = 8) -> Any:
    """A model folder as lm-eval has it, an `HFLM`, whose progress is shown as everywhere else.

    Raises:
        UserError: lm-eval is not installed.
    """
    lm_eval()
    from lm_eval.models.huggingface import HFLM

    class Shown(HFLM):  # type: ignore[misc]
        stage = ""

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            with Progress(self.stage, len(requests), "answers") as self.progress:
                found = super().loglikelihood(requests, disable_tqdm=True)
                # Those that continue one text by one token are answered by one call.
                self.progress.advance(len(requests) - self.progress.done)
                return found

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> Any:
            with Progress(self.stage, len(requests), "answers") as self.progress:
                return super().generate_until(requests, disable_tqdm=True)

        def _model_call(self, inps: Any, *args: Any, **options: Any) -> Any:
            found = super()._model_call(inps, *args, **options)
            self.progress.advance(len(inps))
            return found

        def _model_generate(self, context: Any, *args: Any, **options: Any) -> Any:
            found = super()._model_generate(context, *args, **options)
            self.progress.advance(len(context))
            return found

    with warnings.catch_warnings(action="ignore"):
        return Shown(pretrained=str(folder), device=device, dtype=dtype, batch_size=batch_size)


@cache  # it reads some thousand files
def manager(include: Path | None = None) -> Any:
    """Knows lm-eval's definitions of tasks, and those of a folder."""
    lm_eval()
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(include) if include else None)


def lm_eval() -> Any:
    """The package.

    Raises:
        UserError: it is not installed.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it speaks of every prompt that it cuts
    try:
        import lm_eval as package
    except ImportError as error:
        raise UserError("tasks need lm-eval: pip install 'minitron[eval]'") from error
    return package
