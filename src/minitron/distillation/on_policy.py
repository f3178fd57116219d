"""Blocks that a student has continued itself (on-policy distillation, arXiv 2306.13649; short at first, 2606.06021)."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from minitron.data.blocks import Blocks
from minitron.distillation.objective import Objective
from minitron.model.drawing import drawn_after
from minitron.recipe import DistillRecipe


@dataclass(frozen=True)
class OnPolicy:
    """The last steps of a training, in which the student continues beginnings of the text."""

    objective: Objective
    """The loss on text."""
    recipe: DistillRecipe
    num_steps: int
    """The steps of the whole training."""

    @property
    def first(self) -> int:
        """The first step of this kind."""
        return self.num_steps - math.ceil(self.recipe.on_policy.share * self.num_steps)

    def length(self, step: int, context: int) -> int | None:
        """Return the tokens of a continuation in a step: a doubling series from first to last; None: on the text."""
        if step < self.first:
            return None
        least, most = (min(tokens, context // 2) for tokens in self.recipe.on_policy.tokens)
        doublings = int(math.log2(most / least))
        place = (step - self.first) / max(1, self.num_steps - self.first)
        return int(least * 2 ** min(doublings, int(place * (doublings + 1))))

    def objective_of(self, length: int, context: int) -> Objective:
        """Return the loss of a step, whose micro-batches have as many tokens as those on text."""
        rows = self.recipe.micro_batch_size * (context // (2 * length))
        recipe = self.recipe.model_copy(
            update={"loss": self.recipe.on_policy.loss, "label_weight": 0.0, "micro_batch_size": rows}
        )
        return replace(self.objective, recipe=recipe, intermediate=None)


def continued(model: Any, blocks: Blocks, length: int) -> Blocks:
    """Return pieces of blocks, 2·length tokens each, whose second half the model has drawn at temperature 1.

    Only the second half is learnt. A document that ends there is followed by the beginning of another one, as in the
    text itself.
    """
    pieces = blocks.context // (2 * length)
    ids = blocks.ids[:, : pieces * 2 * length].reshape(-1, 2 * length)
    output = drawn_after(model, ids[:, :length], length)
    is_learnt = torch.zeros_like(ids, dtype=torch.bool)
    is_learnt[:, length:] = True
    return Blocks(output.to(ids.device), torch.zeros_like(ids, dtype=torch.int32), is_learnt)
