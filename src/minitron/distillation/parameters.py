"""Chooses the parameters of a model that are trained: all, those of its norms, or low-rank adapters of its matrices."""

import re
import warnings
from collections.abc import Callable
from typing import Any

import torch

from minitron.errors import UserError
from minitron.model.arch import Arch
from minitron.recipe import CorrectionRecipe, DistillRecipe


def choose_parameters(
    model: Any, arch: Arch, recipe: DistillRecipe | CorrectionRecipe, seed: int
) -> Callable[[], None]:
    """Freeze the parameters that the recipe's `trains` leaves out; return a function that ends the training.

    The function makes a stock model again: adapters (LoRA, arXiv 2106.09685, by peft), which every linear map of the
    layers has, are merged into the matrices.

    Raises:
        UserError: adapters need peft, which is not installed.
    """
    if recipe.trains == "norms":
        norms = "|".join(norm.module.replace("{i}", r"\d+") for norm in arch.family.norms)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(re.fullmatch(rf"[^.]+\.({norms})\.(weight|bias)", name) is not None)
    if recipe.trains != "lora":
        return lambda: None
    try:
        from peft import LoraConfig, LoraModel
    except ImportError as error:
        raise UserError("distill.trains lora needs peft: pip install 'minitron[lora]'") from error
    # Fused Mamba kernels multiply by their output matrix themselves and would ignore an adapter.
    mixers = [row for row in arch.rows if "mhead" in row.axes and row.dimensions[0] == (("hidden",),)]
    excluded = [row.owner.rsplit("{i}.", 1)[-1] for row in mixers] or None
    config = LoraConfig(
        r=recipe.lora_rank, lora_alpha=2 * recipe.lora_rank, target_modules="all-linear", exclude_modules=excluded
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):  # peft warns and corrects itself
        torch.manual_seed(seed)
        adapted = LoraModel(model, config, "default")
    return lambda: adapted.merge_and_unload() and None
