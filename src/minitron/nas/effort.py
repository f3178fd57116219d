"""How much a search does: what `search.effort` pays for, counted in operations before anything is computed.

What the operations do not pay for is left out, level by level of `LEVELS`: long trials and untrained shapes first, then
training of the probes, then trials, as docs/studies/search.md has found them to matter.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from minitron.model.arch import Arch
from minitron.model.work import BACKWARD, Work, forward_flops, step_work
from minitron.nas.shapes import Shapes
from minitron.pruning.repair import RESCALE_TOKENS, rescales
from minitron.recipe import DistillRecipe, PruneRecipe, Recipe

LONGEST_TRIAL, MOST_STEPS = 32_768, 16
"""The most tokens of a trial, and the steps that it may take where these are more tokens."""
LEAST_STEPS = 8
"""The fewest steps of a trial: fewer tell shapes apart no better than probes do."""
UNTRAINED_TOKENS = 1_024
"""Held-out tokens on which untrained shapes and probes are compared, unless the recipe says otherwise."""
REFIT_PASSES = 3.5
"""Operations of a refit over those of a forward pass of the student: two and a half passes, and the moments."""


class Level(NamedTuple):
    """What one level of effort does."""

    finalists: int
    trial: float
    """The length of a trial, as a share of the longest."""
    untrained: int
    probe_blocks: int


LEVELS = (
    Level(8, 1, 256, 4), Level(8, 1 / 2, 256, 4), Level(8, 1 / 2, 128, 4), Level(6, 1 / 2, 64, 4),
    Level(4, 1 / 2, 64, 4), Level(4, 1 / 4, 32, 4), Level(4, 1 / 4, 16, 4), Level(3, 1 / 4, 16, 4),
    Level(2, 1 / 4, 16, 4), Level(2, 1 / 8, 16, 2), Level(2, 1 / 8, 16, 0), Level(2, 1 / 8, 8, 0), Level(1, 0, 8, 0),
    Level(1, 0, 1, 0),
)  # fmt: skip
"""From the most that helps (docs/studies/search.md) to the least."""

Part = Literal["teacher", "probes", "untrained", "trials"]


@dataclass(frozen=True)
class Effort:
    """How much a search does; numbers of tokens are whole blocks."""

    probe_tokens: int
    zero_shot: int
    zero_shot_tokens: int
    shortlist: int
    trial_steps: int
    """Steps of the longest trials; 0: there are no trials."""
    tokens: Mapping[Part, int]
    """Tokens on which each part trains or compares, those of all shapes together."""
    flops: Mapping[Part, float]
    """Operations of each part."""
    kept: float
    """Those among them that are the beginning of the distillation: of the chosen trial."""
    distillation: float
    """Operations of the distillation that follows."""

    @property
    def added(self) -> float:
        """The operations that the search adds to those of the distillation, as a share of them."""
        return (sum(self.flops.values()) - self.kept) / self.distillation

    @property
    def compares_untrained(self) -> bool:
        """Whether untrained shapes are compared: whether there are more of them than places on the short list."""
        return self.zero_shot > self.shortlist

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of `search.json`."""
        return {**asdict(self), "added": self.added}

    def in_words(self, step_tokens: int) -> str:
        """Return what a search does and what it leaves out, as part of a sentence."""
        parts = {
            "trials": self.trial_steps
            and f"{self.shortlist} trials of up to {self.trial_steps * step_tokens:,} tokens",
            "comparisons of untrained shapes": self.compares_untrained and f"{self.zero_shot} untrained shapes",
            "training of probes": self.probe_tokens and f"probes of {self.probe_tokens:,} tokens",
        }
        done = ", ".join(words for words in parts.values() if words) or "untrained probes"
        left_out = " and ".join(name for name, words in parts.items() if not words)
        return f"{done}; left out: {left_out}" if left_out else done


@dataclass(frozen=True)
class Costs:
    """What each level costs in one search, of a recipe, the model that teaches, shapes, and a probe of each axis."""

    recipe: Recipe
    teacher: Arch
    shapes: Shapes
    probes: Mapping[str, Arch]
    context: int
    windows: list[int]

    def affordable(self) -> Effort:
        """Return the highest level of effort that adds no more than `search.effort` to the distillation, or the lowest.

        Numbers that the recipe gives are kept at every level.
        """
        levels = (self.at(level) for level in LEVELS)
        return next((effort for effort in levels if effort.added <= self.recipe.search.effort), self.at(LEVELS[-1]))

    def at(self, level: Level) -> Effort:
        """Return the effort of a level, with the numbers that the recipe gives in the place of its own."""
        given, num_shapes = self.recipe.search, len(self.shapes)
        finalists = level.finalists if given.distill_tokens is None else max(2, level.finalists)
        finalists = min(given.shortlist or finalists, num_shapes)
        untrained = min(given.zero_shot or max(level.untrained, finalists), num_shapes)
        finalists = min(finalists, untrained)
        compared = untrained if untrained > finalists else 0  # see `Effort.compares_untrained`
        steps = self._trial_steps(level) if finalists > 1 else 0
        zero_shot_tokens = self._whole(given.zero_shot_tokens or UNTRAINED_TOKENS)
        probe_tokens = level.probe_blocks * self.context
        if given.probe_tokens is not None:
            probe_tokens = self._whole(given.probe_tokens) if given.probe_tokens else 0
        of_teacher, repairs = self._teacher_tokens(steps, probe_tokens, zero_shot_tokens), finalists - 1 if steps else 0
        steps_of_all, comparisons = totals(finalists, steps)
        trained, measured = self._step.total - self._step.teacher, self._heldout_tokens * self._forward
        tokens: dict[Part, int] = {
            "teacher": of_teacher,
            "probes": len(self._probed(probe_tokens)) * (probe_tokens or zero_shot_tokens),
            "untrained": compared * zero_shot_tokens,
            "trials": steps_of_all * self.recipe.distill.batch_size * self.context,
        }
        flops: dict[Part, float] = {
            "teacher": of_teacher * self._teacher_forward,
            "probes": self._probe_flops(probe_tokens, zero_shot_tokens),
            "untrained": compared * zero_shot_tokens * self._forward + self._sorted_flops(compared),
            # The repair of one finalist is that of the student, which is made anyway.
            "trials": steps_of_all * trained + comparisons * measured + repairs * self.repair_flops,
        }
        kept = 0.0 if why_not_continued(self.recipe.distill) else steps * self._step.total
        return Effort(
            probe_tokens, untrained, zero_shot_tokens, finalists, steps, tokens, flops, kept,
            self.distillation,
        )  # fmt: skip

    @property
    def distillation(self) -> float:
        """Operations of the distillation."""
        return self._step.total * self.recipe.distill.num_steps(self.context)

    def _trial_steps(self, level: Level) -> int:
        recipe, given = self.recipe.distill, self.recipe.search.distill_tokens
        if given is None:
            longest = max(MOST_STEPS, LONGEST_TRIAL // (recipe.batch_size * self.context))
            wanted = max(LEAST_STEPS, round(longest * level.trial))
        elif given == 0:
            return 0
        else:
            wanted = max(1, given // (recipe.batch_size * self.context))
        # The distillation continues the trial, so one step is left for it.
        return max(1, min(wanted, recipe.num_steps(self.context) - 1))

    def _whole(self, tokens: int) -> int:
        return max(1, tokens // self.context) * self.context

    @cached_property
    def _largest(self) -> Arch:
        return self.shapes[int(np.argmax(self.shapes.figures["num_parameters"]))]

    @cached_property
    def _step(self) -> Work:
        return step_work(self._largest, self.teacher, self.recipe.distill, self.context, self.windows)

    @cached_property
    def _forward(self) -> float:
        return self._flops(self._largest)

    @cached_property
    def _teacher_forward(self) -> float:
        return self._flops(self.teacher)

    def _flops(self, arch: Arch) -> float:
        """Operations of a forward pass, per token."""
        return forward_flops(arch, self.context, self.windows)

    @property
    def _heldout_tokens(self) -> int:
        return self._whole(self.recipe.heldout_tokens)

    def _teacher_tokens(self, steps: int, probe_tokens: int, zero_shot_tokens: int) -> int:
        """Held-out tokens that the teacher reads, and those that trials and probes read unless they are stored."""
        tokens = self._heldout_tokens if steps else zero_shot_tokens
        if self.recipe.distill.teacher_states is None:
            tokens += max(steps * self.recipe.distill.batch_size * self.context, probe_tokens)
        return tokens

    def _probe_flops(self, tokens: int, measured: int) -> float:
        passes, recipe, total = (1 + BACKWARD) * tokens + measured, probe_recipe(self.recipe.prune), 0.0
        for arch in self._probed(tokens):
            total += passes * self._flops(arch)
            if rescales(self.shapes.teacher, arch, recipe):
                total += RESCALE_TOKENS * self._teacher_forward
        return total

    def _probed(self, tokens: int) -> list[Arch]:
        """Return the probes, with the whole teacher where they are trained."""
        return [*([self.teacher] if tokens else []), *self.probes.values()]

    def _sorted_flops(self, untrained: int) -> float:
        """Operations of rescaling the norms of sorted teachers, one for each narrower hidden size that may occur."""
        whole = self.shapes.teacher
        sizes = np.unique(self.shapes.sizes.get("hidden_size", np.array([whole.axis_size("hidden")])))
        narrower = int((sizes < whole.axis_size("hidden")).sum()) if self.recipe.prune.rescale_norms else 0
        return min(untrained, narrower) * RESCALE_TOKENS * self._teacher_forward

    @property
    def repair_flops(self) -> float:
        """Operations of the repair of a finalist: a refit, or norms that are rescaled where some shape is narrower."""
        recipe, tokens, total = self.recipe.prune, self.recipe.calibration.tokens, 0.0
        narrowest = int(np.argmin(self.shapes.sizes.get("hidden_size", np.zeros(len(self.shapes)))))
        if recipe.refit:
            total = tokens * (self._teacher_forward + REFIT_PASSES * self._forward)
        elif rescales(self.shapes.teacher, self.shapes[narrowest], recipe):
            total = min(tokens, RESCALE_TOKENS) * self._teacher_forward
        return total + (recipe.rounds - 1) * tokens * self._forward


def probe_recipe(recipe: PruneRecipe) -> PruneRecipe:
    """Return how probes are cut: as students are, in one round and without the refit.

    A refit takes longer than the training of a probe, and distorts how cuts of different axes compare.
    """
    return recipe.model_copy(update={"rounds": 1, "refit": False})


def rungs(finalists: int, steps: int) -> list[tuple[int, int]]:
    """Return the steps after which finalists are compared, and how many there are at most until then.

    The better half continues, and one that ties with it. The last comparison is between two, or three, after all steps;
    each one before it after half of the steps of the next.
    """
    num_rungs = max(1, (finalists - 1).bit_length())
    heights: dict[int, int] = {}
    most = finalists
    for share in reversed(range(num_rungs)):
        height = max(1, steps >> share)
        heights.setdefault(height, most)
        most = min(most, -(-most // 2) + 1)
    return list(heights.items())


def totals(finalists: int, steps: int) -> tuple[int, int]:
    """Return the most steps that all trials take together, and how often a candidate is measured; see `rungs`."""
    total = comparisons = before = 0
    for height, most in rungs(finalists, steps) if steps else ():
        total, comparisons, before = total + most * (height - before), comparisons + most, height
    return total, comparisons


def why_not_continued(recipe: DistillRecipe) -> str | None:
    """Return why a distillation cannot begin with a trial, which trains the student alone and does not round, or None.

    Losses within the layers, which a trial leaves out, are added from then on.
    """
    if recipe.quantize is not None:
        return f"distill.quantize {recipe.quantize} rounds the student's matrices"
    if recipe.correction.trains != "nothing":
        return "the teacher learns while it teaches"
    return None
