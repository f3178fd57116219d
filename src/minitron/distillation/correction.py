"""How a teacher is trained on the text that it teaches with (teacher correction, arXiv 2408.11796, section 2)."""

from minitron.distillation.optimizers import num_warmup_steps
from minitron.errors import UserError
from minitron.recipe import CorrectionRecipe, DistillRecipe

PEAK_SHARE = 1 / 5
"""The peak learning rate of correction, as a share of the peak of the teacher's own training."""
WARMUP_STEPS = 120
"""The number of warm-up steps of the paper's correction, which takes some 10,000 to 20,000 steps in all."""
RATE_WHILE_TEACHING = 1e-4
"""The peak learning rate of a teacher that learns while it teaches, where the recipe gives none."""


def correction_rate(recipe: CorrectionRecipe, otherwise: float) -> float:
    """Return the teacher's peak learning rate: as given, a fifth of that of its own training, or `otherwise`."""
    if recipe.learning_rate is not None:
        return recipe.learning_rate
    return otherwise if recipe.original.learning_rate is None else PEAK_SHARE * recipe.original.learning_rate


def recipe_of_correction(recipe: DistillRecipe, num_steps: int) -> DistillRecipe:
    """Return the settings with which `correct` trains a teacher for a number of steps.

    Peak and least learning rate and the schedule follow the teacher's own training as far as the recipe gives it. A
    warm-up that is not given takes 120 steps, in short trainings the usual share of the steps.

    Raises:
        UserError: the least learning rate is above the peak.
    """
    original, rate = recipe.correction.original, correction_rate(recipe.correction, recipe.learning_rate)
    changes: dict[str, object] = {"learning_rate": rate, "schedule": original.schedule or recipe.schedule}
    if original.min_learning_rate is not None:
        if original.min_learning_rate > rate:
            raise UserError(
                f"distill.correction.original.min_learning_rate {original.min_learning_rate:g} is above the peak of "
                f"the correction, {rate:g}"
            )
        changes["min_learning_rate_ratio"] = original.min_learning_rate / rate
    if recipe.warmup_ratio is None and recipe.warmup_steps is None:
        changes["warmup_steps"] = min(WARMUP_STEPS, num_warmup_steps(num_steps, recipe))
    return recipe.model_copy(update=changes)
