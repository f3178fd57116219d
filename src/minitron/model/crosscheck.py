"""Checks that the tables and transformers read one and the same model from a folder, before any work on it.

The tables decide what is cut; transformers runs the forward passes. Where the two take different tensors out of a
folder, or run them as different networks, a cut would silently be one of another model.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from minitron.errors import UserError
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint
from minitron.model.config import quiet_transformers, stated_model_type, student_config, transformers_config
from minitron.model.families import FAMILIES
from minitron.model.language_model import build_model, watching
from minitron.progress import Progress

COMPARED_PARAMETERS = 500_000_000
"""The most parameters that are compared; of a larger model the embeddings, the first layers and the head are."""
NUM_TOKENS = 16
"""The number of tokens, spread over the vocabulary, that both models run on."""
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4}
"""The largest difference of two activations that counts as equal, as a share of the largest activation."""
HALF_TOLERANCE = 3e-2
"""The tolerance of bfloat16 and float16, which keep 8 and 11 bits."""


def require_one_reading(checkpoint: Checkpoint) -> None:
    """Compare the model that the family's table reads from a folder with the model that transformers loads from it.

    transformers decides by itself: from the config's own `model_type`, the files and the names in them. The two models
    must agree in their weights, and on a few tokens after every layer and in their logits. Both are held in memory, on
    the CPU and in the dtype of the checkpoint, up to `COMPARED_PARAMETERS`.

    Raises:
        UserError: they differ, and the message names the first tensor or layer that does; or transformers cannot load
            the folder.
    """
    arch = _compared(checkpoint.arch)
    with Progress("compare with transformers"), quiet_transformers(), torch.no_grad():
        stock, missing = _loaded_by_transformers(checkpoint, arch)
        if missing:
            raise UserError(f"{checkpoint.folder}: transformers does not find {missing[0]} there, and would invent it")
        names = (row.tensor_name(layer, expert) for row, layer, expert in arch.places())
        tensors = ((name, checkpoint.tensor(name)) for name in names)
        config = _with_short_windows(_config(checkpoint, arch))
        tables = build_model(config, tensors, torch.device("cpu"), checkpoint.dtype)
        if difference := _difference(stock, tables, arch):
            raise UserError(
                f"{checkpoint.folder}: transformers reads another model from it than the {arch.model_type} table: "
                f"{difference}"
            )


def _compared(arch: Arch) -> Arch:
    """Return the shape of the first layers that are compared, at least one of them."""
    shallow = arch
    for depth in range(arch.axis_size("layer"), 0, -1):
        shallow = replace(arch, sizes={**arch.sizes, **_depth(arch, depth)}, layers=arch.layers[:depth])
        if shallow.num_parameters <= COMPARED_PARAMETERS:
            break
    return shallow


def _depth(arch: Arch, depth: int) -> dict[str, int]:
    return {**arch.depth_of(arch.layers[:depth]), "num_hidden_layers": depth}


def _config(checkpoint: Checkpoint, arch: Arch) -> Any:
    return student_config(checkpoint, arch, list(range(arch.axis_size("layer"))))


def _loaded_by_transformers(checkpoint: Checkpoint, arch: Arch) -> tuple[Any, list[str]]:
    """Return the model of the compared layers as transformers loads it, and the weights that it does not find."""
    model_type = stated_model_type(checkpoint.folder)
    if model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:  # code of the model's own, which is not run
        model_type = arch.model_type
    depth, is_whole = arch.axis_size("layer"), arch.sizes == checkpoint.arch.sizes
    if is_whole:
        config = transformers_config(checkpoint.folder, model_type)
    elif model_type == arch.model_type:
        config = _config(checkpoint, arch)
    else:
        config = _shallow(transformers_config(checkpoint.folder, model_type), depth)
    try:
        model, loading = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            config=_with_short_windows(config),
            dtype=checkpoint.dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (RuntimeError, ValueError, LookupError, TypeError, AttributeError, OSError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{checkpoint.folder}: transformers cannot load it as a {model_type} model: {reason}"
        ) from error
    return model.eval(), sorted(loading["missing_keys"])


def _with_short_windows(config: Any) -> Any:
    """Shorten the attention windows of a config, so that a model that ignores them differs on a few tokens."""
    if getattr(config, "sliding_window", None):
        config.sliding_window = NUM_TOKENS // 2
    return config


def _shallow(config: Any, depth: int) -> Any:
    """Return a config with fewer layers; lists that have an entry per layer keep their first entries."""
    values, whole = config.to_dict(), config.num_hidden_layers
    for name, value in values.items():
        if isinstance(value, list) and len(value) == whole and not name.endswith("token_id"):
            values[name] = value[:depth]
    values[config.attribute_map.get("num_hidden_layers", "num_hidden_layers")] = depth
    return AutoConfig.for_model(values.pop("model_type"), **values)


def _difference(stock: Any, tables: Any, arch: Arch) -> str | None:
    """Name the first tensor, else the first layer, in which two models differ; None where they agree."""
    if type(stock) is type(tables):
        weights = tables.state_dict()
        for name, value in stock.state_dict().items():
            other = weights[name]
            if not torch.equal(value, other) and not torch.allclose(value, other, 0, 0, equal_nan=True):
                return f"tensor {name} differs"
    for (name, one), (_, other) in zip(_activations(stock, arch), _activations(tables, arch), strict=True):
        if not _agree(one, other):
            return f"{name} differ"
    return None


def _activations(model: Any, arch: Arch) -> Iterator[tuple[str, Tensor]]:
    """Run a model on a few tokens and yield the residual stream after each layer (1, T, hidden), then the logits."""
    ids = torch.linspace(0, arch.axis_size("vocab") - 1, NUM_TOKENS).long()[None]
    family = FAMILIES.get(model.config.model_type, arch.family)
    modules = dict(model.named_modules())
    depth = range(arch.axis_size("layer"))
    layers = [modules[name] for number in depth if (name := family.layer_module(number)) in modules]
    with watching([(layer, "output") for layer in layers]) as streams:
        logits = model(input_ids=ids, use_cache=False).logits
    yield from ((f"the outputs of layer {number}", stream) for number, stream in enumerate(streams))
    yield "the logits", logits


def _agree(one: Tensor, other: Tensor) -> bool:
    if one.shape != other.shape:
        return False
    tolerance = TOLERANCE.get(one.dtype, HALF_TOLERANCE) * float(one.nan_to_num().abs().max())
    return torch.allclose(one, other, rtol=0.0, atol=tolerance, equal_nan=True)
