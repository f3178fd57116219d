"""llama.cpp itself, where llama-cpp-python is installed: quantises files, runs them to compare, and times them.

Every call runs in a process of its own, since llama.cpp ends the process where an assertion fails.
"""

import importlib.util
import logging
import multiprocessing
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from minitron.errors import UserError
from minitron.evaluation.speed import Speed

QUANTISED = (
    *("q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0"),
    *("iq4_nl", "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k"),
)
"""The types that llama.cpp's own tool makes without a matrix of importance."""
DECODED_TOKENS = 64
"""The number of tokens that are decoded after each prefill that is timed."""


@dataclass(frozen=True)
class Reading:
    """What llama.cpp makes of texts."""

    ids: list[list[int]]
    """The tokens of each text, with those that it adds."""
    logits: list[np.ndarray]
    """Logits of shape (tokens, vocabulary) of each of the sequences that were given."""
    version: str


@dataclass(frozen=True)
class Timing:
    """How fast llama.cpp ran files on the CPU."""

    speeds: dict[str, list[Speed]]
    """The turns of each file, in their order."""
    version: str
    """That of llama-cpp-python."""


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


def alternate(paths: Mapping[str, Path], context: int, *, threads: int, repeats: int) -> Timing:
    """Time GGUF files in turn on the CPU, once each to warm up and then `repeats` times.

    A turn is a prefill of `context` random tokens, with the logits of the last one, and then `DECODED_TOKENS` tokens
    one by one; their median is the time of a decoded token. Nothing is sampled. All files are in memory together.

    Raises:
        UserError: llama-cpp-python is missing, or llama.cpp cannot load a file.
    """
    require_installed("timing")
    return _isolated(_alternate, dict(paths), context, threads, repeats)  # type: ignore[no-any-return]


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


def _alternate(paths: dict[str, Path], context: int, threads: int, repeats: int) -> Timing:
    import llama_cpp

    models = {
        name: llama_cpp.Llama(
            str(path),
            n_ctx=context + DECODED_TOKENS,
            n_threads=threads,
            n_threads_batch=threads,
            op_offload=False,  # where a GPU is there, long prompts would run on it
            verbose=False,
        )
        for name, path in paths.items()
    }
    speeds: dict[str, list[Speed]] = {name: [] for name in models}
    for turn in range(repeats + 1):
        for name, model in models.items():
            draw = random.Random(0)
            prompt = [draw.randrange(model.n_vocab()) for _ in range(context)]
            model.reset()
            prefill = _seconds(model, prompt)
            decode = [_seconds(model, prompt[-1:]) for _ in range(DECODED_TOKENS)]
            if turn:
                speeds[name].append(Speed(prefill, statistics.median(decode), 1, context))
    return Timing(speeds, llama_cpp.__version__)


def _seconds(model: Any, tokens: list[int]) -> float:
    started = time.perf_counter()
    model.eval(tokens)
    return time.perf_counter() - started


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
    except BaseException:  # interrupted
        process.terminate()
        raise
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
