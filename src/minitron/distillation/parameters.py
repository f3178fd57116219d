"""Chooses the parameters of a model that are trained: all, its norms, adapters of its matrices, or layers in turn."""

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from minitron.errors import UserError
from minitron.model.arch import Arch
from minitron.recipe import CorrectionRecipe, DistillRecipe


@dataclass(frozen=True)
class LayersInTurn:
    """Layers of which a few train at a time, drawn again every few steps (LISA, arXiv 2403.17919, algorithm 1).

    Parameters outside the layers train throughout.
    """

    layers: list[nn.Module]
    num_trained: int
    num_steps: int
    """The number of steps after which other layers are drawn."""
    seed: int

    def begin(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Let the layers of a step train, and freeze all others, whose moments are dropped from the optimizer."""
        turn = step // self.num_steps
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + turn)
        drawn = set(torch.randperm(len(self.layers), generator=generator)[: self.num_trained].tolist())
        for number, layer in enumerate(self.layers):
            for parameter in layer.parameters():
                parameter.requires_grad_(number in drawn)
                if number not in drawn:
                    optimizer.state.pop(parameter, None)


@dataclass(frozen=True)
class Trained:
    """How the parameters of a model are trained."""

    adapted: Any = None
    """The model with adapters, as peft wraps it."""
    in_turn: LayersInTurn | None = None

    def begin(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Prepare a step: see `LayersInTurn.begin`."""
        if self.in_turn is not None:
            self.in_turn.begin(step, optimizer)

    def save_adapter(self, folder: Path, base: str) -> None:
        """Write the adapters as a folder of peft, for the model at the path or hub id `base`."""
        self.adapted.peft_config["default"].base_model_name_or_path = base
        self.adapted.save_pretrained(folder, save_embedding_layers=False)

    def finish(self) -> None:
        """Make a stock model again: adapters are merged into the matrices."""
        if self.adapted is not None:
            self.adapted.merge_and_unload()


def choose_parameters(model: Any, arch: Arch, recipe: DistillRecipe | CorrectionRecipe, seed: int) -> Trained:
    """Freeze the parameters that the recipe's `trains` leaves out.

    Adapters (LoRA, arXiv 2106.09685, by peft) are added to every linear map of the layers.

    Raises:
        UserError: adapters need peft, which is not installed.
    """
    if isinstance(recipe, DistillRecipe) and recipe.trains == "lisa":
        names = (arch.family.layer_module(layer) for layer in range(arch.axis_size("layer")))
        layers = [model.get_submodule(name) for name in names]
        return Trained(in_turn=LayersInTurn(layers, recipe.lisa_layers, recipe.lisa_steps, seed))
    if recipe.trains == "norms":
        norms = "|".join(norm.module.replace("{i}", r"\d+") for norm in arch.family.norms)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(re.fullmatch(rf"[^.]+\.({norms})\.(weight|bias)", name) is not None)
    if recipe.trains != "lora":
        return Trained()
    try:
        from peft import LoraConfig, PeftModel
    except ImportError as error:
        raise UserError("distill.trains lora needs peft: pip install 'minitron[lora]'") from error
    # Fused Mamba kernels multiply by their output matrix themselves and would ignore an adapter.
    mixers = [row for row in arch.rows if "mhead" in row.axes and row.dimensions[0] == (("hidden",),)]
    excluded = [row.owner.rsplit("{i}.", 1)[-1] for row in mixers] or None
    config = LoraConfig(
        r=recipe.lora_rank, lora_alpha=2 * recipe.lora_rank, target_modules="all-linear", exclude_modules=excluded,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):  # peft warns and corrects itself
        torch.manual_seed(seed)
        return Trained(adapted=PeftModel(model, config))
