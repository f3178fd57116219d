"""The memory that serving a model takes, and the sizes of the buffers in which a loss is computed; needs no torch."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from minitron.model.anatomy import AXES
from minitron.model.arch import Arch

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}
MAMBA_STATE_BYTES = 4
"""Bytes per entry of the recurrent state: float32 for weights of any dtype, as in transformers; some halve it."""

LOGITS_BYTES = {"cpu": 3 * 2**24, "cuda": 2**29}
"""The size of a buffer of logits, of which a loss has two: large enough for matrix products to run at full speed."""
FEWEST_TOKENS = 256
"""The least number of tokens in a buffer: with fewer, products wait for the output matrix to be read."""
ROWS_BYTES = {"cpu": 2**21, "cuda": 2**29}
"""The size of the part of a buffer that is compared at a time: it is read many times and should fit a CPU's caches."""

PAIRS_BYTES = 2**31
"""The most bytes that a training on a CPU keeps for pairs of tokens where attention is written out."""


def writes_out_attention(arch: Arch, num_blocks: int, context: int, device: str) -> bool:
    """Return whether a training that rounds products computes attention in products, not in PyTorch's fused kernel.

    On a CPU the fused kernel gains nothing from rounding. Written out, attention keeps a float32 number per pair of
    tokens, query head and layer: this is chosen where the numbers of `num_blocks` blocks of `context` tokens take at
    most `PAIRS_BYTES` (docs/studies/processors.md). Sizes alone decide, not the memory that is free, so that a resumed
    training computes to equal bits.
    """
    num_layers = _num_layers_along(arch, "query", arch.sizes)
    num_pairs = num_blocks * context**2 * num_layers * (arch.axis_size("query") if num_layers else 0)
    return device == "cpu" and 0 < 4 * num_pairs <= PAIRS_BYTES


def tokens_at_once(num_tokens: int, vocab: int, device: str) -> int:
    """Return how many of `num_tokens` tokens a buffer of float32 logits holds on `cpu` or `cuda`, in equal parts."""
    fitting = max(FEWEST_TOKENS, LOGITS_BYTES[device] // (4 * vocab))
    num_parts = max(1, -(-num_tokens // fitting))
    return max(1, -(-num_tokens // num_parts))


@dataclass(frozen=True)
class Memory:
    """Bytes by their use; integers, or integer arrays with an entry per shape."""

    weights: Any
    kv_cache: Any
    mamba_state: Any

    @property
    def total(self) -> Any:
        """The sum of all uses; activations are not counted."""
        return self.weights + self.kv_cache + self.mamba_state

    def to_dict(self) -> dict[str, Any]:
        """Return the bytes by use and their total, for JSON."""
        return {**asdict(self), "total": self.total}


def memory(
    arch: Arch,
    batch: int,
    context: int,
    dtype: str,
    windows: list[int] | None = None,
    sizes: Mapping[str, Any] | None = None,
) -> Memory:
    """Return the memory of `batch` sequences of `context` tokens each.

    With `sizes`, integers or integer arrays that broadcast, the memory of many shapes at once.

    - weights: every parameter in `dtype`;
    - KV cache: 2 × KV heads × head_dim × tokens for each layer with attention, in `dtype`; a layer with a sliding
      window keeps at most the window's tokens. `windows` holds the windows of the layers that have one; a shape of
      fewer layers has the arch's share of windows, rounded down;
    - Mamba state: heads × channels × state in float32 for each layer with a mixer, and the last conv_kernel − 1 inputs
      of its convolution in `dtype`; of a gated delta net, value heads × value channels × key channels.
    """
    every, width = {**arch.sizes, **(sizes or {})}, DTYPE_BYTES[dtype]
    kv_cache: Any = 0
    state: Any = 0

    def size(axis: str) -> Any:
        return every[AXES[axis]]

    if _num_layers_along(arch, "query", arch.sizes):
        num_attention = _num_layers_along(arch, "query", every)
        per_token = size("kv" if "kv" in arch.axes else "query") * head_channels(arch, size) * width
        sliding = [min(context, window) for window in windows or []]
        num_sliding = len(sliding) * num_attention // _num_layers_along(arch, "query", arch.sizes)
        in_windows = num_sliding * (sum(sliding) // max(1, len(sliding)))
        kv_cache = batch * per_token * (in_windows + (num_attention - num_sliding) * context)
    if _num_layers_along(arch, "mhead", arch.sizes):
        inner, groups = size("mhead") * size("mchan"), 2 * size("mgroup") * size("state")
        recurrent = inner * size("state") * MAMBA_STATE_BYTES
        per_layer = recurrent + (inner + groups) * (size("conv") - 1) * width
        state = batch * _num_layers_along(arch, "mhead", every) * per_layer
    if _num_layers_along(arch, "delta_value", arch.sizes):
        keys, values = size("delta_key") * size("delta_key_dim"), size("delta_value") * size("delta_value_dim")
        recurrent = values * size("delta_key_dim") * MAMBA_STATE_BYTES
        per_layer = recurrent + (2 * keys + values) * (size("delta_conv") - 1) * width
        state = state + batch * _num_layers_along(arch, "delta_value", every) * per_layer
    return Memory(arch.count_grid(every) * width, kv_cache, state)


def head_channels(arch: Arch, size: Callable[[str], Any]) -> Any:
    """Return the channels of a key and of a value together, of one head.

    transformers caches them whole in multi-head latent attention too (DeepSeek-V2, arXiv 2405.04434, caches the latent
    vector from which they are computed).
    """
    if "value_dim" in arch.axes:
        return size("unturned") + size("turned") + size("value_dim")
    return 2 * size("head_dim")


def attention_windows(config: Mapping[str, Any]) -> list[int]:
    """Return the windows, in tokens, of the layers that attend to the last tokens only."""
    window, kinds = config.get("sliding_window"), config.get("layer_types")
    if not window:
        return []
    # Without a list of kinds all layers have the window; in a hybrid whose config states no number of layers, none has.
    return [int(window)] * (kinds.count("sliding_attention") if kinds else config.get("num_hidden_layers", 0))


def _num_layers_along(arch: Arch, axis: str, sizes: Mapping[str, Any]) -> Any:
    kinds = {row.kind for row in arch.rows if row.is_per_layer and axis in row.axes}
    if None in kinds:
        return sizes[AXES["layer"]]
    return sum(sizes[f"num_{kind}_layers"] for kind in kinds if kind)
