"""The model that is exported: its shape and its config, as the facts about llama.cpp need them."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint

NORM_ENTRIES = ("rms_norm_eps", "norm_eps", "layer_norm_eps", "layer_norm_epsilon")
UNLIMITED = 2**20
"""The context that is stated for a model that has no limit."""
WITHOUT_WINDOW = frozenset({"mistral", "mixtral", "ministral3", "qwen2", "qwen3", "qwen3_moe", "phi3"})
"""The families for which llama.cpp computes no sliding window though their models may have one."""
POSITION_ENTRIES = ("max_position_embeddings", "n_positions")


@dataclass(frozen=True)
class Source:
    """A model's shape, and its config with the defaults filled in."""

    arch: Arch
    config: Mapping[str, Any]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> "Source":
        """Return the source of a checkpoint."""
        return cls(checkpoint.arch, checkpoint.config.to_dict())

    @cached_property
    def rope(self) -> Mapping[str, Any]:
        """The parameters of the rotary embeddings; where layers differ, those of layers without a window."""
        parameters = self.config.get("rope_parameters") or {}
        return parameters.get("full_attention", parameters)  # type: ignore[no-any-return]

    @property
    def rotated(self) -> int:
        """The channels of a head that are rotated."""
        return int(self.arch.axis_size("head_dim") * self.rope.get("partial_rotary_factor", 1.0))

    @property
    def norm_eps(self) -> float:
        """The number that norms add to the variance."""
        return float(next(self.config[name] for name in NORM_ENTRIES if name in self.config))

    @property
    def positions(self) -> int | None:
        """The longest sequence, in tokens, that the config states; None where nothing limits it."""
        return next((int(self.config[name]) for name in POSITION_ENTRIES if self.config.get(name)), None)

    @property
    def context(self) -> int:
        """The longest sequence that llama.cpp computes as transformers does.

        It has no sliding window for most families: up to the window, that makes no difference.
        """
        longest = self.positions or UNLIMITED
        return min(longest, self.window or longest) if self.arch.model_type in WITHOUT_WINDOW else longest

    @property
    def window(self) -> int | None:
        """The tokens that some layers attend to, where that is less than the longest sequence."""
        is_on = self.arch.family.window_switch is None or self.config.get(self.arch.family.window_switch)
        kinds = self.config.get("layer_types") or ["sliding_attention"]
        window = self.config.get("sliding_window") if is_on and "sliding_attention" in kinds else None
        return int(window) if window and window < (self.positions or window + 1) else None

    @property
    def has_heads_unlike_hidden(self) -> bool:
        """Whether the query heads together are not as wide as the residual stream."""
        size = self.arch.axis_size
        return "head_dim" in self.arch.axes and size("query") * size("head_dim") != size("hidden")
