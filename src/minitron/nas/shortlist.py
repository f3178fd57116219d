"""Picks the short list: candidates of little loss that differ, meet the budget as measured, and cut different axes."""

import json
from collections.abc import Sequence

import numpy as np

from minitron.errors import UserError
from minitron.nas.budget import Budget
from minitron.nas.candidates import Candidate
from minitron.nas.shapes import Shapes
from minitron.nas.workspace import Workspace

SMALLEST_DIFFERENCE = 0.1
"""The share by which two short-listed shapes differ at least in the size of some axis."""


def make_short_list(workspace: Workspace, candidates: list[Candidate], budget: Budget) -> list[Candidate]:
    """Return the candidates that get a trial, the best first, and measure their speed.

    Most places are for the best candidate of some kind of cuts (`num_kinds`).

    Raises:
        UserError: no candidate meets the budget as measured.
    """
    size, archs = workspace.effort.shortlist, [candidate.arch for candidate in candidates]
    shapes = Shapes.of(workspace.session.source.arch, archs, {})
    order = _order(shapes, candidates, num_kinds(size))
    remaining, chosen = list(order), list[int]()
    with workspace.speeds:
        while remaining and len(chosen) < size:
            wanted = differing(shapes, [*chosen, *remaining], size)
            if not (new := [i for i in wanted if i not in chosen]):
                break
            for i in new:
                remaining.remove(i)
                _measure_speed(workspace, candidates[i])
                if budget.fits(candidates[i].figures):
                    chosen.append(i)
    workspace.save(candidates)
    workspace.world.barrier()
    if not chosen:
        raise UserError(_nearest_in_words(candidates, budget))
    return [candidates[i] for i in sorted(chosen, key=order.index)]


def num_kinds(places: int) -> int:
    """Return how many among the places for trials are for the best shape of some kind of cuts: three quarters, or one.

    Neither loss knows well what a cut of some axes costs compared with others (docs/studies/search.md), so the best
    shapes of several kinds come before second ones of a kind.
    """
    return max(1, places * 3 // 4)


def _order(shapes: Shapes, candidates: list[Candidate], num_kinds: int) -> list[int]:
    """Return the numbers of the candidates: the best of some kinds of cuts, then the others, the best first."""
    best_first = sorted(range(len(candidates)), key=lambda i: _expected(candidates[i]))
    kinds = first_of_each_kind(shapes, best_first)[:num_kinds]
    return list(dict.fromkeys([*kinds, *best_first]))


def _expected(candidate: Candidate) -> float:
    """Return what is expected of a candidate before its trial: the sum of the predicted and of the untrained loss.

    Each knows what the other does not: the prediction, what training makes up for; the untrained loss, how cuts of
    several axes add up (docs/studies/search.md).
    """
    return candidate.predicted_kl + (candidate.zero_shot_kl or 0.0)


def first_of_each_kind(shapes: Shapes, order: Sequence[int]) -> list[int]:
    """Return the first shape, in an order of numbers, of every kind of cuts: of every set of sizes that are cut."""
    cut = np.stack([sizes < shapes.teacher.sizes[name] for name, sizes in shapes.sizes.items()])  # (sizes, n)
    _, firsts = np.unique(cut[:, np.asarray(order)], axis=1, return_index=True)
    return [int(order[i]) for i in sorted(firsts)]


def differing(shapes: Shapes, best_first: Sequence[int], count: int) -> list[int]:
    """Return the first `count` numbers of an order, skipping shapes that are nearly equal to one taken already.

    Where too few shapes differ, the first that were skipped are taken as well.
    """
    logs = np.log(np.stack([np.asarray(sizes, dtype=float) for sizes in shapes.sizes.values()]))  # (axes, n)
    chosen: list[int] = []
    skipped: list[int] = []
    for i in best_first:
        if len(chosen) == count:
            break
        is_near = chosen and (np.abs(logs[:, chosen] - logs[:, [i]]).max(axis=0) < SMALLEST_DIFFERENCE).any()
        (skipped if is_near else chosen).append(int(i))
    taken = {*chosen, *skipped[: count - len(chosen)]}
    return [int(i) for i in best_first if int(i) in taken]


def _measure_speed(workspace: Workspace, candidate: Candidate) -> None:
    """Let the main process measure a candidate's speed; all ranks take its result."""
    speeds: dict[str, float] = {}
    if workspace.world.is_main:
        with workspace.timed("speed"):
            speeds = workspace.speeds.measure(candidate.arch)
    speeds = workspace.world.gather(speeds)[0]
    candidate.prefill_seconds, candidate.decode_seconds = speeds["prefill_seconds"], speeds["decode_seconds"]


def _nearest_in_words(candidates: list[Candidate], budget: Budget) -> str:
    measured = [candidate for candidate in candidates if candidate.prefill_seconds]
    nearest = min(measured, key=lambda candidate: float(budget.excess(candidate.figures)))
    figures = ", ".join(f"{name} {nearest.figures[name]:,.4g}" for name in budget.limits)
    return (
        f"no candidate meets the budget as measured; the nearest has {figures} ({json.dumps(nearest.arch.to_dict())})"
    )
