"""Models in memory: load one, build one from tensors, run one up to its last hidden states, and watch its modules."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import logging as transformers_logging

from minitron.errors import UserError
from minitron.model.anatomy import Norm, Row
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint
from minitron.model.config import student_config
from minitron.model.families import family_of
from minitron.model.memory import writes_out_attention
from minitron.progress import Progress
from minitron.runtime import Runtime

HALVES = (torch.bfloat16, torch.float16)
"""The dtypes in which Flash Attention computes."""


@dataclass(frozen=True)
class Head:
    """The map from last hidden states to logits: `softcap · tanh(states @ weightᵀ / softcap)`, or without the cap."""

    weight: Tensor  # (vocab, hidden)
    softcap: float | None = None

    def logits(self, states: Tensor) -> Tensor:
        """Return the logits (…, vocab) of states (…, hidden) in float32 or better; for few tokens at a time."""
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
"""A function of last hidden states (B, T, hidden) and the head, whose result `Headless` returns."""


class Headless(nn.Module):
    """A causal language model that hands its last hidden states to a readout instead of forming all logits.

    Where a family scales its logits, the hidden states are scaled instead, which gives equal logits. The readout runs
    inside `forward`, so that wrapping this module as a whole (`fully_shard`) covers the output matrix too.
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
        """Return `readout(hidden, head)` for token ids (B, T); attention restarts where `positions` (B, T) restart."""
        model: Any = self.model
        position_ids = {} if positions is None else {"position_ids": positions}
        output = model.base_model(input_ids=input_ids, use_cache=False, **position_ids)
        hidden = output.last_hidden_state  # (B, T, hidden)
        if self.scale != 1.0:
            hidden = hidden * self.scale
        return readout(hidden, Head(model.get_output_embeddings().weight, self.softcap))


def read_head(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype) -> Head:
    """Return the head of a model on disk, without loading the rest of the model."""
    weight = checkpoint.tensor(checkpoint.arch.output.name).to(device, dtype)
    return Head(weight, _softcap(checkpoint.config))


def _softcap(config: Any) -> float | None:
    name = family_of(config.model_type).logit_softcap
    return getattr(config, name) if name else None


def require_attention(checkpoint: Checkpoint, runtime: Runtime) -> None:
    """Check that transformers can compute a model's attention as the runtime says, without loading a weight.

    Raises:
        UserError: the family cannot, a package is missing, or Flash Attention would run without a GPU or in float32.
    """
    name = runtime.attention
    if name is None:
        return
    if name.startswith("flash") and (runtime.device.type != "cuda" or runtime.dtype not in HALVES):
        raise UserError(
            f"attn_implementation {name} needs a GPU and bfloat16 or float16, not {runtime.device} and "
            f"{runtime.dtype_name}"
        )
    try:
        with torch.device("meta"):
            AutoModelForCausalLM.from_config(deepcopy(checkpoint.config), attn_implementation=name)
    except (ImportError, ValueError) as error:
        first_sentence = " ".join(str(error).split()).partition(". ")[0]
        raise UserError(f"attn_implementation {name}: {first_sentence}") from error


def attention_in_training(arch: Arch, num_blocks: int, context: int, runtime: Runtime) -> str | None:
    """Return the attention of a model that is trained, as in `Runtime`: what the user asked for, or the faster one.

    Written out it is faster where products are rounded, and slower where they are exact. See `writes_out_attention`;
    a training takes `num_blocks` blocks of `context` tokens at a time.
    """
    if (
        runtime.attention is None
        and runtime.rounds
        and writes_out_attention(arch, num_blocks, context, runtime.device.type)
    ):
        return "eager"
    return runtime.attention


def load_model(checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, attention: str | None = None) -> Any:
    """Load the transformers model of a checkpoint, in evaluation mode; `attention` is as in `Runtime`."""
    transformers_logging.disable_progress_bar()
    with Progress(f"load {checkpoint.folder.name}"):
        model = AutoModelForCausalLM.from_pretrained(
            checkpoint.folder,
            config=checkpoint.config,
            dtype=dtype,
            attn_implementation=attention,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
        )
        return model.to(device).eval()


def build_model(
    config: Any,
    tensors: Iterable[tuple[str, Tensor]],
    device: torch.device,
    dtype: torch.dtype | None = None,
    attention: str | None = None,
) -> Any:
    """Build a transformers model from tensors in memory, in evaluation mode; by default in the tensors' dtype.

    `attention` is as in `Runtime`.
    """
    transformers_logging.disable_progress_bar()
    state = dict(tensors)
    dtype = dtype or next(iter(state.values())).dtype
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    model = model_class.from_pretrained(
        None, config=config, state_dict=state, dtype=dtype, attn_implementation=attention, trust_remote_code=False
    )
    return model.to(device).eval()


def module_of(model: Any, part: Row | Norm, layer: int | None = None) -> nn.Module:
    """Return the module of a transformers model that holds a row's tensor or is a norm, in a layer or outside."""
    module: nn.Module = model.base_model.get_submodule(part.module.replace("{i}", str(layer)))
    return module


def entering(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, tuple[Any, ...], dict[str, Any]]:
    """Split the arguments of a layer into the residual stream and the other positional and keyword arguments."""
    if args:
        return args[0], args[1:], kwargs
    others = dict(kwargs)
    return others.pop("hidden_states"), (), others


def leaving(output: Any) -> Tensor:
    """Return the residual stream from the output of a layer."""
    stream: Tensor = output[0] if isinstance(output, tuple) else output
    return stream


Point = tuple[nn.Module, str]
"""A module and one of its sides, `input` or `output`."""


@contextmanager
def watching(points: list[Point], reached: Callable[[list[Any]], None] | None = None) -> Iterator[list[Any]]:
    """Yield a list of the values at some points, filled in as models run; `reached` receives it after each value."""
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


def random_model(source: Checkpoint, arch: Arch, runtime: Runtime, dtype: torch.dtype | None = None) -> Any:
    """Build the transformers model of a shape with random weights, to be timed; by default in the runtime's dtype.

    How long it takes depends on the kinds of the layers alone, so the first layers of each kind stand for those kept.
    """
    config = student_config(source, arch, source.arch.first_layers(arch))
    with torch.random.fork_rng(devices=[]), torch.device(runtime.device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype or runtime.dtype, attn_implementation=runtime.attention
        )
    return model.eval()
