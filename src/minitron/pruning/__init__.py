"""Pruning: scores every part of a model, selects what to keep, slices the tensors, repairs what is left, writes it."""

from pathlib import Path

from minitron.data.blocks import Blocks
from minitron.files import whole_folder
from minitron.history import Step
from minitron.model.arch import Arch
from minitron.pruning.cut import Cut, cut_to, write_pruned
from minitron.pruning.importance import (
    how_measured,
    measure_importance,
    read_how_measured,
    read_importance,
    require_measurable,
    require_scores,
    write_importance,
)
from minitron.pruning.nested import nested_cuts, require_nestable
from minitron.pruning.random_start import write_random
from minitron.pruning.record import pruning_step
from minitron.pruning.repair import repaired
from minitron.pruning.rounds import score_in_rounds
from minitron.pruning.scores import Importance
from minitron.pruning.selection import ranked_depth, select
from minitron.pruning.vocabulary import over_vocabulary
from minitron.recipe import PruneRecipe
from minitron.session import Session

__all__ = [
    "Importance",
    "how_measured",
    "measure_importance",
    "nested_cuts",
    "over_vocabulary",
    "prune",
    "ranked_depth",
    "read_how_measured",
    "read_importance",
    "require_measurable",
    "require_nestable",
    "require_scores",
    "write_cut",
    "write_importance",
    "write_random",
]


def prune(
    session: Session,
    arch: Arch,
    importance: Importance,
    out: Path,
    *,
    recipe: PruneRecipe | None = None,
    blocks: Blocks | None = None,
) -> Step:
    """Cut the session's model to a shape, repair it as the recipe says, and write a Hugging Face folder at `out`.

    `importance` scores the whole model (`measure_importance`); a recipe with several rounds scores the model again
    while it shrinks. `recipe` stands in for the session's, and repairs are fitted on `blocks`, by default the
    calibration blocks. Returns what was done, for the history of the model (`history.record_step`).

    Raises:
        UserError: the recipe asks for something that the family cannot have, or there are too few calibration tokens.
    """
    source, recipe = session.source, recipe or session.recipe.prune
    blocks = session.calibration_blocks if blocks is None else blocks
    importance = score_in_rounds(session, arch, importance, rounds=recipe.rounds, blocks=blocks, folder=out.parent)
    cut = cut_to(arch, source, importance, recipe, kept=select(importance, source.arch, arch))
    return write_cut(session, cut, out, recipe=recipe, blocks=blocks)


def write_cut(session: Session, cut: Cut, out: Path, *, recipe: PruneRecipe, blocks: Blocks) -> Step:
    """Repair a cut of the session's model and write a Hugging Face folder at `out`; see `prune`."""
    tensors = repaired(session.source, cut, blocks=blocks, recipe=recipe, runtime=session.runtime)
    with whole_folder(out) as staging:
        write_pruned(session.source, cut, tensors, staging)
    return pruning_step(session, cut)
