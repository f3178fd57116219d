"""Estimates the speed of every shape from a few that are measured, and drops shapes that miss the limits on speed."""

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitron.errors import UserError
from minitron.files import read_jsonl
from minitron.nas.budget import SPEEDS, Budget, Limit, has_speed_limits, speed_limits
from minitron.nas.probes import probes
from minitron.nas.shapes import Shapes, feasible
from minitron.nas.speed import Speeds
from minitron.nas.workspace import Workspace
from minitron.progress import Progress

Array = NDArray[np.float64]
SPEED_MARGIN = 0.1
"""The share by which the estimated seconds of a shape may be below what would use up the budget.

No shape estimated above a limit is considered: larger shapes are expected to lose less, so shapes a little above
the limit would take all places.
"""


def meet_speed_limits(workspace: Workspace, shapes: Shapes, budget: Budget) -> tuple[Shapes, Budget]:
    """Return the shapes whose estimated speed is near the limits on speed, and the budget with these limits.

    Without limits on speed in the recipe, shapes and budget are returned as they are.

    Raises:
        UserError: no shape is near the limits, or the teacher meets them.
    """
    session, speeds = workspace.session, workspace.speeds
    if not has_speed_limits(session):
        return shapes, budget
    recipe, teacher = session.recipe.budget, session.teacher
    assert speeds.reference is not None
    if workspace.world.is_main:
        archs = [
            session.source.arch,
            *probes(shapes, workspace.acceptance).values(),
            shapes[0],
            shapes[len(shapes) - 1],
        ]
        with workspace.timed("speed"), Progress("speed", len(archs) + 1, "shapes") as progress, speeds:
            speeds.reference.measure(teacher.arch)
            progress.advance(1)
            for arch in archs:
                speeds.measure(arch)
                progress.advance(1)
    workspace.world.barrier()
    limits = speed_limits(recipe, session.recipe.search.tolerance, speeds.reference.measure(teacher.arch))
    estimated = {name: seconds for name, seconds in estimate(speeds, shapes).items() if name in limits}
    shapes = Shapes(shapes.teacher, shapes.sizes, {**shapes.figures, **estimated})
    loose = {name: Limit(limit.low * (1 - SPEED_MARGIN), limit.high) for name, limit in limits.items()}
    near = feasible(shapes, replace(budget, limits={**budget.limits, **loose}))
    return near, replace(budget, limits={**budget.limits, **limits})


def estimate(speeds: Speeds, shapes: Shapes) -> dict[str, Array]:
    """Estimate the figures of `SPEEDS` for many shapes, in seconds, (n,) each, by a fit through all measured shapes.

    Time is a sum of five terms, each with a coefficient that is not negative: a constant, one for every layer, one for
    every multiplication with a weight of a layer, one for every multiplication between tokens of the context, and one
    for the embeddings, which a prefill multiplies with the last token alone.

    Raises:
        UserError: fewer than two shapes have been measured.
    """
    rows = read_jsonl(speeds.path)
    if len(rows) < 2:
        raise UserError("the speed of too few shapes has been measured to estimate others")
    archs = [speeds.source.arch.resized(**row["sizes"]) for row in rows]
    active = np.array([arch.num_active_parameters for arch in archs])
    measured_terms = _terms(Shapes.of(speeds.source.arch, archs, {"num_active_parameters": active}))
    terms = _terms(shapes)
    return {name: terms @ fitted(measured_terms, np.array([row[name] for row in rows])) for name in SPEEDS}


def _terms(shapes: Shapes) -> Array:
    """Return the terms of the time that shapes take, (n, 5)."""
    teacher = shapes.teacher
    size: dict[str, Any] = {**teacher.sizes, **shapes.sizes}
    layers = np.asarray(size["num_hidden_layers"], dtype=float)
    heads = np.asarray(size.get("num_attention_heads", 0), dtype=float) * size.get("head_dim", 0)
    embeddings = np.asarray(teacher.count_grid(size) - teacher.count_grid(size, without="vocab"), dtype=float)
    active = np.asarray(shapes.figures["num_active_parameters"], dtype=float) - embeddings
    terms = np.broadcast_arrays(np.ones(len(shapes)), layers, active, layers * heads, embeddings)
    return np.stack(terms, axis=1)


def fitted(terms: Array, seconds: Array) -> Array:
    """Fit coefficients that are not negative to terms (n, k) and seconds (n,) by least squares of relative errors.

    Terms whose coefficient would be negative are left out, the most negative first. Returns the coefficients, (k,).
    """
    used = list(range(terms.shape[1]))
    while True:
        scale = terms[:, used].max(axis=0)
        solution, *_ = np.linalg.lstsq(terms[:, used] / scale / seconds[:, None], np.ones(len(seconds)), rcond=None)
        if (solution >= 0).all() or len(used) == 1:
            coefficients = np.zeros(terms.shape[1])
            coefficients[used] = np.maximum(solution, 0) / scale
            return coefficients
        used.pop(int(solution.argmin()))
