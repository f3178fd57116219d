"""The shapes that a search offers, and the check of a shape that is asked for; both before any work."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from minitron.distillation import require_spellable, require_trainable
from minitron.distillation.rounding import is_divided, require_roundable
from minitron.errors import UserError
from minitron.model.anatomy import AXES
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint
from minitron.model.config import student_config
from minitron.model.engines import added_obstacles, order_obstacles
from minitron.model.memory import attention_windows
from minitron.nas.acceptance import RELATED, Acceptance, combinations
from minitron.nas.budget import Budget, budget_of
from minitron.nas.runnable import require_runnable, runnable
from minitron.nas.shapes import Shapes, SplitDepth, every_shape, feasible
from minitron.nas.trial import trial_recipe
from minitron.nas.vocabulary import vocabulary_sizes
from minitron.pruning import Importance, ranked_depth, require_measurable
from minitron.pruning.repair import require_tokens
from minitron.pruning.rounds import shapes_between
from minitron.session import Session

logger = logging.getLogger(__name__)


def shapes_within(session: Session) -> tuple[Shapes, Budget]:
    """Return all shapes that fit the recipe's budget and that transformers accepts, and that budget.

    Limits on speed are left out of both. A recipe that states a shape has no budget, and that shape alone fits it.

    Raises:
        UserError: the recipe has no budget, several targets or stages, the budget is not understood, or no shape fits
            it; or something that the search would need later is missing (`require_measurable`, `require_trainable`); or
            the stated shape cannot be cut (`Arch.require_prunable_to`, `check_shape`), or the engine that the recipe
            names runs no shape (`runnable`, `require_runnable`).
    """
    target, source = session.recipe.target_params, session.source
    if isinstance(target, tuple):
        raise UserError("several target_params make a series of students, which is what compress does; give one")
    if session.recipe.stages:
        raise UserError("a recipe with stages is what compress takes; give a recipe of one shape or budget")
    require_measurable(session)
    if session.recipe.shape:
        return _stated(session), Budget({})
    require_trainable(session, source.arch, trial_recipe(session.recipe.distill, 1, session.context))
    budget = budget_of(session, target)
    shapes = _offered(session, budget)
    if AXES["vocab"] in shapes.sizes:
        require_spellable(session.recipe.distill)
    for line in _obstacles_of_all(source, shapes):
        logger.warning("of no shape within the budget: %s", line)
    return shapes, budget


def inside(shapes: Shapes, budget: Budget, larger: Arch) -> tuple[Shapes, Budget]:
    """Return those of the shapes that are beginnings of a larger one, and the budget with that limit.

    Raises:
        UserError: none is.
    """
    budget = replace(budget, larger=larger)
    return feasible(shapes, budget), budget


def _stated(session: Session) -> Shapes:
    source = session.source.arch
    shape = source.resized(**session.recipe.shape)
    source.require_prunable_to(shape)
    require_runnable(session.source, shape, session.recipe.search)
    check_shape(session, shape)
    if shape.axis_size("vocab") < source.axis_size("vocab"):
        require_spellable(session.recipe.distill)
    return Shapes.of(source, [shape], {"num_parameters": np.array([shape.num_parameters])})


def with_ranked_layers(session: Session, importance: Importance, shapes: Shapes, budget: Budget) -> Shapes:
    """Return the shapes of a search, with the depth split among the kinds of layers by their common ranking.

    Nothing changes unless the recipe ranks layers together (`depth.ranking`) and they are of several kinds. Depths that
    do not occur among `shapes`, whose layers may not have been scored, are left out.

    Raises:
        UserError: no shape fits the budget.
    """
    if not ranks_together(session):
        return shapes
    ranked = _offered(session, budget, partial(ranked_depth, importance, session.source.arch))
    depth = AXES["layer"]
    return feasible(ranked.at(np.isin(ranked.sizes[depth], shapes.sizes[depth])), budget)


def ranked_shape(session: Session, importance: Importance, sizes: Mapping[str, int]) -> Arch:
    """Return the shape of some sizes, with its depth split among the kinds of layers as the recipe ranks them.

    Raises:
        UserError: see `Arch.resized`.
    """
    teacher, depth = session.source.arch, sizes.get(AXES["layer"])
    if depth is None or not ranks_together(session):
        return teacher.resized(**sizes)
    return teacher.resized(**{**sizes, **ranked_depth(importance, teacher, depth, sizes)})


def ranks_together(session: Session) -> bool:
    """Return whether the layers of the model that is pruned are of several kinds and are ranked together."""
    return session.recipe.depth.ranking == "together" and bool(session.source.arch.layer_counts)


def _offered(session: Session, budget: Budget, split: SplitDepth | None = None) -> Shapes:
    source = session.source
    windows = attention_windows(source.config.to_dict())
    recipe = session.recipe.search
    if sizes := vocabulary_sizes(session):
        recipe = recipe.model_copy(update={"space": {**recipe.space, AXES["vocab"]: sizes}})
    shapes = every_shape(source.arch, budget, recipe, windows, split=split)
    shapes = runnable(source, Acceptance(source).of(shapes), session.recipe.search)
    if scheme := session.recipe.distill.quantize:
        shapes = shapes.at(np.broadcast_to(is_divided(source.arch, scheme, shapes.sizes), len(shapes)))
    return feasible(shapes, budget)


def check_shape(session: Session, shape: Arch) -> None:
    """Check a shape that is asked for before any work, and warn of engines that will not run it.

    Raises:
        UserError: the config class refuses the shape or one on the way to it, the scheme of `distill.quantize` cannot
            round it, or there are too few calibration tokens to repair it.
    """
    source, recipe = session.source, session.recipe
    acceptance = Acceptance(source)
    for arch in (shape, *shapes_between(source.arch, shape, recipe.prune.rounds)):
        acceptance.require(arch)
    if recipe.distill.quantize is not None:
        require_roundable(shape, recipe.distill.quantize)
    require_tokens(source.arch, shape, recipe.prune, recipe.calibration.tokens)
    teacher = source.config.to_dict()
    student = student_config(source, shape, source.arch.first_layers(shape)).to_dict()
    lines = order_obstacles(teacher) if shape.axis_size("layer") < source.arch.axis_size("layer") else {}
    for line in (lines | added_obstacles(teacher, student)).values():
        logger.warning(line)


def warn_of_order(source: Checkpoint, shape: Arch, config: Mapping[str, Any]) -> None:
    """Warn of engines that will not run a pruned model of this config for the order of the layers that it has kept."""
    in_order = student_config(source, shape, source.arch.first_layers(shape)).to_dict()
    for line in added_obstacles(in_order, config).values():
        logger.warning(line)


def warn_of_engines(source: Checkpoint, shape: Arch, kept_layers: list[int]) -> None:
    """Warn of engines that run the teacher, but will not run a student of this shape with these of its layers."""
    student = student_config(source, shape, kept_layers).to_dict()
    for line in added_obstacles(source.config.to_dict(), student).values():
        logger.warning(line)


def _obstacles_of_all(source: Checkpoint, shapes: Shapes) -> list[str]:
    """Return a line for each engine that runs none of the shapes, by one shape for every combination of heads."""
    teacher = source.config.to_dict()
    largest_first = shapes.at(slice(None, None, -1))
    names = [name for axis in RELATED[0] if (name := AXES[axis]) in shapes.sizes]
    _, firsts = np.unique(combinations(largest_first, names), return_index=True)
    common: dict[str, str] | None = None
    for i in firsts[::-1]:
        arch = largest_first[int(i)]
        lines = added_obstacles(teacher, student_config(source, arch, source.arch.first_layers(arch)).to_dict())
        common = lines if common is None else {name: line for name, line in common.items() if name in lines}
        if not common:
            break
    return list((common or {}).values())
