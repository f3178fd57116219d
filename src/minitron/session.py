"""What a recipe names, opened: teacher, text, candidates; each when first asked for."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from minitron.data.blocks import Blocks, Splits, load_tokenizer, read_splits
from minitron.errors import UserError
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.model.language_model import load_model
from minitron.model.source import open_teacher
from minitron.pruning.calibrate import Statistics, calibrate
from minitron.pruning.depth import score_depth
from minitron.pruning.importance import Importance, score
from minitron.pruning.rotate import turns
from minitron.recipe import Recipe
from minitron.runtime import configure_backends, resolve_device, resolve_dtype

DEFAULT_CONTEXT = 1024


@dataclass(frozen=True)
class Session:
    """What a recipe names, each opened when first asked for."""

    recipe: Recipe
    larger: Path | None = None
    """A student of the teacher that is cut instead of the teacher itself."""

    @cached_property
    def teacher(self) -> Checkpoint:
        """The teacher on disk."""
        return open_teacher(self.recipe.teacher, self.recipe.family)

    @cached_property
    def whole(self) -> Checkpoint:
        """What is cut: the teacher, or a larger student of it."""
        return open_checkpoint(self.larger) if self.larger else self.teacher

    @cached_property
    def device(self) -> torch.device:
        """Where models run."""
        configure_backends()
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
        """The text, dealt out to its purposes.

        Raises:
            UserError: documents are to be kept apart in a model that cannot.
        """
        recipe = self.recipe
        keeps_apart = recipe.distill.documents == "apart"
        if keeps_apart and self.teacher.arch.family.joins_documents:
            raise UserError(
                f"distill.documents apart: {self.teacher.arch.model_type} runs from one document of a block into the "
                "next; accepted: joined"
            )
        return read_splits(
            recipe.data,
            load_tokenizer(self.teacher.folder),
            self.teacher.arch.sizes["vocab_size"],
            self.context,
            recipe.seed,
            evaluation_tokens=recipe.evaluation.tokens,
            heldout_tokens=recipe.search.tokens,
            train_tokens=max(recipe.calibration.tokens, recipe.distill.tokens, recipe.search.distill_tokens),
            keeps_apart=keeps_apart,
        )

    @property
    def calibration_blocks(self) -> Blocks:
        """The first training blocks."""
        return self.splits.train[: max(1, self.recipe.calibration.tokens // self.context)]

    @cached_property
    def statistics(self) -> Statistics:
        """What calibration sums up.

        Raises:
            UserError: the calibration text is one token over and over.
        """
        blocks, recipe = self.calibration_blocks, self.recipe
        if len(tokens := blocks.ids.unique()) < 2:
            raise UserError(f"the calibration text holds token {int(tokens)} alone: is it nothing but padding?")
        moment = turns(self.whole.arch, recipe.prune)
        return calibrate(self.whole, blocks, recipe.calibration, self.device, self.dtype, moment)

    def importance(self, removed: set[int] | None = None) -> Importance:
        """The scores of every axis, from these statistics, and of depth as the recipe says.

        `removed` is how many layers may have to go, where that matters; None: up to half of them.
        """
        arch, depth = self.whole.arch, self.recipe.depth
        importance = score(self.statistics, arch, self.recipe.calibration)
        if depth.score == "block_influence" and depth.removal == "one_shot":
            return importance
        tokenizer = load_tokenizer(self.teacher.folder) if depth.score == "task" else None
        blocks = self.calibration_blocks[: max(1, depth.tokens // self.context)]
        removed = set(range(1, arch.axis_size("layer") // 2 + 1)) if removed is None else removed
        model = load_model(self.whole, self.device, self.dtype) if self.larger else self.model
        return importance | score_depth(model, arch, blocks, depth, removed, tokenizer)

    def forget_model(self) -> None:
        """Let go of the teacher in memory; it is read again when it is asked for."""
        self.__dict__.pop("model", None)
