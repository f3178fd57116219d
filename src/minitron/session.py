"""A recipe's teacher and text, opened once and released explicitly."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from minitron.data.blocks import Blocks
from minitron.data.packing import Packing, Splits, SplitTokens, read_blocks, read_repeatedly, read_splits
from minitron.data.spelling import Pieces
from minitron.data.tokens import load_tokenizer
from minitron.errors import UserError
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.model.crosscheck import require_one_reading
from minitron.model.language_model import load_model, require_attention
from minitron.model.source import open_teacher
from minitron.recipe import Documents, Recipe
from minitron.runtime import (
    Runtime,
    World,
    is_main_process,
    joined_world,
    num_ranks,
    release_memory,
    resolve_device,
    resolve_dtype,
    rounds_products,
)


class Session:
    """What a recipe names: the teacher on disk and in memory, the text, and where to compute.

    Checkpoint and text are read when first used and kept. A model is in memory only within `teacher_model` or
    `source_model`.
    """

    def __init__(self, recipe: Recipe, larger: Path | None = None, world: World | None = None) -> None:
        """`larger` is the folder of a student of the teacher that is pruned instead of the teacher itself.

        `world` are the processes of torchrun where these have joined already; see `joined`.
        """
        self.recipe, self.larger, self._world = recipe, larger, world or World()
        self._models: dict[Path, Any] = {}
        self._chats: Path | None = None

    def validate(self, *, one_process: bool = True) -> None:
        """Check what can be wrong with teacher, device, dtype and attention, before any work.

        Raises:
            UserError: see `open_teacher`, `resolve_device`, `resolve_dtype` and `require_attention`; or torchrun
                started several processes for a command that runs in one.
        """
        if one_process:
            require_one_process()
        _ = self.source, self.runtime, self.context
        require_attention(self.teacher, self.runtime)

    def require_one_reading(self) -> None:
        """Check that transformers loads the model that the family's table reads, before anything is cut or trained.

        Of several processes, the main one checks.

        Raises:
            UserError: see `crosscheck.require_one_reading`.
        """
        if is_main_process():
            require_one_reading(self.teacher)

    @cached_property
    def teacher(self) -> Checkpoint:
        """The teacher on disk."""
        return open_teacher(self.recipe.teacher, self.recipe.family, text_only=self.recipe.text_only)

    def over(self, source: Checkpoint) -> "Session":
        """Return a session like this one that prunes or trains another model, with the teacher's tokens or fewer."""
        session = Session(self.recipe, self.larger, self._world)
        session.teacher, session.source, session.runtime = self.teacher, source, self.runtime
        session._chats = self._chats
        return session

    @cached_property
    def pieces(self) -> Pieces | None:
        """How the model that is pruned or trained writes the teacher's tokens; None where it has all of them.

        Raises:
            UserError: it has tokens that the teacher lacks.
        """
        models = self.teacher, self.source
        if self.teacher.folder == self.source.folder:
            return None
        teacher, student = (load_tokenizer(model.folder) for model in models)
        return Pieces.between(teacher, student, (models[0].arch.axis_size("vocab"), models[1].arch.axis_size("vocab")))

    @cached_property
    def source(self) -> Checkpoint:
        """The model that is pruned: the teacher, or a larger student of the teacher."""
        return open_checkpoint(self.larger) if self.larger else self.teacher

    @cached_property
    def runtime(self) -> Runtime:
        """Device, dtype and seed of the recipe, in one process unless processes have joined; see `joined`."""
        device = resolve_device(self.recipe.device)
        dtype = resolve_dtype(self.recipe.dtype, device)
        rounds = rounds_products(self.recipe.dtype, device)
        return Runtime(device, dtype, self.recipe.seed, self._world, self.recipe.attn_implementation, rounds)

    @contextmanager
    def joined(self) -> Iterator[Runtime]:
        """Let `runtime` be one of the processes that torchrun started, while the block runs."""
        alone = self.runtime
        with joined_world(alone.device) as world:
            self.runtime = replace(alone, world=world)
            try:
                yield self.runtime
            finally:
                self.runtime = alone

    @contextmanager
    def teacher_model(self) -> Iterator[Any]:
        """Hold the teacher in memory while the block runs; blocks within the block share one copy."""
        with self._model(self.teacher) as model:
            yield model

    @contextmanager
    def source_model(self) -> Iterator[Any]:
        """Hold the model that is pruned in memory while the block runs; see `teacher_model`."""
        with self._model(self.source) as model:
            yield model

    @contextmanager
    def _model(self, checkpoint: Checkpoint) -> Iterator[Any]:
        if checkpoint.folder in self._models:
            yield self._models[checkpoint.folder]
            return
        runtime = self.runtime
        self._models[checkpoint.folder] = load_model(checkpoint, runtime.device, runtime.dtype, runtime.attention)
        try:
            yield self._models[checkpoint.folder]
        finally:
            del self._models[checkpoint.folder]
            release_memory()

    @cached_property
    def context(self) -> int:
        """Tokens in a block.

        Raises:
            UserError: the recipe asks for more tokens than the teacher was made for.
        """
        return self.recipe.context_within(getattr(self.teacher.config, "max_position_embeddings", None))

    @cached_property
    def splits(self) -> Splits:
        """The text, split into evaluation, held-out and training blocks.

        Raises:
            UserError: the recipe keeps documents apart and the model cannot; or see `read_splits`.
        """
        recipe = self.recipe
        tokens = SplitTokens(
            evaluation=recipe.evaluation.tokens,
            heldout=recipe.heldout_tokens,
            train=max(recipe.calibration.tokens, recipe.distill.tokens),
            skipped=recipe.distill.skip_tokens,
        )
        packing = self.packing(recipe.distill.documents)
        splits = read_splits(recipe.data, packing, tokens)
        if self._chats is None:
            return splits
        chats = read_repeatedly(str(self._chats), packing)
        return replace(splits, train=splits.train.mixed(chats, recipe.chats.share))

    @property
    def mixes_chats(self) -> bool:
        """Whether a share of the training blocks are chats."""
        return self._chats is not None

    def mix_in(self, chats: Path) -> None:
        """Let a share of the training blocks, `chats.share`, be chats from a file."""
        self._chats = chats
        self.__dict__.pop("splits", None)

    @cached_property
    def counted_blocks(self) -> Blocks:
        """The text by whose counts tokens are kept: that of the training, and what follows it in the data.

        It has `vocabulary.tokens` tokens, or as many as the training text.
        """
        splits, recipe = self.splits, self.recipe
        if splits.train.num_tokens >= recipe.vocabulary.tokens:
            return splits.train
        measured = len(splits.evaluation) + len(splits.heldout)
        tokens = max(recipe.vocabulary.tokens, recipe.distill.skip_tokens + splits.train.num_tokens)
        return read_blocks(recipe.data, self.packing(), measured * self.context + tokens)[measured:]

    def packing(self, documents: Documents = "joined") -> Packing:
        """Return how text is packed: the tokenizer of the pruned model, the context and the seed of the recipe.

        Raises:
            UserError: documents are to be kept apart and the model cannot, or whole and the student lacks tokens.
        """
        arch, can_share = self.teacher.arch, not self.teacher.arch.family.joins_documents
        if documents == "apart" and not can_share:
            raise UserError(
                f"distill.documents apart: {arch.model_type} runs from one document of a block into the next; "
                "accepted: joined, whole"
            )
        if documents == "whole" and self.pieces is not None:
            raise UserError(
                "distill.documents whole: blocks of a student that has fewer tokens than its teacher hold no padding; "
                "accepted: joined, apart"
            )
        tokenizer, vocab_size = load_tokenizer(self.source.folder), self.source.arch.sizes["vocab_size"]
        whole = None if self.pieces is None else load_tokenizer(self.teacher.folder)
        return Packing(tokenizer, vocab_size, self.context, self.recipe.seed, documents, can_share, whole)

    @property
    def calibration_blocks(self) -> Blocks:
        """The first training blocks, on which importance is measured."""
        return self.splits.train[: max(1, self.recipe.calibration.tokens // self.context)]


def require_one_process() -> None:
    """Check that torchrun did not start several processes.

    Raises:
        UserError: torchrun did.
    """
    if num_ranks() > 1:
        raise UserError(
            "only compress, search, distill, correct and tune run under torchrun; run this command in one process"
        )
