"""The shapes that an engine runs, by the conditions that were read in its sources; the others are not offered."""

import logging
from collections.abc import Sequence

import numpy as np

from minitron.errors import UserError
from minitron.model.anatomy import AXES
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint
from minitron.model.config import student_config, student_values
from minitron.model.engines import Engine, Obstacle, engine_named
from minitron.nas.acceptance import combinations
from minitron.nas.shapes import Shapes
from minitron.recipe import SearchRecipe

logger = logging.getLogger(__name__)

COMPARED = ("hidden", "query", "kv", "head_dim")
"""Axes whose sizes an engine compares with each other, in addition to the depth."""


def runnable(source: Checkpoint, shapes: Shapes, recipe: SearchRecipe) -> Shapes:
    """Return the shapes that the engine of a recipe runs on its GPUs: all of them where it names no engine.

    Which layers stay is known once they are scored: the first ones stand for them (`warn_of_engine`).

    Raises:
        UserError: the engine does not run the family, or what it asks was not read, or it runs none of the shapes.
    """
    if recipe.engine is None or not len(shapes):
        return shapes
    engine = require_family(source, recipe)
    shapes = of_passing_sizes(shapes, recipe)
    teacher, demand = source.arch, source.arch.family.demand
    written_as = {teacher.model_type} | ({demand.restated_as} if demand and demand.restated_as else set())
    if written_as <= engine.families and not any(limit.families & written_as for limit in engine.limits):
        return shapes
    names = [name for axis in COMPARED if (name := AXES[axis]) in shapes.sizes]
    names += [name for name in teacher.depth_names if name in shapes.sizes]
    _, firsts, positions = np.unique(combinations(shapes, names), return_index=True, return_inverse=True)
    found = [_network_obstacles(source, shapes[int(i)], engine, recipe.tensor_parallel) for i in firsts]
    passing = shapes.at(np.array([not obstacles for obstacles in found])[positions])
    if not len(passing):
        raise _none_left(engine, recipe, found[-1])
    return passing


def of_passing_sizes(shapes: Shapes, recipe: SearchRecipe) -> Shapes:
    """Return the shapes of which every size passes by itself in the engine that a recipe names, if it names one.

    Raises:
        UserError: there is none.
    """
    if recipe.engine is None:
        return shapes
    engine, gpus, teacher = engine_named(recipe.engine), recipe.tensor_parallel, shapes.teacher
    for limit in (limit for limit in engine.size_limits if teacher.model_type in limit.families):
        for name in (AXES[axis] for axis in limit.axes if AXES[axis] in teacher.sizes):
            sizes = shapes.sizes.get(name, np.full(len(shapes), teacher.sizes[name]))
            distinct, positions = np.unique(sizes, return_inverse=True)
            passing = shapes.at(np.array([limit.accepts(size, gpus) for size in distinct.tolist()], bool)[positions])
            if len(shapes) and not len(passing):
                largest = {name: int(distinct[-1])}
                raise _none_left(engine, recipe, engine.size_obstacles(teacher.model_type, largest, gpus))
            shapes = passing
    return shapes


def require_family(source: Checkpoint, recipe: SearchRecipe) -> Engine:
    """Return the engine of a recipe, which is known to run some models of the family on its GPUs.

    Raises:
        UserError: it does not run the family, or what it asks was not read.
    """
    assert recipe.engine is not None
    engine, family = engine_named(recipe.engine), source.arch.model_type
    engine.require_read(recipe.tensor_parallel)
    if family in engine.unsupported:
        raise UserError(f"{engine.title} does not run {family} models: {engine.unsupported[family]}")
    if family not in engine.families:
        raise UserError(f"whether {engine.title} runs {family} models was not read in its sources")
    return engine


def require_runnable(source: Checkpoint, shape: Arch, recipe: SearchRecipe) -> None:
    """Check that the engine of a recipe runs a shape that is asked for.

    Raises:
        UserError: it does not; the message names the sizes that would pass.
    """
    if recipe.engine is None:
        return
    engine, gpus = require_family(source, recipe), recipe.tensor_parallel
    obstacles = _network_obstacles(source, shape, engine, gpus)
    if obstacles := [*engine.size_obstacles(shape.model_type, shape.sizes, gpus), *obstacles]:
        raise UserError(f"{_on_gpus(engine, gpus)} does not run this shape: {_reasons(obstacles)}")


def warn_of_engine(source: Checkpoint, shape: Arch, kept_layers: list[int], recipe: SearchRecipe) -> None:
    """Warn where the engine of a recipe does not run a shape for the order of the layers that it has kept."""
    if recipe.engine is None:
        return
    engine, gpus = engine_named(recipe.engine), recipe.tensor_parallel
    if obstacles := engine.obstacles(student_config(source, shape, kept_layers).to_dict(), gpus):
        logger.warning(f"{_on_gpus(engine, gpus)} does not run the chosen student: {_reasons(obstacles)}")


def _network_obstacles(source: Checkpoint, shape: Arch, engine: Engine, gpus: int) -> list[Obstacle]:
    return engine.network_obstacles(student_values(source, shape, source.arch.first_layers(shape)), gpus)


def _none_left(engine: Engine, recipe: SearchRecipe, obstacles: Sequence[Obstacle]) -> UserError:
    where = _on_gpus(engine, recipe.tensor_parallel)
    return UserError(f"search: {where} runs no shape of the grid: {_reasons(obstacles)}")


def _on_gpus(engine: Engine, gpus: int) -> str:
    return f"{engine.title} on {gpus} GPUs" if gpus > 1 else engine.title


def _reasons(obstacles: Sequence[Obstacle]) -> str:
    return "; ".join(obstacle.reason for obstacle in obstacles)
