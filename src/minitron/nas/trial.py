"""A short list of candidates, each pruned, mended and distilled for a while; poor ones stop early."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from minitron.data.blocks import Blocks
from minitron.distillation.teacher import Teacher
from minitron.distillation.trainer import num_steps_of, trained
from minitron.model.arch import Arch
from minitron.model.checkpoint import open_checkpoint
from minitron.nas.zero_shot import divergence
from minitron.pruning import prune
from minitron.pruning.importance import Importance
from minitron.pruning.repair import widest_input
from minitron.recipe import CorrectionRecipe, DistillRecipe, IntermediateRecipe, Recipe
from minitron.runtime import World
from minitron.session import Session

Row = dict[str, Any]
REPAIR_TOKENS = 16_384
"""Calibration tokens on which candidates are mended, if that is enough for their tensors of most session.

On a quarter of them, a shape that keeps hidden whole, whose matrices are refitted, came out of its trial 4 to 6 %
worse; one that cuts hidden is not refitted and loses nothing (docs/studies/search.md).
"""
REPAIR_TOKENS_PER_INPUT = 2
TIE = 0.01
"""Candidates whose losses differ by no more than this share are as good as each other: held-out text tells no more."""


def rungs(recipe: Recipe, context: int) -> list[int]:
    """The tokens after which candidates are compared: with halving, a quarter, a half and all of them."""
    given = trial_recipe(recipe)
    last, step_tokens = num_steps_of(given, context), given.batch_size * context
    shares = (4, 2, 1) if recipe.search.halving else (1,)
    return sorted({max(1, last // share) * step_tokens for share in shares})


def trial_recipe(recipe: Recipe) -> DistillRecipe:
    """How candidates are distilled: as the student will be, on fewer tokens, with logits alone.

    The rate stays at its peak for the first half, within which those who stop early are compared with those who go on,
    and comes down over the second (`wsd`, see `distillation.optimizers.learning_rate`): near the peak all differ less.
    """
    changed: dict[str, Any] = {
        "tokens": recipe.search.distill_tokens, "batch_size": recipe.search.batch_size, "micro_batch_size": 1,
        "schedule": "wsd", "decay_ratio": 0.5, "trackers": (), "intermediate": IntermediateRecipe(),
        "correction": CorrectionRecipe(),
    }  # fmt: skip
    if recipe.distill.teacher_states is None:
        changed["stored"] = "hidden"
    return recipe.distill.model_copy(update=changed)


@dataclass(frozen=True)
class Trial:
    """Trains candidates on the same blocks in the same order, one at a time in this process."""

    session: Session
    importance: Importance
    train: Blocks
    word: Teacher
    of_heldout: Teacher
    folder: Path

    def __call__(self, name: str, arch: Arch, tokens: int, label: str) -> float:
        """The held-out KL of a candidate after so many tokens; it goes on from where it stands on disk."""
        session, recipe, folder = self.session, trial_recipe(self.session.recipe), self.folder / name
        if not (folder / "pruned").exists():
            prune(session, arch, self.importance, folder / "pruned", blocks=self._repair_blocks(arch))
        student, _ = trained(
            self.word, open_checkpoint(folder / "pruned"), self.train, None, recipe, folder,
            session.recipe.seed, session.runtime.device, session.runtime.dtype, World(),
            until=max(1, tokens // (recipe.batch_size * session.context)), stage=label,
        )  # fmt: skip
        return divergence(student, session.splits.heldout, self.of_heldout)

    def _repair_blocks(self, arch: Arch) -> Blocks:
        """The first calibration blocks: on many more, repairs would take longer than the training."""
        tokens = max(REPAIR_TOKENS, REPAIR_TOKENS_PER_INPUT * widest_input(self.session.source.arch, arch))
        return self.session.calibration_blocks[: -(-tokens // self.session.context)]

    def forget(self, name: str) -> None:
        """Remove a candidate's files."""
        shutil.rmtree(self.folder / name, ignore_errors=True)


def compete(
    rows: list[Row], numbers: list[int], archs: list[Arch], trial: Trial, world: World, save: Callable[[], None]
) -> list[int]:
    """Distil the candidates of these numbers from rung to rung; return those that came to the last one.

    What a row says of a rung in `distilled_kl`, by tokens, is not done again; `save` is called whenever it says more.
    Ranks take candidates in turn.
    """
    heights = rungs(trial.session.recipe, trial.session.context)
    for rung, tokens in enumerate(heights):
        missing = [number for number in numbers if str(tokens) not in rows[number]["distilled_kl"]]
        for found in world.map_in_rounds(partial(_distil, numbers, archs, trial, tokens), missing):
            for number, kl in found:
                rows[number]["distilled_kl"][str(tokens)] = kl
            if world.is_main:
                save()
        if rung + 1 < len(heights):
            going_on = better_half({number: rows[number]["distilled_kl"][str(tokens)] for number in numbers})
            if world.is_main:
                for number in set(numbers) - going_on:
                    trial.forget(_name(number))
            world.barrier()
            numbers = [number for number in numbers if number in going_on]
    return numbers


def better_half(losses: Mapping[int, float]) -> set[int]:
    """Of candidates, by number, the half with less loss, and those as good as the last of it."""
    last = sorted(losses.values())[(len(losses) - 1) // 2]
    return {number for number, loss in losses.items() if loss <= last * (1 + TIE)}


def _distil(numbers: list[int], archs: list[Arch], trial: Trial, tokens: int, number: int) -> float:
    label = f"candidate {numbers.index(number) + 1} of {len(numbers)}"
    return trial(_name(number), archs[number], tokens, label)


def _name(number: int) -> str:
    return f"candidate-{number:03}"
