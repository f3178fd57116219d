"""llama.cpp itself, where its packages are installed: runs files to compare them, times them, and quantises them.

xllamacpp brings llama.cpp and its server as a wheel; files are run through that server, within the process. It leaves
out the tool that quantises, which llama-cpp-python has, a package that is compiled when it is installed. Every call
runs in a process of its own, which does not import torch, since llama.cpp ends the process where an assertion fails.
"""

import importlib.util
import logging
import multiprocessing
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from minitron.errors import UserError

if TYPE_CHECKING:
    from minitron.evaluation.speed import Speed

QUANTISED = (
    *("q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0", "q4_k_m", "q4_k_s", "q4_1", "q4_0"),
    *("iq4_nl", "iq4_xs", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k"),
)
"""The types that llama.cpp's own tool makes without a matrix of importance."""
DECODED_TOKENS = 64
"""The number of tokens that are decoded after each prefill that is timed."""


class Package(NamedTuple):
    """A Python package of llama.cpp."""

    module: str
    extra: str
    """The extra of this project that installs it."""


SERVER = Package("xllamacpp", "llama-cpp")
QUANTISER = Package("llama_cpp", "llama-cpp-python")


@dataclass(frozen=True)
class Prediction:
    """The likeliest next tokens after each token of a sequence, and their log-probabilities, in arrays of one shape."""

    tokens: np.ndarray
    log_probabilities: np.ndarray


@dataclass(frozen=True)
class Reading:
    """What llama.cpp makes of texts."""

    ids: list[list[int]]
    """The tokens of each text, with those that it adds."""
    predictions: list[Prediction]
    """What it predicts in each of the sequences that were given."""
    version: str


@dataclass(frozen=True)
class Timing:
    """How fast llama.cpp ran files on the CPU."""

    speeds: "dict[str, list[Speed]]"
    """The turns of each file, in their order."""
    version: str


def is_installed(package: Package = SERVER) -> bool:
    """Return whether a package can be imported."""
    return importlib.util.find_spec(package.module) is not None


def require_installed(purpose: str, package: Package = SERVER) -> None:
    """Check that a package is there.

    Raises:
        UserError: it is not; the message names what to install.
    """
    if not is_installed(package):
        raise UserError(f"{purpose} needs llama.cpp: pip install 'minitron[{package.extra}]'")


def quantise(source: Path, target: Path, type: str) -> None:
    """Write a quantised copy of a GGUF file, as llama.cpp's own tool does.

    Raises:
        UserError: llama-cpp-python is missing, or llama.cpp refuses.
    """
    require_installed(f"--quantize {type}", QUANTISER)
    _isolated(_quantise, source, target, type)


def read(path: Path, texts: list[str], sequences: list[list[int]], *, likeliest: int) -> Reading:
    """Tokenise texts, and predict the next token after each token of some sequences, with a GGUF file.

    Of every prediction the `likeliest` tokens are returned, at most the whole vocabulary.

    Raises:
        UserError: xllamacpp is missing, or llama.cpp cannot load the file.
    """
    require_installed("this check")
    return _isolated(_read, path, texts, sequences, likeliest)  # type: ignore[no-any-return]


def alternate(paths: Mapping[str, Path], context: int, *, threads: int, repeats: int) -> Timing:
    """Time GGUF files in turn on the CPU, once each to warm up and then `repeats` times, by llama.cpp's own clock.

    A turn is a prefill of `context` random tokens, with the logits of the last one, and then `DECODED_TOKENS` tokens,
    each the likeliest; their mean is the time of a decoded token. All files are in memory together.

    Raises:
        UserError: xllamacpp is missing, or llama.cpp cannot load a file.
    """
    from minitron.evaluation.speed import Speed

    require_installed("timing")
    turns, version = _isolated(_alternate, dict(paths), context, threads, repeats)
    return Timing(
        {name: [Speed(prefill, decoded, 1, context) for prefill, decoded in turns[name]] for name in turns}, version
    )


def _quantise(source: Path, target: Path, type: str) -> None:
    import llama_cpp

    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{type.upper()}")
    if status := llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), options):
        raise UserError(f"llama.cpp could not quantise {source.name} to {type} (status {status})")


def _read(path: Path, texts: list[str], sequences: list[list[int]], likeliest: int) -> Reading:
    server = _server(path, max(map(len, sequences), default=1) + 8, threads=1)
    ids = [_tokens(server, text) for text in texts]
    # The server states probabilities beside the text that it generates, and none where this ends within a character:
    # it is made to generate one letter, which changes no probability. What it computed of a prompt it keeps.
    letter = [[_tokens(server, "a")[-1], 1e6]]
    predictions = []
    for sequence in sequences:
        ranked = []
        for end in range(1, len(sequence) + 1):
            answer = _completion(server, sequence[:end], 1, n_probs=likeliest, logit_bias=letter)
            ranked.append(answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"])
        columns = ([[token[key] for token in position] for position in ranked] for key in ("id", "logprob"))
        predictions.append(Prediction(*map(np.array, columns)))
    return Reading(ids, predictions, _version())


def _alternate(
    paths: dict[str, Path], context: int, threads: int, repeats: int
) -> tuple[dict[str, list[tuple[float, float]]], str]:
    """Return the seconds of a prefill and of a decoded token in each turn of each file, and the version."""
    turns: dict[str, list[tuple[float, float]]] = {name: [] for name in paths}
    servers = {name: _server(path, context + DECODED_TOKENS + 8, threads=threads) for name, path in paths.items()}
    prompts = {}
    for name, path in paths.items():
        draw, num_tokens = random.Random(0), _num_tokens(path)
        prompts[name] = [draw.randrange(num_tokens) for _ in range(context)]
    for turn in range(repeats + 1):
        for name, server in servers.items():
            timed = _completion(server, prompts[name], DECODED_TOKENS, cache_prompt=False)["timings"]
            if turn:
                turns[name].append((timed["prompt_ms"] / 1000, timed["predicted_per_token_ms"] / 1000))
    return turns, _version()


def _server(path: Path, context: int, *, threads: int) -> Any:
    """Return llama.cpp's server with a file, for one sequence at a time of up to `context` tokens, on the CPU.

    Raises:
        UserError: llama.cpp cannot load the file.
    """
    import xllamacpp

    options = xllamacpp.CommonParams()
    options.model.path, options.n_ctx, options.n_parallel = str(path), context, 1
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
    options.n_gpu_layers, options.no_op_offload = 0, True
    options.warmup, options.verbosity, options.ui, options.cache_ram_mib = False, -1, False, 0
    try:
        return xllamacpp.Server(options)
    except RuntimeError as error:
        raise UserError(f"it cannot load {path.name}: {error}") from error


def _tokens(server: Any, text: str) -> list[int]:
    import httpx

    request = {"content": text, "add_special": True, "parse_special": True}
    answer = httpx.post(f"{server.listening_address}/tokenize", json=request, timeout=60)
    tokens: list[int] = answer.raise_for_status().json()["tokens"]
    return tokens


def _completion(server: Any, prompt: list[int], num_tokens: int, **options: Any) -> dict[str, Any]:
    """Return the server's answer to a prompt of tokens, each further token being the likeliest.

    Raises:
        UserError: the server answers with an error.
    """
    request = {"prompt": prompt, "n_predict": num_tokens, "samplers": ["top_k"], "top_k": 1, "ignore_eos": True}
    answer: dict[str, Any] = server.handle_completions(request | options)
    if "choices" not in answer:
        raise UserError(str(answer.get("error", answer)))
    return answer


def _num_tokens(path: Path) -> int:
    import gguf

    return len(gguf.GGUFReader(path).fields["tokenizer.ggml.tokens"].data)


def _version() -> str:
    import xllamacpp

    return str(xllamacpp.__version__)


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
