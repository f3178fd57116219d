"""Models in memory: loading one, building one from tensors, and running it up to its last hidden states."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from minitron.model.anatomy import Norm, Row
from minitron.model.checkpoint import Checkpoint
from minitron.model.families import family_of
from minitron.progress import Progress


@dataclass(frozen=True)
class Head:
    """How last hidden states become logits: `softcap · tanh(states @ weightᵀ / softcap)`, or without the cap."""

    weight: Tensor  # (vocab, hidden)
    softcap: float | None = None

    def logits(self, states: Tensor) -> Tensor:
        """Of states (…, hidden), in float32 or better: for few tokens at a time."""
        dtype = torch.promote_types(states.dtype, torch.float32)
        return soft_capped(states.to(dtype) @ self.weight.to(dtype).T, self.softcap)


def soft_capped(logits: Tensor, softcap: float | None, in_place: bool = False) -> Tensor:
    """Return `softcap · tanh(logits / softcap)`, or the logits themselves without a cap.

    In place, the logits are overwritten, which autograd does not allow.
    """
    if not softcap:
        return logits
    if in_place:
        return logits.div_(softcap).tanh_().mul_(softcap)
    return softcap * torch.tanh(logits / softcap)


Readout = Callable[[Tensor, Head], Any]
"""From last hidden states (B, T, hidden) and the head to what is wanted of them."""


class Headless(nn.Module):
    """A causal language model whose logits are never formed: the caller reads the last hidden states out.

    A family that scales its logits gets its hidden states scaled instead, which is the same. Everything, the
    readout included, happens inside `forward`, so that wrapping this module as a whole (`fully_shard`) covers
    the output matrix too.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        config: Any = model.config
        family = family_of(config.model_type)
        divisor = getattr(config, family.logit_divisor) if family.logit_divisor else 1.0
        multiplier = getattr(config, family.logit_multiplier) if family.logit_multiplier else 1.0
        self.scale = multiplier / divisor
        self.softcap = _softcap(config)

    def forward(self, input_ids: Tensor, readout: Readout, positions: Tensor | None = None) -> Any:
        """`readout(hidden, head)` for token ids (B, T); where `positions` (B, T) begin anew, so does attention."""
        model: Any = self.model
        given = {} if positions is None else {"position_ids": positions}
        hidden = model.base_model(input_ids=input_ids, use_cache=False, **given).last_hidden_state  # (B, T, hidden)
        if self.scale != 1.0:
            hidden = hidden * self.scale
        return readout(hidden, Head(model.get_output_embeddings().weight, self.softcap))


def read_head(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Head:
    """The head of a model on disk, without the rest of it."""
    weight = checkpoint.tensor(checkpoint.arch.output.name).to(device, dtype)
    return Head(weight, _softcap(checkpoint.config))


def _softcap(config: Any) -> float | None:
    name = family_of(config.model_type).logit_softcap
    return getattr(config, name) if name else None


def load_model(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Any:
    """The transformers model of a checkpoint, in evaluation mode."""
    transformers_logging.disable_progress_bar()
    with Progress(f"load {checkpoint.folder.name}"):
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder, config=checkpoint.config, dtype=dtype, local_files_only=True, use_safetensors=True
        )
        return model.to(device).eval()


def build_model(
    config: Any, tensors: Iterable[tuple[str, Tensor]], device: torch.device, dtype: torch.dtype | None = None
) -> Any:
    """A transformers model around tensors that are in memory already, in evaluation mode; in their dtype by default."""
    transformers_logging.disable_progress_bar()
    state = dict(tensors)
    dtype = dtype or next(iter(state.values())).dtype
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    return model_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype).to(device).eval()


def module_of(model: Any, part: Row | Norm, layer: int | None = None) -> nn.Module:
    """Return the module of a transformers model that holds a row's tensor, or that is a norm, in a layer."""
    module: nn.Module = model.base_model.get_submodule(part.module.replace("{i}", str(layer)))
    return module


def entering(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Of what a layer is called with: the residual stream, and what is given beside it."""
    if args:
        return args[0], args[1:], kwargs
    beside = dict(kwargs)
    return beside.pop("hidden_states"), (), beside


def leaving(output: Any) -> Tensor:
    """Of what a layer returns: the residual stream."""
    stream: Tensor = output[0] if isinstance(output, tuple) else output
    return stream


Point = tuple[nn.Module, str]
"""The `input` or the `output` of a module."""


@contextmanager
def watching(points: list[Point], reached: Callable[[list[Any]], None] | None = None) -> Iterator[list[Any]]:
    """What there is at some points, filled in as models run; `reached` is told of each that is."""
    seen: list[Any] = [None] * len(points)

    def take(i: int, value: Tensor) -> None:
        seen[i] = value
        if reached:
            reached(seen)

    with ExitStack() as hooks:
        for i, (module, side) in enumerate(points):
            if side == "input":
                handle = module.register_forward_pre_hook(
                    lambda _, args, kwargs, i=i: take(i, entering(args, kwargs)[0]), with_kwargs=True
                )
            else:
                handle = module.register_forward_hook(lambda _, __, output, i=i: take(i, leaving(output)))
            hooks.callback(handle.remove)
        yield seen
