"""Architecture search: from a teacher and a budget to the best shape of a student."""

from pathlib import Path

from minitron.model.arch import Arch
from minitron.model.memory import attention_windows
from minitron.nas.budget import Budget, budget_of
from minitron.nas.effort import Costs
from minitron.nas.estimate import meet_speed_limits
from minitron.nas.offer import (
    check_shape,
    inside,
    ranked_shape,
    ranks_together,
    shapes_within,
    warn_of_engines,
    warn_of_order,
    with_ranked_layers,
)
from minitron.nas.probes import predict, probes
from minitron.nas.runnable import warn_of_engine
from minitron.nas.shapes import Shapes, removed_layers
from minitron.nas.shortlist import make_short_list
from minitron.nas.trial import choose, compete
from minitron.nas.vocabulary import settle_vocabulary
from minitron.nas.workspace import TRIAL, Workspace, chosen_before
from minitron.nas.zero_shot import compare_untrained
from minitron.progress import announce
from minitron.pruning.scores import Importance
from minitron.pruning.selection import kept_layers
from minitron.session import Session

__all__ = [
    "TRIAL",
    "budget_of",
    "check_shape",
    "costs_of",
    "inside",
    "ranked_shape",
    "ranks_together",
    "removed_layers",
    "search",
    "shapes_within",
    "warn_of_order",
]


def search(session: Session, importance: Importance, shapes: Shapes, budget: Budget, folder: Path) -> Arch:
    """Return the best of the shapes and write into `folder` why: `candidates.jsonl` and `search.json`.

    `TRIAL` in `folder` holds the files of the trial that the shape had, from which its distillation continues: `pruned`
    and, unless something stands against it (`effort.why_not_continued`), `checkpoint` and `metrics.jsonl`.

    Shapes are narrowed down by ever more expensive measures: speed estimated from a few shapes, the size of the
    vocabulary by what its cut costs the teacher, loss predicted from one probe per axis, loss of the untrained
    candidate, and loss after a while of distillation. `shapes` and `budget` are those of `shapes_within`. An
    interrupted search continues from `folder`, with nothing measured again. A shape that the recipe states is returned
    as it is, and no file is written.

    Raises:
        UserError: no shape meets the limits on speed.
    """
    if session.recipe.shape:
        return ranked_shape(session, importance, session.recipe.shape)
    if arch := chosen_before(folder, session.source.arch):
        return arch
    shapes = with_ranked_layers(session, importance, shapes, budget)
    effort = costs_of(session, shapes).affordable()
    does = effort.in_words(session.recipe.distill.batch_size * session.context)
    announce(f"search, for {effort.added:.0%} of the operations of the distillation: {does}")
    workspace = Workspace(session, importance, folder, effort)
    shapes, budget = meet_speed_limits(workspace, shapes, budget)
    workspace, shapes = settle_vocabulary(workspace, shapes)
    candidates = predict(workspace, shapes)
    compare_untrained(workspace, candidates)
    short_list = make_short_list(workspace, candidates, budget)
    finalists = compete(workspace, candidates, short_list)
    chosen = choose(finalists)
    workspace.finish(candidates, chosen, budget, len(shapes))
    if workspace.world.is_main:
        source, arch = workspace.session.source, chosen.arch
        kept = kept_layers(importance, source.arch, arch).tolist()
        warn_of_engines(source, arch, kept)
        warn_of_engine(source, arch, kept, session.recipe.search)
    return chosen.arch


def costs_of(session: Session, shapes: Shapes) -> Costs:
    """Return what a search among shapes costs, from which its effort follows; see `search.effort`."""
    windows = attention_windows(session.source.config.to_dict())
    return Costs(session.recipe, session.teacher.arch, shapes, probes(shapes), session.context, windows)
