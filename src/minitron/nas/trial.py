"""Trials: the distillation of each candidate of a short list begins, and poor ones stop early."""

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from minitron.distillation.trainer import Trainer
from minitron.history import HISTORY, record_step
from minitron.model.arch import Arch
from minitron.model.checkpoint import open_checkpoint
from minitron.model.language_model import Headless
from minitron.nas.candidates import Candidate
from minitron.nas.effort import rungs
from minitron.nas.standings import standings
from minitron.nas.workspace import Workspace
from minitron.nas.zero_shot import divergence
from minitron.progress import beside
from minitron.pruning import how_measured, prune
from minitron.recipe import CorrectionRecipe, DistillRecipe, IntermediateRecipe, OnPolicyRecipe
from minitron.runtime import World

TIE = 0.01
"""Losses that differ by no more than this share are a tie: held-out text does not tell their candidates apart."""


class Trial:
    """Begins the distillation of candidates, one at a time in this process, on equal blocks in equal order."""

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace

    def __call__(self, number: int, arch: Arch, steps: int, label: str) -> float:
        """Return the held-out KL of a candidate after some steps; `label` names the trial in the progress line.

        The training continues from the files of the candidate of this number. Its pruned model is that of the student.
        """
        session, folder = self.workspace.session, self.workspace.trial_folder(number)
        if not (folder / "pruned" / HISTORY).exists():
            step = prune(session, arch, self.workspace.importance, folder / "pruned")
            record_step(folder / "pruned", session.source.folder, step | {"measured": how_measured(session)})
        recipe = trial_recipe(session.recipe.distill, self.workspace.effort.trial_steps, session.context)
        student = train(self.workspace, folder, recipe, until=steps, label=label)
        return divergence(student, self.workspace.heldout, self.workspace.heldout_outputs)


def train(workspace: Workspace, folder: Path, recipe: DistillRecipe, *, until: int | None, label: str) -> Headless:
    """Train the pruned model in `folder` up to a step, or for all steps of a recipe, and return it in memory.

    Whatever the number of ranks that share the candidates, each is trained in one process.
    """
    session = workspace.session
    runtime = replace(session.runtime, world=World())
    trainer = Trainer(workspace.train_outputs, recipe, session.splits.train, runtime, folder, stage=label)
    return trainer.trained(open_checkpoint(folder / "pruned"), until=until).headless


def trial_recipe(recipe: DistillRecipe, steps: int, context: int) -> DistillRecipe:
    """Return how candidates are trained: as the student will be, in fewer steps, with logits alone, not rounded.

    The learning rate stays at its peak for the first half of the steps, within which candidates are dropped, and falls
    over the second half (`wsd`, see `distillation.optimizers.learning_rate`): near the peak all candidates differ less.
    """
    changes: dict[str, Any] = {
        "tokens": steps * recipe.batch_size * context,
        "schedule": "wsd",
        "decay_ratio": 0.5,
        "trackers": (),
        "warmup_steps": None,  # a number of the long training's steps
        "intermediate": IntermediateRecipe(of=()),
        "correction": CorrectionRecipe(),
        "on_policy": OnPolicyRecipe(),
        "quantize": None,
    }
    if recipe.teacher_states is None:
        changes["stored"] = "hidden"
    return recipe.model_copy(update=changes)


def compete(workspace: Workspace, candidates: list[Candidate], short_list: list[Candidate]) -> list[Candidate]:
    """Distil the short list from rung to rung and return the candidates that reach the last one.

    Losses that a candidate already has in `distilled_kl` are not measured again; `candidates`, which the short list is
    part of, are written after every round. Candidates are split among ranks. Without trials, or with a single
    candidate, the short list is returned as it is.
    """
    world, steps = workspace.world, workspace.effort.trial_steps
    if not steps or len(short_list) == 1:
        return short_list
    remaining = short_list
    with beside(lambda: standings(short_list)), workspace.timed("trials"):
        for height, _ in rungs(len(short_list), steps):
            tokens = height * workspace.step_tokens
            _distil(workspace, candidates, [candidate.number for candidate in remaining], height)
            if height == steps:
                break
            better = better_half({candidate.number: candidate.distilled_kl[tokens] for candidate in remaining})
            if world.is_main:
                for candidate in remaining:
                    if candidate.number not in better:
                        shutil.rmtree(workspace.trial_folder(candidate.number), ignore_errors=True)
            world.barrier()
            remaining = [candidate for candidate in remaining if candidate.number in better]
    return remaining


def _distil(workspace: Workspace, candidates: list[Candidate], numbers: list[int], steps: int) -> None:
    """Bring the candidates of some numbers to a rung, those that were there before left out."""
    trial, tokens = Trial(workspace), steps * workspace.step_tokens
    missing = [number for number in numbers if tokens not in candidates[number].distilled_kl]

    def measure(number: int) -> float:
        label = f"candidate {numbers.index(number) + 1} of {len(numbers)}"
        return trial(number, candidates[number].arch, steps, label)

    for results in workspace.world.map_in_rounds(measure, missing):
        for number, kl in results:
            candidates[number].distilled_kl[tokens] = kl
        workspace.save(candidates)


def better_half(losses: Mapping[int, float]) -> set[int]:
    """Return the half of the candidates with the lower losses, by number, and the next one if it ties with the last."""
    best_first = sorted(losses, key=lambda number: (losses[number], number))
    half = (len(losses) + 1) // 2
    last = losses[best_first[half - 1]]
    return {
        *best_first[:half],
        *(number for number in best_first[half : half + 1] if losses[number] <= last * (1 + TIE)),
    }


def choose(candidates: list[Candidate]) -> Candidate:
    """Return the candidate of least loss; among those that tie with it, the one with the fastest prefill."""
    least = min(candidate.loss for candidate in candidates)
    tied = [candidate for candidate in candidates if candidate.loss <= least * (1 + TIE)]
    return min(tied, key=lambda candidate: (candidate.prefill_seconds or 0.0, candidate.loss))
