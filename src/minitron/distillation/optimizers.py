"""The optimizer of a training, one step of it, and the learning rate of every step."""

import math
from typing import Any

import torch

from minitron.distillation.parallel import whole
from minitron.errors import UserError
from minitron.model.language_model import Headless
from minitron.recipe import DistillRecipe

WARMUP_RATIO = 0.05
"""The share of the steps over which the learning rate rises, where a recipe gives neither a share nor a number."""

EPSILON_SHARE = 0.3
"""AdamW's ε as a share of the root mean square of a clipped gradient (docs/studies/token-efficiency.md)."""


def make_optimizer(student: Headless, recipe: DistillRecipe) -> torch.optim.Optimizer:
    """Return AdamW for all parameters that are trained.

    AdamW with moments of eight bits is torchao's and takes a quarter of the memory (arXiv 2110.02861).

    Raises:
        UserError: moments of eight bits need torchao, which is not installed.
    """
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    options: dict[str, Any] = {"betas": recipe.betas, "weight_decay": recipe.weight_decay}
    options["eps"] = epsilon(sum(parameter.numel() for parameter in trained), recipe)
    if recipe.optimizer == "adamw":
        return torch.optim.AdamW(trained, lr=0.0, fused=True, **options)
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UserError("distill.optimizer adamw8bit needs torchao: pip install 'minitron[8bit]'") from error
    optimizer: torch.optim.Optimizer = AdamW8bit(trained, lr=0.0, **options)
    return optimizer


def epsilon(num_weights: int, recipe: DistillRecipe) -> float:
    """Return AdamW's ε for a number of trained weights.

    Adam moves every weight by about the learning rate, however small its gradient is. Rows of tokens that the text
    never holds get hardly more than noise, and drift by it; an ε in proportion to the usual gradient holds them.
    """
    if recipe.eps is not None:
        return recipe.eps
    return EPSILON_SHARE * min(1.0, recipe.max_grad_norm) / math.sqrt(num_weights)


def take_step(
    student: Headless, optimizer: torch.optim.Optimizer, rate: float, max_grad_norm: float, loss: float
) -> float:
    """Move the weights along the clipped gradients, unless gradients or loss are not finite, and free the gradients.

    Returns the norm of the gradients before clipping.
    """
    norm = float(whole(torch.nn.utils.clip_grad_norm_(student.parameters(), max_grad_norm)))
    _set_rate(optimizer, rate)
    if math.isfinite(loss) and math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def make_state(optimizer: torch.optim.Optimizer) -> None:
    """Create the state of an optimizer that has not taken a step, so that a checkpoint can be read into it."""
    _set_rate(optimizer, 0.0)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def num_warmup_steps(num_steps: int, recipe: DistillRecipe) -> int:
    """Return the number of steps over which the learning rate rises: as given, or a share of all steps."""
    if recipe.warmup_steps is not None:
        return recipe.warmup_steps
    return round((WARMUP_RATIO if recipe.warmup_ratio is None else recipe.warmup_ratio) * num_steps)


def learning_rate(step: int, num_steps: int, recipe: DistillRecipe) -> float:
    """Return the learning rate of a step: linear warm-up to the peak, then a cosine to `min_learning_rate_ratio` of it.

    The schedule `wsd` (warm-up, stable, decay; MiniCPM, arXiv 2404.06395, section 4) stays at the peak until the last
    `decay_ratio` of the steps, and falls in a straight line over those.
    """
    warmup = max(1, num_warmup_steps(num_steps, recipe))
    if step < warmup:
        return recipe.learning_rate * (step + 1) / warmup
    low = recipe.min_learning_rate_ratio
    if recipe.schedule == "wsd":
        start = max(warmup, num_steps - max(1, round(recipe.decay_ratio * num_steps)))
        share = 1.0 if step < start else 1 - (step - start) / max(1, num_steps - start)
    else:
        share = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))
    return recipe.learning_rate * (low + (1 - low) * share)
