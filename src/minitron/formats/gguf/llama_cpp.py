"""llama.cpp itself, where llama-cpp-python is installed: quantises files, and runs them to compare.

Every call runs in a process of its own, since llama.cpp ends the process where an assertion fails.
"""

import importlib.util
import logging
import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from minitron.errors import UserError

QUANTISED = (
    *("q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0"),
    *("iq4_nl", "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k"),
)
"""The types that llama.cpp's own tool makes without a matrix of importance."""


@dataclass(frozen=True)
class Reading:
    """What llama.cpp makes of texts."""

    ids: list[list[int]]
    """The tokens of each text, with those that it adds."""
    logits: list[np.ndarray]
    """Logits of shape (tokens, vocabulary) of each of the sequences that were given."""
    version: str


def is_installed() -> bool:
    """Return whether llama-cpp-python can be imported."""
    return importlib.util.find_spec("llama_cpp") is not None


def require_installed(purpose: str) -> None:
    """Check that llama-cpp-python is there.

    Raises:
        UserError: it is not; the message names what to install.
    """
    if not is_installed():
        raise UserError(f"{purpose} needs llama.cpp: pip install 'minitron[llama-cpp]'")


def quantise(source: Path, target: Path, type: str) -> None:
    """Write a quantised copy of a GGUF file, as llama.cpp's own tool does.

    Raises:
        UserError: llama-cpp-python is missing, or llama.cpp refuses.
    """
    require_installed(f"--quantize {type}")
    _isolated(_quantise, source, target, type)


def read(path: Path, texts: list[str], sequences: list[list[int]]) -> Reading:
    """Tokenise texts, and run sequences of tokens, with a GGUF file.

    Raises:
        UserError: llama-cpp-python is missing, or llama.cpp cannot load the file.
    """
    require_installed("this check")
    return _isolated(_read, path, texts, sequences)  # type: ignore[no-any-return]


def _quantise(source: Path, target: Path, type: str) -> None:
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{type.upper()}")
    if status := llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), options):
        raise UserError(f"llama.cpp could not quantise {source.name} to {type} (status {status})")


def _read(path: Path, texts: list[str], sequences: list[list[int]]) -> Reading:
    import llama_cpp

    longest = max(map(len, sequences), default=1)
    model = llama_cpp.Llama(
        str(path), n_ctx=longest + 8, n_batch=longest + 8, n_threads=1, logits_all=True, verbose=False
    )
    adds = model.metadata.get("tokenizer.ggml.add_bos_token") == "true"
    ids = [model.tokenize(text.encode(), add_bos=adds, special=True) for text in texts]
    logits = []
    for sequence in sequences:
        model.reset()
        model.eval(sequence)
        logits.append(np.array(model.scores[: len(sequence)]))
    return Reading(ids, logits, llama_cpp.__version__)


def _isolated(function: Callable[..., Any], *arguments: Any) -> Any:
    processes = multiprocessing.get_context("spawn")
    receiver, sender = processes.Pipe(duplex=False)
    process = processes.Process(target=_answer, args=(sender, function, *arguments))
    process.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError as error:
        process.join()
        raise UserError(f"llama.cpp ended its process, with exit code {process.exitcode}") from error
    finally:
        process.join()
    if isinstance(result, Exception):
        raise UserError(f"llama.cpp: {' '.join(str(result).split())}") from result
    return result


def _answer(sender: Connection, function: Callable[..., Any], *arguments: Any) -> None:
    logging.disable(logging.WARNING)
    try:
        sender.send(function(*arguments))
    except Exception as error:
        sender.send(error if isinstance(error, UserError) else UserError(str(error)))
