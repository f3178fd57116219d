"""Distillation: train a smaller model on the next-token distribution of a larger one, in one training loop."""

import logging
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from minitron.data.blocks import Blocks
from minitron.distillation import trainer
from minitron.distillation.correction import recipe_of_correction
from minitron.distillation.nested import Member, require_equal_names, require_nestable
from minitron.distillation.preference import prefer, require_trl
from minitron.distillation.record import write_training
from minitron.distillation.teacher import Learning, Live, Source, SpelledLive, Teacher, require_states_folder, stored
from minitron.distillation.trainer import Trainer
from minitron.distillation.tuning import recipe_of_tuning, require_tunable, tune
from minitron.errors import UserError
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint
from minitron.model.language_model import attention_in_training, load_model, read_head
from minitron.recipe import DistillRecipe, data_in_words
from minitron.runtime import is_main_process, num_ranks
from minitron.session import Session

__all__ = [
    "Member",
    "correct",
    "distill",
    "distill_nested",
    "prefer",
    "require_correctable",
    "require_equal_names",
    "require_nestable",
    "require_spellable",
    "require_trainable",
    "require_trl",
    "require_tunable",
    "stored_teacher",
    "tune",
    "warn_of_repetition",
]

logger = logging.getLogger(__name__)

COMPILERS = ("g++", "clang++", "c++", "gcc", "clang", "cc")
"""Compilers of which `torch.compile` needs one."""


def distill(session: Session, pruned: Checkpoint, out: Path, work: Path) -> None:
    """Train a pruned model on the outputs of the session's teacher and write a Hugging Face folder at `out`.

    `work` receives `metrics.jsonl` and `checkpoint/`, from which an interrupted run continues. What the training did is
    added to the history of the pruned model, in `out/minitron.json`.

    Raises:
        UserError: see `require_trainable`, `Trainer.distill` and `stored_teacher`.
        StoppedError: SIGINT or SIGTERM arrived; the last step is saved.
    """
    recipe = session.recipe.distill
    require_trainable(session, pruned.arch)
    depths = (arch.axis_size("layer") for arch in (session.teacher.arch, pruned.arch))
    is_deep_cut = bool(recipe.intermediate.compared(*depths))
    if is_deep_cut and recipe.teacher_states is not None and is_main_process():
        logger.warning(
            "a quarter of the layers or more were cut: losses of embeddings and layer outputs would help, and need the "
            "teacher in memory, not its stored states (distill.teacher_states, lineage.stores_states)"
        )
    with _teacher_of(session) as teacher:
        trainer = _trainer(session, teacher, recipe, work)
        trainer.distill(pruned, out)
        write_training(out, trainer, session, pruned)


def distill_nested(session: Session, series: tuple[Member, ...], outs: list[Path], work: Path) -> None:
    """Train students that are the beginnings of each other together, and write one to each folder of `outs`.

    Every step trains one of them, drawn by its weight; see `distill` for `work` and what is raised.
    """
    recipe = session.recipe.distill
    recipe = recipe.model_copy(update={"intermediate": recipe.intermediate.model_copy(update={"of": ()})})
    with _teacher_of(session) as teacher:
        trainer = replace(_trainer(session, teacher, recipe, work), series=series)
        trainer.distill_nested(outs)
        for member, out in zip(series, outs, strict=True):
            write_training(out, trainer, session, member.pruned, member.name)


def correct(session: Session, out: Path, work: Path) -> None:
    """Train the session's teacher itself on the text and write a Hugging Face folder at `out`; see `distill`.

    A teacher that has not seen such text teaches it badly (teacher correction, arXiv 2408.11796, section 2). Learning
    rate and warm-up follow the paper, see `recipe_of_correction`.
    """
    require_correctable(session)
    trainer = replace(_trainer(session, None, _recipe_of_correction(session), work), stage="correct")
    trainer.distill(session.teacher, out)
    write_training(out, trainer, session, session.teacher)


def require_trainable(
    session: Session, student: Arch, trial: DistillRecipe | None = None, *, tuned: bool = False
) -> None:
    """Check what a training of a student of this shape would fail on; teacher and text are not read for it.

    Verbs call this before their first work, with the number of processes that torchrun started. `trial` are the
    settings of a search's trials, each of which runs in one process. With `tuned`, the training is that of
    `recipe_of_tuning`, whose length follows from the session's text.

    Raises:
        UserError: see `trainer.require_trainable`; the recipe asks for a package or a compiler that is missing; stored
            classes of the teacher hold tokens that the student lacks; or `distill.teacher_states` is a folder of
            something else.
    """
    recipe = trial or session.recipe.distill
    if tuned:
        recipe = recipe_of_tuning(session.recipe, session.splits.train)
    trainer.require_trainable(recipe, student, session.runtime.dtype, num_ranks=1 if trial else num_ranks())
    _require_installed(recipe)
    num_steps = recipe.num_steps(session.context)
    if recipe.warmup_steps and recipe.warmup_steps >= num_steps:
        raise UserError(
            f"distill.warmup_steps {recipe.warmup_steps} takes all {num_steps} steps of the training; accepted: fewer, "
            "or distill.warmup_ratio"
        )
    if recipe.teacher_states is not None:
        require_states_folder(Path(recipe.teacher_states))
    is_padded_more = student.axis_size("vocab") < session.teacher.arch.axis_size("vocab")
    stores_classes = recipe.teacher_states is not None and recipe.stored == "top_k"
    if session.pieces is not None or (is_padded_more and stores_classes):
        require_spellable(recipe)


def require_spellable(recipe: DistillRecipe) -> None:
    """Check that a teacher may have more tokens than its student, as a training is described.

    Raises:
        UserError: it compares something at equal positions, or in classes of the teacher's tokens.
    """
    reasons = {
        "distill.stored top_k stores": recipe.teacher_states is not None and recipe.stored == "top_k",
        "distill.intermediate compares": bool(recipe.intermediate.of),
        "distill.correction trains": recipe.correction.trains != "nothing",
        "distill.on_policy continues": recipe.on_policy.share > 0,
    }
    for reason, holds in reasons.items():
        if holds:
            raise UserError(f"{reason} at the teacher's own tokens, of which the student lacks some")


def require_correctable(session: Session) -> None:
    """Check what a training of the session's teacher on the text would fail on; see `require_trainable`."""
    if session.recipe.distill.intermediate.of:
        raise UserError("distill.intermediate compares a student with a teacher; correct trains the teacher alone")
    if session.recipe.distill.on_policy.share:
        raise UserError("distill.on_policy needs a teacher of the student; correct trains the teacher alone")
    if session.recipe.distill.quantize is not None:
        raise UserError("distill.quantize rounds a student; correct trains the teacher alone, which stays as it is")
    require_trainable(session, session.teacher.arch)
    _recipe_of_correction(session)


def warn_of_repetition(session: Session) -> None:
    """Warn, once for each text, that a training is longer than the text and therefore repeats it."""
    recipe, train = session.recipe.distill, session.splits.train
    tokens = recipe.num_steps(train.context) * recipe.batch_size * train.context
    if session.runtime.world.is_main and tokens > train.num_tokens:
        _warn_once(
            f"data '{data_in_words(session.recipe.data)}' has {train.num_tokens:,} training tokens: distill.tokens "
            f"{recipe.tokens:,} reads them {tokens / train.num_tokens:.3g} times"
        )


@cache  # the members of a series have one text
def _warn_once(message: str) -> None:
    logger.warning(message)


def stored_teacher(session: Session, folder: Path, blocks: Blocks, recipe: DistillRecipe) -> Teacher:
    """Return a teacher whose outputs on some blocks are read from a folder; the teacher runs first for what is missing.

    It runs as in trainings (`Runtime.training`), so that stored outputs are those of a teacher in memory.

    Raises:
        UserError: see `teacher.stored`.
    """
    runtime = session.runtime
    dtype = str(runtime.dtype) + runtime.training_dtype.removeprefix(runtime.dtype_name)
    identity = {"teacher": session.teacher.fingerprint(), "blocks": blocks.fingerprint(), "dtype": dtype}

    @contextmanager
    def model() -> Iterator[Any]:
        with session.teacher_model() as loaded, runtime.training():
            yield loaded

    head = read_head(session.teacher, runtime.device, runtime.dtype)
    source = Source(identity, model, head, None if session.pieces is None else session.pieces.to(runtime.device))
    return stored(folder, source, blocks, recipe, runtime.world)


def _require_installed(recipe: DistillRecipe) -> None:
    """Check for the packages and the compiler that a training asks for.

    Raises:
        UserError: one is missing; the message says how to install it.
    """
    packages = {
        "distill.trains lora needs peft: pip install 'minitron[lora]'": (
            "peft",
            "lora" in {recipe.trains, recipe.correction.trains},
        ),
        "distill.optimizer adamw8bit needs torchao: pip install 'minitron[8bit]'": (
            "torchao",
            recipe.optimizer == "adamw8bit",
        ),
    }
    for message, (package, is_needed) in packages.items():
        if is_needed and not (package in sys.modules or find_spec(package)):
            raise UserError(message)
    compilers = [name for name in (os.environ.get("CXX"), os.environ.get("CC"), *COMPILERS) if name]
    if recipe.compile and not any(map(shutil.which, compilers)):
        raise UserError("distill.compile needs a C++ compiler, such as g++, and there is none on PATH")


def _recipe_of_correction(session: Session) -> DistillRecipe:
    recipe = session.recipe.distill
    return recipe_of_correction(recipe, recipe.num_steps(session.context))


def _trainer(session: Session, teacher: Teacher | None, recipe: DistillRecipe, work: Path) -> Trainer:
    splits = session.splits
    return Trainer(teacher, recipe, splits.train, session.runtime, work, splits.heldout)


@contextmanager
def _teacher_of(session: Session) -> Iterator[Teacher]:
    """Yield the teacher as the recipe describes it: in memory, learning from the text as well, or stored."""
    recipe, teacher, runtime = session.recipe.distill, session.teacher, session.runtime
    if recipe.correction.trains != "nothing":
        # A model of its own, since it changes: the session's stays as it is.
        attention = attention_in_training(teacher.arch, recipe.micro_batch_size, session.context, runtime)
        model = load_model(teacher, runtime.loading_device, runtime.weights_dtype, attention)
        yield Learning(model, recipe.correction, runtime.seed)
    elif recipe.teacher_states is not None:
        yield stored_teacher(session, Path(recipe.teacher_states), session.splits.train, recipe)
    elif runtime.loading_device != runtime.device:
        yield _live(session, load_model(teacher, runtime.loading_device, runtime.dtype, runtime.attention))
    else:
        with session.teacher_model() as model:
            yield _live(session, model)


def _live(session: Session, model: Any) -> Live:
    pieces = session.pieces
    return Live(model) if pieces is None else SpelledLive(model, session.splits.train, pieces)
