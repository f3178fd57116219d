"""Trains students that are the beginnings of one another: all compute with the weights of the largest one."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from minitron.errors import UserError
from minitron.model.beginning import Beginning
from minitron.model.checkpoint import Checkpoint
from minitron.model.language_model import Headless, Readout
from minitron.recipe import DistillRecipe
from minitron.runtime import num_ranks

Scale = Callable[[Tensor], Tensor]
GOLDEN_RATIO = (5**0.5 - 1) / 2
"""Multiples of this fill the interval from 0 to 1 evenly, however many are taken."""


@dataclass(frozen=True)
class Member:
    """A student of a nested series before its training, and how often it is trained."""

    name: str
    pruned: Checkpoint
    begins: Beginning
    """What it has of the largest student."""
    weight: float
    """Its share of the steps."""


class Nested(Headless):
    """A smaller student that computes with the beginnings of the parameters of the largest one.

    Its own tensors differ from those by a factor where norms were rescaled, or embeddings scaled, for its hidden size.
    The parameters of this module are those of the largest student.
    """

    def __init__(self, member: Member, largest: Headless, model: nn.Module) -> None:
        """`model` is the member's pruned model as transformers loads it, whose own weights are freed."""
        super().__init__(model)
        self.member, self._shared, self._largest_parameters = member, _tensors(largest.model), largest.parameters
        self._factors = _factors(member, _tensors(model), self._shared)
        _free(model)
        self._plain = Headless(model)

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Return the parameters of the largest student, which are those that are trained."""
        return self._largest_parameters(recurse)

    def tensors(self) -> dict[str, Tensor]:
        """Return the student's tensors by name, made of the parameters of the largest one."""
        named = dict(self.member.begins.of(self._shared))
        return named | {name: scaled(named[name]) for name, scaled in self._factors.items()}

    def forward(self, input_ids: Tensor, readout: Readout, positions: Tensor | None = None) -> Any:
        """Return `readout(hidden, head)`; see `Headless`."""
        tensors = {f"model.{name}": value for name, value in self.tensors().items()}
        return torch.func.functional_call(self._plain, tensors, (input_ids, readout, positions))


def require_nestable(recipe: DistillRecipe) -> None:
    """Check that students can be trained on shared weights as a recipe says.

    Raises:
        UserError: an option trains or reads the weights of one model alone.
    """
    reasons = {
        f"distill.trains {recipe.trains}": recipe.trains != "full",
        "distill.quantize": recipe.quantize is not None,
        "distill.intermediate": bool(recipe.intermediate.of),
        "distill.correction": recipe.correction.trains != "nothing",
        "distill.on_policy": recipe.on_policy.share > 0,
        "distill.neftune_alpha": recipe.neftune_alpha is not None,
        "distill.activation_checkpointing": recipe.activation_checkpointing,
        "torchrun": num_ranks() > 1,
    }
    if given := next((name for name, holds in reasons.items() if holds), None):
        raise UserError(f"{given} trains one student, not a nested series: leave it out")


def require_equal_names(teacher: Checkpoint) -> None:
    """Check that transformers holds the tensors of a model as its files do, so that one can be a part of another.

    Raises:
        UserError: it does not, as where it joins the experts of a layer.
    """
    with torch.device("meta"):
        held = _tensors(AutoModelForCausalLM.from_config(deepcopy(teacher.config)))
    names = {place.row.tensor_name(place.layer, place.expert) for place in teacher.arch.places()}
    if other := next(iter(sorted(names ^ held.keys())), None):
        raise UserError(
            f"{teacher.arch.model_type}: transformers does not hold {other} as files do, so that students cannot share "
            "weights in one training: leave out lineage.nested"
        )


def drawn(step: int, weights: list[float], seed: int) -> int:
    """Return the number of the student that a step trains, by weights that sum to 1, evenly along the steps."""
    place = (step * GOLDEN_RATIO + torch.rand((), generator=torch.Generator().manual_seed(seed)).item()) % 1
    return next((i for i, end in enumerate(accumulate(weights)) if place < end), len(weights) - 1)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and the saved buffers of a model by name, each once."""
    saved = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return {**dict(model.named_parameters()), **buffers}


@torch.no_grad()
def _factors(member: Member, own: dict[str, Tensor], shared: dict[str, Tensor]) -> dict[str, Scale]:
    """Return functions that turn beginnings into the student's own tensors, by name, where these are not equal."""
    arch, factors = member.pruned.arch, dict[str, Scale]()
    named = dict(member.begins.of(shared))
    norms = {norm.name for norm in arch.family.norms}
    for place in arch.places():
        row, name = place.row, place.row.tensor_name(place.layer, place.expert)
        is_norm = row.owner in norms and "hidden" in row.axes
        if not is_norm and not (row == arch.embedding and arch.family.scales_embedding):
            continue
        offset = arch.family.norm_offset if is_norm and name.endswith("weight") else 0.0
        whole, value = named[name].double() + offset, own[name].double() + offset
        factor = float((whole * value).sum() / whole.square().sum())
        if factor != 1.0:
            factors[name] = partial(_scaled, factor=factor, offset=offset)
    return factors


def _scaled(value: Tensor, factor: float, offset: float) -> Tensor:
    return (value + offset) * factor - offset


def _free(model: nn.Module) -> None:
    """Let the parameters of a model hold no memory, while what it shares between modules stays shared."""
    on_meta: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
            module.register_parameter(name, on_meta.setdefault(id(parameter), empty))
