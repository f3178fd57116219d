"""The inputs of one search, and the files from which a killed search continues."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

from minitron.data.blocks import Blocks
from minitron.distillation import stored_teacher
from minitron.distillation.teacher import Teacher, numbered
from minitron.distillation.trainer import batch_indices
from minitron.files import read_json, write_json, write_jsonl
from minitron.model.arch import Arch
from minitron.nas.acceptance import Acceptance
from minitron.nas.budget import Budget
from minitron.nas.candidates import Candidate, read_candidates
from minitron.nas.effort import Effort, why_not_continued
from minitron.nas.speed import Speeds
from minitron.progress import announce
from minitron.pruning.scores import Importance
from minitron.recipe import DistillRecipe
from minitron.runtime import World
from minitron.session import Session

TRIAL = "trial"
"""The folder, within that of a search, with the files of the chosen candidate's trial, if it had one."""


@dataclass
class Workspace:
    """The inputs of one search, its folder, and what the steps of the search share.

    `folder` receives `candidates.jsonl` and `search.json`. Everything else lies in `folder/search` until the end.
    """

    session: Session
    importance: Importance
    folder: Path
    effort: Effort

    def __post_init__(self) -> None:
        self.work = self.folder / "search"
        if self.world.is_main:
            self.work.mkdir(parents=True, exist_ok=True)
        self.world.barrier()

    @property
    def world(self) -> World:
        """The processes among which candidates are split."""
        return self.session.runtime.world

    @property
    def has_candidates(self) -> bool:
        """Whether an earlier attempt has written candidates; all ranks agree."""
        return self.world.agree((self.folder / "candidates.jsonl").exists())

    def read_candidates(self) -> list[Candidate]:
        """Read `candidates.jsonl`, once the main process has written it."""
        self.world.barrier()
        return read_candidates(self.folder / "candidates.jsonl", self.session.source.arch)

    def save(self, candidates: list[Candidate]) -> None:
        """Let the main process write `candidates.jsonl`."""
        if self.world.is_main:
            write_jsonl(self.folder / "candidates.jsonl", [candidate.to_dict() for candidate in candidates])

    @property
    def probe_losses(self) -> dict[str, float]:
        """The losses of the probes measured so far, by axis."""
        path = self.work / "probes.json"
        return dict(read_json(path)) if path.exists() else {}

    def save_probe_losses(self, losses: dict[str, float]) -> None:
        """Let the main process write the losses of the probes."""
        if self.world.is_main:
            write_json(self.work / "probes.json", losses)

    @cached_property
    def acceptance(self) -> Acceptance:
        """Which shapes transformers accepts."""
        return Acceptance(self.session.source)

    @cached_property
    def speeds(self) -> Speeds:
        """The speeds of shapes on this device."""
        return Speeds.of(self.session, self.work)

    @property
    def step_tokens(self) -> int:
        """The tokens of a step of a trial, which is one of the distillation."""
        return self.session.recipe.distill.batch_size * self.session.context

    def trial_folder(self, number: int) -> Path:
        """Return the folder of a candidate's trial."""
        return self.work / f"candidate-{number:03}"

    @cached_property
    def train_outputs(self) -> Teacher:
        """The teacher's outputs on training blocks: on all where the recipe stores them, else on those that are read.

        These are the first blocks of the distillation, in whose order trials and probes read.
        """
        recipe, train = self.session.recipe.distill, self.session.splits.train
        if recipe.teacher_states is not None:
            return self._teacher_outputs(Path(recipe.teacher_states), train, recipe)
        most = max(self.effort.trial_steps * recipe.batch_size, self.effort.probe_tokens // self.session.context)
        numbers = batch_indices(0, most, len(train), self.session.runtime.seed).unique()
        return numbered(
            self._teacher_outputs(self.work / "train", train[numbers], _with_hidden_states(recipe)), numbers
        )

    @property
    def heldout(self) -> Blocks:
        """The held-out blocks on which trials are compared; without trials, those for untrained shapes."""
        return self.session.splits.heldout if self.effort.trial_steps else self.zero_shot_blocks

    @cached_property
    def heldout_outputs(self) -> Teacher:
        """The teacher's outputs on the held-out blocks."""
        recipe = _with_hidden_states(self.session.recipe.distill)
        return self._teacher_outputs(self.work / "heldout", self.heldout, recipe)

    def _teacher_outputs(self, folder: Path, blocks: Blocks, recipe: DistillRecipe) -> Teacher:
        with self.timed("teacher"):
            return stored_teacher(self.session, folder, blocks, recipe)

    @property
    def zero_shot_blocks(self) -> Blocks:
        """The held-out blocks on which probes and untrained candidates are compared."""
        return self.session.splits.heldout[: self.effort.zero_shot_tokens // self.session.context]

    @property
    def seconds(self) -> dict[str, float]:
        """The seconds that each part of the search has taken so far, earlier attempts included."""
        path = self.work / "seconds.json"
        return dict(read_json(path)) if path.exists() else {}

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the time that the block takes to a part of the search, also when the block fails."""
        started = time.monotonic()
        try:
            yield
        finally:
            if self.world.is_main and self.work.exists():
                total = round(self.seconds.get(part, 0.0) + time.monotonic() - started, 2)
                write_json(self.work / "seconds.json", self.seconds | {part: total})

    def finish(self, candidates: list[Candidate], chosen: Candidate, budget: Budget, num_shapes: int) -> None:
        """Mark the chosen candidate, keep its trial, write `search.json`, and remove the working files.

        `num_shapes` is the number of shapes within the budget.
        """
        if self.world.is_main:
            for candidate in candidates:
                candidate.chosen = candidate is chosen
            self.save(candidates)
            self._keep_trial(chosen)
            write_json(self.folder / "search.json", self._summary(candidates, budget, num_shapes))
        self.world.barrier()
        if self.world.is_main:
            shutil.rmtree(self.work, ignore_errors=True)

    def _keep_trial(self, chosen: Candidate) -> None:
        """Move the chosen candidate's trial to `TRIAL`, without the state of a training that cannot be continued."""
        trial = self.trial_folder(chosen.number)
        if not trial.exists():
            return
        if reason := why_not_continued(self.session.recipe.distill):
            announce(f"the distillation does not continue the trial of the chosen shape: {reason}")
            shutil.rmtree(trial / "checkpoint", ignore_errors=True)
            (trial / "metrics.jsonl").unlink(missing_ok=True)
        trial.rename(self.folder / TRIAL)

    def _summary(self, candidates: list[Candidate], budget: Budget, num_shapes: int) -> dict[str, object]:
        """Return what `search.json` holds: the budget, how much was computed for the answer, and how long it took."""
        session = self.session
        trials = [max(candidate.distilled_kl) for candidate in candidates if candidate.distilled_kl]
        longest, num_heldout = max(trials, default=0), self.heldout.num_tokens
        num_compared = sum(candidate.zero_shot_kl is not None for candidate in candidates)
        return {
            "limits": {name: {"low": limit.low, "high": limit.high} for name, limit in budget.limits.items()},
            "memory_of": asdict(budget.serving),
            "speed_of": {**asdict(self.speeds.serving), **self.speeds.conditions},
            "teacher_speed": self.speeds.of_teacher,
            "probes": self.probe_losses,
            "engine": session.recipe.search.engine,
            "tensor_parallel": session.recipe.search.tensor_parallel,
            "feasible": num_shapes,
            "compared": {"shapes": num_compared, "tokens_each": self.zero_shot_blocks.num_tokens},
            "distilled": {"shapes": len(trials), "tokens": sum(trials), "tokens_each": longest},
            "effort": self.effort.to_dict(),
            "heldout_tokens": num_heldout,
            "context": session.context,
            "seed": session.recipe.seed,
            "seconds": self.seconds,
        }


def chosen_before(folder: Path, teacher: Arch) -> Arch | None:
    """Return the shape that a finished search in `folder` has chosen, or None."""
    if not (folder / "search.json").exists():  # written last
        return None
    return next(
        candidate.arch for candidate in read_candidates(folder / "candidates.jsonl", teacher) if candidate.chosen
    )


def _with_hidden_states(recipe: DistillRecipe) -> DistillRecipe:
    return recipe.model_copy(update={"stored": "hidden"})
