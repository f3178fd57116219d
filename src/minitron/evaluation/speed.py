"""Times how fast a model reads a prompt and generates tokens, on the device that holds it."""

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

REPEATS = 3
"""The number of times that `measure_speed` runs."""
DECODED_TOKENS = 8
"""The number of tokens that are decoded after each prefill."""
SHORTEST_TURN = 0.05
"""Seconds of a turn of `speed_up`: an interruption is a large share of less."""
TURNS = 5
"""The number of turns in which `speed_up` times two models, after one to warm up."""


@dataclass(frozen=True)
class Speed:
    """Seconds of a prefill of batch × context tokens, and seconds per decoded token after it."""

    prefill_seconds: float
    decode_seconds: float
    batch: int
    context: int

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens per second, over all sequences of the batch."""
        return self.batch * self.context / self.prefill_seconds

    @property
    def decode_tokens_per_second(self) -> float:
        """Generated tokens per second, over all sequences of the batch."""
        return self.batch / self.decode_seconds

    def to_dict(self) -> dict[str, Any]:
        """Return the figures for JSON."""
        return asdict(self)


def measure_speed(model: Any, batch: int, context: int) -> Speed:
    """Time a transformers model and return its fastest prefill and its fastest decoded token over several runs.

    The fastest run is the right one, since other work on the machine can only slow a run down. Logits are formed for
    the last position only.
    """
    ids = _prompt(model, batch, context)
    runs = [_time_once(model, ids, min) for _ in range(REPEATS)]
    return Speed(min(run.prefill_seconds for run in runs), min(run.decode_seconds for run in runs), batch, context)


def alternate(
    models: Mapping[str, Any], batch: int, context: int, repeats: int, advance: Callable[[int], None] = lambda _: None
) -> dict[str, list[Speed]]:
    """Time models in turn, once each to warm up and then `repeats` times; decoding is the median over its tokens.

    The models take turns so that other work on the machine slows all of them down alike. `advance` is called with 1
    after each run.
    """
    speeds: dict[str, list[Speed]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            speed = _time_once(model, _prompt(model, batch, context), statistics.median)
            if repeat:
                speeds[name].append(speed)
            advance(1)
    return speeds


def speed_up(model: Any, other: Any, context: int, advance: Callable[[int], None] = lambda _: None) -> dict[str, float]:
    """Return how many times as fast as `other` a model reads `context` tokens: median, lowest and highest ratio.

    Both take turns, and each ratio divides the times of one turn, of as many forward passes as `other` needs for
    `SHORTEST_TURN`. `advance` is called with 1 after each turn.
    """
    warm_up = _seconds(other, context, 1), _seconds(model, context, 1)
    advance(1)
    passes, ratios = max(1, math.ceil(SHORTEST_TURN / warm_up[0])), []
    for _ in range(TURNS):
        of_other, of_model = (_seconds(each, context, passes) for each in (other, model))
        ratios.append(of_other / of_model)
        advance(1)
    return {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios), "turns": TURNS}


@torch.no_grad()
def _seconds(model: Any, context: int, passes: int) -> float:
    ids = _prompt(model, 1, context)
    return sum(_timed(model, ids, {})[0] for _ in range(passes))


def figures_of(speeds: Mapping[str, list[Speed]], sizes: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    """Return the medians of speeds that were measured in turn, and sizes; for two models, also the first's speed-up.

    `sizes` holds what is counted once for each model: parameters, bytes. The speed-up divides the runs of one turn and
    is given as median, lowest and highest ratio.
    """
    figures: dict[str, Any] = {}
    for name, runs in speeds.items():
        figures[name] = {
            "prefill_tokens_per_second": statistics.median(run.prefill_tokens_per_second for run in runs),
            "decode_tokens_per_second": statistics.median(run.decode_tokens_per_second for run in runs),
            "time_to_first_token": statistics.median(run.prefill_seconds for run in runs),
            **sizes[name],
        }
    if len(speeds) == 2:
        model, other = speeds.values()
        figures["speed_up"] = {
            part: {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
            for part, ratios in (
                ("prefill", [b.prefill_seconds / a.prefill_seconds for a, b in zip(model, other, strict=True)]),
                ("decode", [b.decode_seconds / a.decode_seconds for a, b in zip(model, other, strict=True)]),
            )
        }
    return figures


def _prompt(model: Any, batch: int, context: int) -> Tensor:
    """Return random token ids (batch, context) on the model's device, equal in every call."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (batch, context), generator=generator).to(device)


@torch.no_grad()
def _time_once(model: Any, ids: Tensor, summarise: Callable[[list[float]], float]) -> Speed:
    prefill, cache = _timed(model, ids, {})
    decode = []
    for _ in range(DECODED_TOKENS):
        seconds, cache = _timed(model, ids[:, -1:], cache)
        decode.append(seconds)
    return Speed(prefill, summarise(decode), *ids.shape)


def _timed(model: Any, ids: Tensor, cache: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    """Run the model on ids (batch, T) after a cache; return the seconds and the cache as arguments of the next call."""
    _synchronize(ids.device)
    started = time.perf_counter()
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1, **cache)
    _synchronize(ids.device)
    seconds = time.perf_counter() - started
    name = "cache_params" if "cache_params" in output else "past_key_values"
    return seconds, {name: output[name]}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
