"""Times model folders in vLLM, where it is installed."""

import importlib.util
import os
import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.errors import UserError
from minitron.evaluation.speed import Speed

DECODED_TOKENS = 64
"""The number of tokens that are decoded after each prefill that is timed."""
SHARE_OF_MEMORY = 0.85
"""The share of a GPU's memory that vLLM is given for all models together."""


@dataclass(frozen=True)
class VllmModels:
    """Models that vLLM has loaded, all of them in memory."""

    engines: Mapping[str, Any]
    num_tokens: Mapping[str, int]
    """The size of each model's vocabulary."""
    version: str
    device: str

    def alternate(
        self, batch: int, context: int, repeats: int, advance: Callable[[int], None] = lambda _: None
    ) -> dict[str, list[Speed]]:
        """Time the models in turn, once each to warm up and then `repeats` times.

        A turn reads `context` random tokens in each of `batch` sequences and generates one token each, and then again
        with `DECODED_TOKENS` more, without a cache of prefixes; what these take longer is the time of decoding.
        `advance` is called with 1 after each turn.
        """
        speeds: dict[str, list[Speed]] = {name: [] for name in self.engines}
        for turn in range(repeats + 1):
            for name, engine in self.engines.items():
                draw = random.Random(0)
                prompts = [[draw.randrange(self.num_tokens[name]) for _ in range(context)] for _ in range(batch)]
                first, all_tokens = (_seconds(engine, prompts, count) for count in (1, 1 + DECODED_TOKENS))
                if turn:
                    decoded = max(all_tokens - first, 1e-9) / DECODED_TOKENS
                    speeds[name].append(Speed(first, decoded, batch, context))
                advance(1)
        return speeds


def require_installed() -> None:
    """Check that vLLM is there.

    Raises:
        UserError: it is not.
    """
    if importlib.util.find_spec("vllm") is None:
        raise UserError("--engine vllm needs vLLM: see https://docs.vllm.ai for the build for this machine")


def load(folders: Mapping[str, Path], *, batch: int, context: int, dtype: str) -> VllmModels:
    """Load model folders in vLLM for up to `batch` sequences of `context` tokens and those that are decoded.

    Raises:
        UserError: vLLM is missing, or cannot load a folder.
    """
    require_installed()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    import vllm
    from vllm.platforms import current_platform

    engines, num_tokens = {}, {}
    for name, folder in folders.items():
        try:
            engines[name] = vllm.LLM(
                model=str(folder),
                dtype=dtype,
                max_model_len=context + 1 + DECODED_TOKENS,
                max_num_seqs=batch,
                gpu_memory_utilization=SHARE_OF_MEMORY / len(folders),
                enable_prefix_caching=False,
                skip_tokenizer_init=True,
                trust_remote_code=False,
            )
        except Exception as error:  # vLLM's own process has ended; its log holds more
            raise UserError(f"vLLM cannot load {folder}: {' '.join(str(error).split())}") from error
        num_tokens[name] = engines[name].model_config.get_vocab_size()
    return VllmModels(engines, num_tokens, str(vllm.__version__), str(current_platform.device_type))


def _seconds(engine: Any, prompts: list[list[int]], count: int) -> float:
    from vllm import SamplingParams

    sampling = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
    started = time.perf_counter()
    engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False)
    return time.perf_counter() - started
