"""What moves the weights, and how far at each step."""

import math
from typing import Any

import torch

from minitron.distillation.parallel import whole
from minitron.errors import UserError
from minitron.model.arch import Arch
from minitron.model.language_model import Headless
from minitron.recipe import DistillRecipe
from minitron.runtime import World

Optimizers = list[torch.optim.Optimizer]


def make_optimizers(student: Headless, arch: Arch, recipe: DistillRecipe, world: World) -> Optimizers:
    """AdamW for everything that is trained; or Muon for the matrices of the layers and AdamW for the rest.

    Muon's steps are scaled to the root mean square of AdamW's, so that one learning rate fits both (arXiv 2502.16982,
    section 2.2). AdamW of eight bits keeps its moments in a quarter of the memory (arXiv 2110.02861); it is torchao's.

    Raises:
        UserError: AdamW of eight bits without torchao, or over several processes.
    """
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    found: Optimizers = []
    if recipe.optimizer == "muon":
        layers = student.model.get_submodule(arch.family.layer_list)
        matrices = [parameter for parameter in layers.parameters() if parameter.requires_grad and parameter.ndim == 2]
        if matrices:
            found.append(
                torch.optim.Muon(matrices, lr=0.0, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw")
            )
        taken = set(map(id, matrices))
        trained = [parameter for parameter in trained if id(parameter) not in taken]
    options: dict[str, Any] = {"betas": recipe.betas, "weight_decay": recipe.weight_decay}
    if trained and recipe.optimizer == "adamw8bit":
        if world.size > 1:
            raise UserError("distill.optimizer adamw8bit runs in one process; accepted under torchrun: adamw, muon")
        try:
            from torchao.optim import AdamW8bit
        except ImportError as error:
            raise UserError("distill.optimizer adamw8bit needs torchao: pip install 'minitron[8bit]'") from error
        found.append(AdamW8bit(trained, lr=0.0, **options))
    elif trained:
        found.append(torch.optim.AdamW(trained, lr=0.0, fused=True, **options))
    return found


def take_step(student: Headless, optimizers: Optimizers, rate: float, max_grad_norm: float, loss: float) -> float:
    """Move the weights along the clipped gradients, unless these or the loss are not finite, and forget the gradients.

    Returns:
        The norm of the gradients before clipping.
    """
    norm = float(whole(torch.nn.utils.clip_grad_norm_(student.parameters(), max_grad_norm)))
    for optimizer in optimizers:
        _set_rate(optimizer, rate)
        if math.isfinite(loss) and math.isfinite(norm):
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return norm


def make_state(optimizers: Optimizers) -> None:
    """Give optimizers that have not taken a step the state that a checkpoint is read into."""
    for optimizer in optimizers:
        _set_rate(optimizer, 0.0)
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def learning_rate(step: int, num_steps: int, recipe: DistillRecipe) -> float:
    """Linear warm-up to the peak, then a cosine down to `min_learning_rate_ratio` of it.

    Or, by the schedule `wsd` (warm-up, stable, decay; MiniCPM, arXiv 2404.06395, section 4), the peak until the last
    `decay_ratio` of the steps and a straight line down over these.
    """
    warmup = max(1, round(recipe.warmup_ratio * num_steps))
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    low = recipe.min_learning_rate_ratio
    if recipe.schedule == "wsd":
        start = max(warmup, num_steps - max(1, round(recipe.decay_ratio * num_steps)))
        share = 1.0 if step < start else 1 - (step - start) / max(1, num_steps - start)
    else:
        share = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))
    return recipe.learning_rate * (low + (1 - low) * share)
