"""The stages of a recipe: steps that `compress` takes in a row, each from the model that the one before has made."""

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from minitron.errors import UserError
from minitron.recipe import DEFAULT_CONTEXT, Recipe, laid_over, validate

Kind = Literal["cut", "distill", "correct"]
"""A student is cut out and distilled; a student is distilled further, its shape as it is; the teacher is trained."""
STEPS: dict[Kind, tuple[str, ...]] = {
    "cut": ("calibrate", "search", "prune", "distill", "evaluate"),
    "distill": ("distill", "evaluate"),
    "correct": ("distill", "evaluate"),
}
"""What is done in a run directory, by the kind of its stage."""
IN_WORDS: dict[Kind, str] = {
    "cut": "prune and distil",
    "distill": "distil the student further",
    "correct": "correct the teacher",
}
"""What a stage does, by its kind."""


@dataclass(frozen=True)
class Stage:
    """One stage: its own recipe, and what it does."""

    name: str
    recipe: Recipe
    kind: Kind = "cut"

    @property
    def is_taught_by_larger(self) -> bool:
        """Whether the student that it cuts is taught by the student that it starts from; none teaches itself."""
        return self.kind == "cut" and self.recipe.lineage.taught_by == "larger"


def stores_states(recipe: Recipe) -> bool:
    """Return whether a series stores the teacher's outputs.

    It does not where the recipe does, where the teacher is needed, or where a student may have fewer tokens.
    """
    distill = recipe.distill
    # The teacher's outputs on a text depend on how the student writes it.
    is_cut = recipe.vocabulary.trim or "vocab_size" in {*recipe.search.space, *recipe.shape}
    is_needed = distill.intermediate.of or distill.correction.trains != "nothing" or distill.on_policy.share
    is_needed = is_needed or recipe.chats.share  # each student's run asks the teacher for its chats
    return recipe.lineage.stores_states and distill.teacher_states is None and not is_needed and not is_cut


def stages_of(recipe: Recipe) -> tuple[Stage, ...]:
    """Return the stages of a recipe, or one stage for each of several targets; nothing for a recipe of one run.

    Training text is read from where earlier stages with equal `data` and `seed` have stopped, unless a stage gives
    `distill.skip_tokens`.

    Raises:
        UserError: a stage has no name or that of another one, sets a key that is not accepted, or comes too early; or
            its evaluation text is one that an earlier stage trains on.
    """
    if isinstance(recipe.target_params, tuple):
        if recipe.stages:
            raise UserError("give stages or several target_params, not both")
        return tuple(
            Stage(str(target), recipe.model_copy(update={"target_params": target})) for target in recipe.target_params
        )
    stages: list[Stage] = []
    for values in recipe.stages:
        stage = _stage(recipe, values, stages)
        if stage.name in {earlier.name for earlier in stages}:
            raise UserError(f"stages: the name {stage.name} is given twice")
        has_student = any(earlier.kind == "cut" for earlier in stages)
        if stage.kind == "correct" and has_student:
            raise UserError(f"stage {stage.name}: the teacher is corrected before the first student is cut")
        if stage.kind == "distill" and not has_student:
            raise UserError(f"stage {stage.name}: the first student needs a shape, target_params or a budget")
        stages.append(stage)
    # Training text begins after held-out text, and stages read on where others have stopped.
    heldout = max((stage.recipe.heldout_tokens for stage in stages), default=0)
    stages = [replace(stage, recipe=_with_heldout(stage.recipe, heldout)) for stage in stages]
    for number, stage in enumerate(stages):
        for earlier in stages[:number]:
            _require_unseen(stage, earlier)
    return tuple(stages)


def nested_stages(recipe: Recipe) -> tuple[Stage, ...]:
    """Return one stage for each student of a nested series, largest first, which share one training.

    Their searches share the effort of one, and have no trials, which would train students apart.

    Raises:
        UserError: there are fewer than two, or one that does not cut a student; or see `stages_of`.
    """
    stages = stages_of(recipe)
    if len(stages) < 2 or any(stage.kind != "cut" for stage in stages):
        raise UserError(
            "lineage.nested needs several targets or shapes, largest first, such as --target-params 0.8,0.6"
        )
    effort = {"effort": recipe.search.effort / len(stages), "distill_tokens": 0}
    own = {"distill": recipe.distill, "stages": ()}
    return tuple(
        replace(stage, recipe=stage.recipe.model_copy(
            update={**own, "search": stage.recipe.search.model_copy(update=effort)}
        ))
        for stage in stages
    )  # fmt: skip


def _with_heldout(recipe: Recipe, tokens: int) -> Recipe:
    """Return a recipe with a number of held-out tokens, unless it gives one."""
    if recipe.search.tokens is not None:
        return recipe
    return recipe.model_copy(update={"search": recipe.search.model_copy(update={"tokens": tokens})})


def _stage(recipe: Recipe, values: dict[str, Any], earlier: list[Stage]) -> Stage:
    changes = dict(values)
    name, corrects = changes.pop("name", None), changes.pop("correct", False)
    if not isinstance(name, str | int | float) or not re.fullmatch(r"\w[\w.-]*(?<!\.json)(?<!\.html)", str(name)):
        raise UserError(f"stages: '{name}' is not the name of a stage; accepted: letters, digits, dots and dashes")
    where = f"stage {name}"
    if not isinstance(corrects, bool):
        raise UserError(f"{where}: correct is '{corrects}'; accepted: true or false")
    if fixed := changes.keys() & {"teacher", "family", "stages"}:
        raise UserError(f"{where}: {min(fixed)} is that of the whole recipe")
    own = validate(Recipe, laid_over(recipe.model_dump(exclude={"stages"}), changes), where)
    if "skip_tokens" not in changes.get("distill", {}):
        text = (own.data, own.seed)
        read = sum(stage.recipe.distill.tokens for stage in earlier if (stage.recipe.data, stage.recipe.seed) == text)
        own = own.model_copy(update={"distill": own.distill.model_copy(update={"skip_tokens": read})})
    return Stage(str(name), own, "correct" if corrects else "cut" if own.has_target else "distill")


def _require_unseen(stage: Stage, earlier: Stage) -> None:
    """Check that a stage is not evaluated on text that an earlier one trains on.

    Evaluation gets the first blocks of a text, held-out the next ones; blocks of another context end elsewhere.
    """
    if (stage.recipe.data, stage.recipe.seed) != (earlier.recipe.data, earlier.recipe.seed):
        return
    needed, untrained = _in_blocks(stage.recipe)[0], sum(_in_blocks(earlier.recipe))
    if needed > untrained:
        raise UserError(
            f"stage {stage.name}: the {needed:,} tokens that it is evaluated on reach into those that stage "
            f"{earlier.name} trains on, after {untrained:,}: set evaluation.tokens of the whole recipe to {needed}"
        )


def _in_blocks(recipe: Recipe) -> tuple[int, int]:
    """Return the tokens of evaluation and of held-out text, in whole blocks (`blocks.read_splits`)."""
    context = recipe.context or DEFAULT_CONTEXT
    evaluation, heldout = (
        max(1, tokens // context) * context for tokens in (recipe.evaluation.tokens, recipe.heldout_tokens)
    )
    return evaluation, heldout
