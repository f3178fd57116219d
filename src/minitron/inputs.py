"""What a recipe names, opened: teacher, text, candidates; each when first asked for."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron.data.blocks import Blocks, Splits, load_tokenizer, read_splits
from minitron.errors import UserError
from minitron.model.arch import Arch
from minitron.model.causal import load_model, resolve_device, resolve_dtype
from minitron.model.checkpoint import Checkpoint
from minitron.model.source import open_teacher
from minitron.prune.calibrate import calibrate
from minitron.prune.importance import Importance, score
from minitron.recipe import Recipe
from minitron.search.budget import parse_budget
from minitron.search.candidates import feasible
from minitron.search.rank import search

DEFAULT_CONTEXT = 1024


@dataclass(frozen=True)
class Inputs:
    """What a recipe names, each opened when first asked for."""

    recipe: Recipe

    @cached_property
    def teacher(self) -> Checkpoint:
        """The teacher on disk."""
        return open_teacher(self.recipe.teacher, self.recipe.family)

    @cached_property
    def device(self) -> torch.device:
        """Where models run."""
        return resolve_device(self.recipe.device)

    @cached_property
    def dtype(self) -> torch.dtype:
        """What models compute in."""
        return resolve_dtype(self.recipe.dtype, self.device)

    @cached_property
    def model(self) -> Any:
        """The teacher in memory."""
        return load_model(self.teacher, self.device, self.dtype)

    @cached_property
    def context(self) -> int:
        """Tokens in a block.

        Raises:
            UserError: the teacher was made for fewer.
        """
        most = getattr(self.teacher.config, "max_position_embeddings", None) or DEFAULT_CONTEXT
        context = self.recipe.context or min(DEFAULT_CONTEXT, most)
        if context > most:
            raise UserError(f"context {context} is above the {most} tokens that {self.recipe.teacher} was made for")
        return context

    @cached_property
    def splits(self) -> Splits:
        """The text, dealt out to its purposes."""
        recipe = self.recipe
        return read_splits(
            recipe.data,
            load_tokenizer(self.teacher.folder),
            self.teacher.arch.sizes["vocab_size"],
            self.context,
            recipe.seed,
            evaluation_tokens=recipe.evaluation.tokens,
            heldout_tokens=recipe.search.tokens,
            train_tokens=max(recipe.calibration.tokens, recipe.distill.tokens),
        )

    @cached_property
    def candidates(self) -> list[Arch]:
        """Every shape within the target's budget; at least one."""
        budget = parse_budget(self.recipe.target_params, self.teacher.arch, self.recipe.search.tolerance)
        return feasible(self.teacher.arch, budget)

    @property
    def calibration_blocks(self) -> Blocks:
        """The first training blocks."""
        return self.splits.train[: max(1, self.recipe.calibration.tokens // self.context)]

    @cached_property
    def statistics(self) -> dict[str, Tensor]:
        """What calibration sums up."""
        return calibrate(self.model, self.teacher.arch, self.calibration_blocks)

    @cached_property
    def importance(self) -> Importance:
        """The scores of every axis, from these statistics."""
        return score(self.statistics, self.teacher.arch, self.recipe.calibration.mamba_scores)

    def search(self, importance: Importance, log: Path) -> Arch:
        """The best of the candidates."""
        return search(
            self.teacher, self.model, importance, self.splits.heldout, self.candidates, self.recipe.search, log
        )
