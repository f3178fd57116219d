"""Trials: candidates of a short list are pruned, repaired and distilled for a while, and poor ones stop early."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from minitron.data.blocks import Blocks
from minitron.distillation.trainer import Trainer
from minitron.model.arch import Arch
from minitron.model.checkpoint import open_checkpoint
from minitron.nas.candidates import Candidate
from minitron.nas.standings import standings
from minitron.nas.workspace import Workspace
from minitron.nas.zero_shot import divergence
from minitron.progress import beside
from minitron.pruning import prune
from minitron.pruning.repair import widest_input
from minitron.recipe import CorrectionRecipe, DistillRecipe, IntermediateRecipe, Recipe
from minitron.runtime import World

REPAIR_TOKENS = 16_384
"""Calibration tokens on which candidates are repaired, or more where their tensors have many inputs.

On a quarter of them, a shape that keeps hidden whole, whose matrices are refitted, came out of its trial 4 to 6 %
worse; one that cuts hidden is not refitted and loses nothing (docs/studies/search.md).
"""
REPAIR_TOKENS_PER_INPUT = 2
TIE = 0.01
"""Losses that differ by no more than this share are a tie: held-out text does not tell their candidates apart."""
RUNGS = (4, 2, 1)
"""Candidates are compared after a quarter, a half and all of the tokens; the better half continues."""


class Trial:
    """Trains candidates on equal blocks in equal order, one at a time in this process."""

    def __init__(self, workspace: Workspace) -> None:
        self.session, self.importance, self.folder = workspace.session, workspace.importance, workspace.work
        self.train, self.train_outputs = workspace.train, workspace.train_outputs
        self.heldout_outputs = workspace.heldout_outputs

    def __call__(self, name: str, arch: Arch, tokens: int, label: str) -> float:
        """Return the held-out KL of a shape after `tokens` tokens of distillation.

        The training continues from the files of `name`; `label` names the trial in the progress line.
        """
        session, recipe, folder = self.session, trial_recipe(self.session.recipe), self.folder / name
        if not (folder / "pruned").exists():
            prune(session, arch, self.importance, folder / "pruned", blocks=self._repair_blocks(arch))
        # Each trial runs in one process, whatever the number of ranks that share the short list.
        runtime = replace(session.runtime, world=World())
        trainer = Trainer(self.train_outputs, recipe, self.train, runtime, folder, stage=label)
        num_steps = max(1, tokens // (recipe.batch_size * session.context))
        student = trainer.trained(open_checkpoint(folder / "pruned"), until=num_steps)
        return divergence(student.headless, session.splits.heldout, self.heldout_outputs)

    def _repair_blocks(self, arch: Arch) -> Blocks:
        """Return the first calibration blocks: on many more, repairs would take longer than the training."""
        tokens = max(REPAIR_TOKENS, REPAIR_TOKENS_PER_INPUT * widest_input(self.session.source.arch, arch))
        return self.session.calibration_blocks[: -(-tokens // self.session.context)]

    def remove(self, name: str) -> None:
        """Remove the files of a trial."""
        shutil.rmtree(self.folder / name, ignore_errors=True)


def trial_recipe(recipe: Recipe) -> DistillRecipe:
    """Return how candidates are distilled: as the student will be, on fewer tokens, with logits alone, not rounded.

    The learning rate stays at its peak for the first half of the tokens, within which candidates are dropped, and falls
    over the second half (`wsd`, see `distillation.optimizers.learning_rate`): near the peak all candidates differ less.
    """
    changes: dict[str, Any] = {
        "tokens": recipe.search.distill_tokens,
        "batch_size": recipe.search.batch_size,
        "micro_batch_size": 1,
        "schedule": "wsd",
        "decay_ratio": 0.5,
        "trackers": (),
        "warmup_steps": None,  # a number of the long training's steps
        "intermediate": IntermediateRecipe(of=()),
        "correction": CorrectionRecipe(),
        "quantize": None,
    }
    if recipe.distill.teacher_states is None:
        changes["stored"] = "hidden"
    return recipe.distill.model_copy(update=changes)


def rungs(recipe: Recipe, context: int) -> list[int]:
    """Return the tokens after which candidates are compared: a quarter, a half and all of them, in whole steps."""
    distillation = trial_recipe(recipe)
    num_steps, step_tokens = distillation.num_steps(context), distillation.batch_size * context
    return sorted({max(1, num_steps // share) * step_tokens for share in RUNGS})


def compete(workspace: Workspace, candidates: list[Candidate], short_list: list[Candidate]) -> list[Candidate]:
    """Distil the short list from rung to rung and return the candidates that reach the last one.

    Losses that a candidate already has in `distilled_kl` are not measured again; `candidates`, which the short list is
    part of, are written after every round. Candidates are split among ranks. Without tokens to distil on, or with a
    single candidate, the short list is returned as it is.
    """
    session, world = workspace.session, workspace.world
    if not session.recipe.search.distill_tokens or len(short_list) == 1:
        return short_list
    trial, remaining, heights = Trial(workspace), short_list, rungs(session.recipe, session.context)
    with beside(lambda: standings(short_list)), workspace.timed("distill"):
        for tokens in heights:
            _distil(workspace, trial, candidates, [candidate.number for candidate in remaining], tokens)
            if tokens == heights[-1]:
                break
            better = better_half({candidate.number: candidate.distilled_kl[tokens] for candidate in remaining})
            if world.is_main:
                for candidate in remaining:
                    if candidate.number not in better:
                        trial.remove(_name(candidate.number))
            world.barrier()
            remaining = [candidate for candidate in remaining if candidate.number in better]
    return remaining


def _distil(workspace: Workspace, trial: Trial, candidates: list[Candidate], numbers: list[int], tokens: int) -> None:
    """Bring the candidates of some numbers to a rung, those that were there before left out."""
    missing = [number for number in numbers if tokens not in candidates[number].distilled_kl]

    def measure(number: int) -> float:
        label = f"candidate {numbers.index(number) + 1} of {len(numbers)}"
        return trial(_name(number), candidates[number].arch, tokens, label)

    for results in workspace.world.map_in_rounds(measure, missing):
        for number, kl in results:
            candidates[number].distilled_kl[tokens] = kl
        workspace.save(candidates)


def _name(number: int) -> str:
    return f"candidate-{number:03}"


def better_half(losses: Mapping[int, float]) -> set[int]:
    """Return the half of the candidates with the lower losses, by number, and those that tie with the last of it."""
    last = sorted(losses.values())[(len(losses) - 1) // 2]
    return {number for number, loss in losses.items() if loss <= last * (1 + TIE)}


def choose(candidates: list[Candidate]) -> Candidate:
    """Return the candidate of least loss; among those that tie with it, the one with the fastest prefill."""
    least = min(candidate.loss for candidate in candidates)
    tied = [candidate for candidate in candidates if candidate.loss <= least * (1 + TIE)]
    return min(tied, key=lambda candidate: (candidate.prefill_seconds or 0.0, candidate.loss))
