"""The memory of serving against caches that transformers fills, and against published figures."""

from typing import Any

import pytest
import torch
from torch import Tensor

from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint
from minitron.model.language_model import load_model
from minitron.model.memory import Memory, attention_windows, memory
from minitron.quantities import parse_context


def cached_tensors(layer: Any, *names: str) -> list[Tensor]:
    """The tensors that a layer of a cache keeps under some names."""
    found = [value for name in names if (value := getattr(layer, name, None)) is not None]
    return [tensor for value in found for tensor in (value.values() if isinstance(value, dict) else [value])]


@torch.no_grad()
def test_memory_is_what_a_cache_holds(teacher: Checkpoint) -> None:
    model, config = load_model(teacher, torch.device("cpu"), torch.float32), teacher.config.to_dict()
    output = model(input_ids=torch.zeros(2, 40, dtype=torch.int64), use_cache=True)
    layers = (output.cache_params if "cache_params" in output else output.past_key_values).layers
    windows = attention_windows(config)
    needed = memory(teacher.arch, 2, 40, "float32", windows)
    kept = sum(tensor.nbytes for layer in layers for tensor in cached_tensors(layer, "keys", "values"))
    # transformers keeps a window without the token that is being read.
    size = teacher.arch.axis_size
    token = 2 * 2 * size("kv" if "kv" in teacher.arch.axes else "query") * size("head_dim") * 4 if kept else 0
    assert needed.kv_cache == kept + len(windows) * token
    state = sum(tensor.nbytes for layer in layers for tensor in cached_tensors(layer, "recurrent_states"))
    convolution = sum(tensor.nbytes for layer in layers for tensor in cached_tensors(layer, "conv_states"))
    kernel = teacher.arch.sizes.get("conv_kernel", 1)  # transformers keeps one input more than the next token needs
    assert needed.mamba_state == state + convolution * (kernel - 1) // kernel
    assert (needed.mamba_state > 0) == ("mhead" in teacher.arch.axes) == (state > 0)
    assert needed.weights == 4 * teacher.arch.num_parameters
    assert needed.total == needed.weights + needed.kv_cache + needed.mamba_state


NANO_9B = Arch.from_config({
    "model_type": "nemotron_h", "vocab_size": 131072, "hidden_size": 4480, "intermediate_size": 15680,
    "num_attention_heads": 40, "num_key_value_heads": 8, "head_dim": 128, "mamba_num_heads": 128, "mamba_head_dim": 80,
    "n_groups": 8, "ssm_state_size": 128, "conv_kernel": 4, "use_conv_bias": True,
    "layers_block_type": ["mamba"] * 27 + ["mlp"] * 25 + ["attention"] * 4,
})  # fmt: skip


def test_nano_9b_fits_the_budget_of_its_report() -> None:
    needed = memory(NANO_9B, batch=1, context=parse_context("128k"), dtype="bfloat16")
    assert needed == Memory(
        weights=2 * 8_888_227_328,
        kv_cache=4 * 2 * 8 * 128 * 2 * 131_072,
        mamba_state=27 * (128 * 80 * 128 * 4 + (128 * 80 + 2 * 8 * 128) * 3 * 2),
    )
    assert needed.total < 19.66 * 2**30
    teacher = NANO_9B.resized(hidden_size=5120, intermediate_size=20480, num_mamba_layers=28, num_mlp_layers=28,
                              num_attention_layers=6)  # fmt: skip
    assert memory(teacher, 1, 131_072, "bfloat16").total > 19.66 * 2**30


def test_memory_grows_with_batch_and_context() -> None:
    one, two = memory(NANO_9B, 1, 4096, "bfloat16"), memory(NANO_9B, 2, 4096, "bfloat16")
    assert (two.kv_cache, two.mamba_state, two.weights) == (2 * one.kv_cache, 2 * one.mamba_state, one.weights)
    longer = memory(NANO_9B, 1, 8192, "bfloat16")
    assert (longer.kv_cache, longer.mamba_state) == (2 * one.kv_cache, one.mamba_state)


@pytest.mark.parametrize(("text", "length"), [("4096", 4096), ("128k", 131_072), ("1K", 1024)])
def test_a_length_of_a_context(text: str, length: int) -> None:
    assert parse_context(text) == length


@pytest.mark.parametrize("text", ["0", "-1", "4.5k", "128m", ""])
def test_no_length_of_a_context(text: str) -> None:
    with pytest.raises(ValueError, match="is not a length"):
        parse_context(text)
