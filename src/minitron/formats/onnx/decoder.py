"""An exported graph in ONNX Runtime: logits of prompts and of the tokens that follow them."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

Cache = dict[str, np.ndarray]
"""Keys and values of all layers, by the names of the graph's inputs."""


class Decoder:
    """A graph of `graph.trace` in an ONNX Runtime session on the CPU."""

    def __init__(self, path: Path, threads: int | None = None) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors
        options.intra_op_num_threads = threads or 0
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.past = [value for value in self.session.get_inputs() if value.name.startswith("past_key_values.")]

    def __call__(
        self, ids: np.ndarray, cache: Cache | None = None, mask: np.ndarray | None = None
    ) -> tuple[np.ndarray, Cache]:
        """Return the logits (batch, new, vocabulary) of token ids (batch, new) that follow a cache, and the next cache.

        `mask` (batch, past + new) is 0 where a sequence is padded, on its left; positions count the other tokens.
        """
        cache = cache or {value.name: self._empty(value, len(ids)) for value in self.past}
        past = next(iter(cache.values())).shape[2]
        mask = np.ones((len(ids), past + ids.shape[1]), np.int64) if mask is None else mask
        positions = np.maximum(mask.cumsum(-1) - 1, 0)[:, past:]
        given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, **cache}
        taken = {value.name: given[value.name] for value in self.session.get_inputs()}
        logits, *present = self.session.run(None, taken)
        names = [value.name.replace("present.", "past_key_values.") for value in self.session.get_outputs()[1:]]
        return logits, dict(zip(names, present, strict=True))

    def logits(self, ids: list[int]) -> np.ndarray:
        """Return the logits (tokens, vocabulary) of a sequence, whose second half is read token by token."""
        tokens = np.array([ids])
        start = max(1, len(ids) // 2)
        first, cache = self(tokens[:, :start])
        read = [first[0]]
        for i in range(start, len(ids)):
            step, cache = self(tokens[:, i : i + 1], cache)
            read.append(step[0])
        return np.concatenate(read)

    def _empty(self, value: Any, batch: int) -> np.ndarray:
        _, heads, _, channels = value.shape
        return np.zeros((batch, heads, 0, channels), np.float16 if value.type == "tensor(float16)" else np.float32)


def engine() -> str:
    """Return the name and the version of ONNX Runtime."""
    return f"onnxruntime {version('onnxruntime')}"
