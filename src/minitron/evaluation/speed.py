"""How fast a model reads a prompt and goes on from it, on the device it is on."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

REPEATS = 3
DECODED_TOKENS = 8


@dataclass(frozen=True)
class Speed:
    """Seconds of a prefill of batch × context tokens, and of a token of decoding behind these."""

    prefill_seconds: float
    decode_seconds: float
    batch: int
    context: int

    @property
    def prefill_tokens_per_second(self) -> float:
        """Over all sequences of the batch."""
        return self.batch * self.context / self.prefill_seconds

    @property
    def decode_tokens_per_second(self) -> float:
        """Over all sequences of the batch."""
        return self.batch / self.decode_seconds

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def measure_speed(model: Any, batch: int, context: int) -> Speed:
    """Time a transformers model as it stands: the fastest of several prefills, and of as many tokens of decoding.

    The fastest, since what else the machine does can only slow it down. Only the last position's logits are made.
    """
    ids = _prompt(model, batch, context)
    found = [_time_once(model, ids, min) for _ in range(REPEATS)]
    return Speed(min(s.prefill_seconds for s in found), min(s.decode_seconds for s in found), batch, context)


def alternate(
    models: Mapping[str, Any], batch: int, context: int, repeats: int, advance: Callable[[int], None] = lambda _: None
) -> dict[str, list[Speed]]:
    """Time models in turn, each once to warm up and then so often; decoding by the median of its tokens.

    In turn, so that whatever else the machine does comes to all of them alike.
    """
    found: dict[str, list[Speed]] = {name: [] for name in models}
    for repeat in range(repeats + 1):
        for name, model in models.items():
            speed = _time_once(model, _prompt(model, batch, context), statistics.median)
            if repeat:
                found[name].append(speed)
            advance(1)
    return found


def figures_of(speeds: Mapping[str, list[Speed]], peaks: Mapping[str, int]) -> dict[str, Any]:
    """Medians of what `alternate` found, and for two models the ratios of the first to the second with their spread."""
    figures: dict[str, Any] = {}
    for name, found in speeds.items():
        figures[name] = {
            "prefill_tokens_per_second": statistics.median(s.prefill_tokens_per_second for s in found),
            "decode_tokens_per_second": statistics.median(s.decode_tokens_per_second for s in found),
            "time_to_first_token": statistics.median(s.prefill_seconds for s in found),
            "peak_memory": peaks[name],
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
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    return torch.randint(model.config.vocab_size, (batch, context), generator=generator).to(device)


@torch.no_grad()
def _time_once(model: Any, ids: Tensor, middle: Callable[[list[float]], float]) -> Speed:
    prefill, cache = _timed(model, ids, {})
    decode = []
    for _ in range(DECODED_TOKENS):
        seconds, cache = _timed(model, ids[:, -1:], cache)
        decode.append(seconds)
    return Speed(prefill, middle(decode), *ids.shape)


def _timed(model: Any, ids: Tensor, cache: dict[str, Any]) -> tuple[float, dict[str, Any]]:
    _wait(ids.device)
    started = time.perf_counter()
    output = model(input_ids=ids, use_cache=True, logits_to_keep=1, **cache)
    _wait(ids.device)
    seconds = time.perf_counter() - started
    name = "cache_params" if "cache_params" in output else "past_key_values"
    return seconds, {name: output[name]}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
