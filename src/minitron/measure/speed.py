"""How fast a model reads a prompt and goes on from it, on the device it is on."""

import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

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

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@torch.no_grad()
def measure_speed(model: Any, batch: int, context: int) -> Speed:
    """Time a transformers model as it stands: the fastest of several prefills, and of as many tokens of decoding.

    The fastest, since what else the machine does can only slow it down. Only the last position's logits are made.
    """
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (batch, context), generator=generator).to(device)

    def timed(tokens: torch.Tensor, cache: dict[str, Any]) -> tuple[float, dict[str, Any]]:
        _wait(device)
        started = time.perf_counter()
        output = model(input_ids=tokens, use_cache=True, logits_to_keep=1, **cache)
        _wait(device)
        seconds = time.perf_counter() - started
        name = "cache_params" if "cache_params" in output else "past_key_values"
        return seconds, {name: output[name]}

    prefill = decode = float("inf")
    cache: dict[str, Any] = {}
    for _ in range(REPEATS):
        cache = {}
        seconds, cache = timed(ids, {})
        prefill = min(prefill, seconds)
    for _ in range(DECODED_TOKENS):
        seconds, cache = timed(ids[:, -1:], cache)
        decode = min(decode, seconds)
    return Speed(prefill, decode, batch, context)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
