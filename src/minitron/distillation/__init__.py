"""Distillation: train a smaller model on the next-token distribution of a larger one, in one training loop."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minitron.data.blocks import Blocks
from minitron.distillation.teacher import Learning, Live, Source, Teacher, stored
from minitron.distillation.trainer import Trainer, require_trainable
from minitron.errors import UserError
from minitron.model.checkpoint import Checkpoint
from minitron.model.language_model import load_model, read_head
from minitron.recipe import DistillRecipe
from minitron.session import Session

__all__ = ["correct", "distill", "stored_teacher"]


def distill(session: Session, pruned: Checkpoint, out: Path, work: Path) -> None:
    """Train a pruned model on the outputs of the session's teacher and write a Hugging Face folder at `out`.

    `work` receives `metrics.jsonl` and `checkpoint/`, from which an interrupted run continues.

    Raises:
        UserError: see `Trainer.distill` and `stored_teacher`.
        StoppedError: SIGINT or SIGTERM arrived; the last step is saved.
    """
    require_trainable(session.recipe.distill, pruned, session.runtime)
    with _teacher_of(session, pruned) as teacher:
        _trainer(session, teacher, work).distill(pruned, out)


def correct(session: Session, out: Path, work: Path) -> None:
    """Train the session's teacher itself on the text and write a Hugging Face folder at `out`; see `distill`.

    A teacher that has not seen such text teaches it badly (teacher correction, arXiv 2408.11796, section 2).
    """
    _trainer(session, None, work).distill(session.teacher, out)


def stored_teacher(session: Session, folder: Path, blocks: Blocks, recipe: DistillRecipe) -> Teacher:
    """Return a teacher whose outputs on some blocks are read from a folder; the teacher runs first for what is missing.

    Raises:
        UserError: see `teacher.stored`.
    """
    runtime = session.runtime
    identity = {"teacher": session.teacher.fingerprint(), "blocks": blocks.fingerprint(), "dtype": str(runtime.dtype)}
    source = Source(identity, session.teacher_model, read_head(session.teacher, runtime.device, runtime.dtype))
    return stored(folder, source, blocks, recipe, runtime.world)


def _trainer(session: Session, teacher: Teacher | None, work: Path) -> Trainer:
    splits = session.splits
    return Trainer(teacher, session.recipe.distill, splits.train, session.runtime, work, splits.heldout)


@contextmanager
def _teacher_of(session: Session, pruned: Checkpoint) -> Iterator[Teacher]:
    """Yield the teacher as the recipe describes it: in memory, learning from the text as well, or stored."""
    recipe, teacher, runtime = session.recipe.distill, session.teacher, session.runtime
    if recipe.correction.trains != "nothing":
        # A model of its own, since it changes: the session's stays as it is.
        model = load_model(teacher, runtime.loading_device, runtime.weights_dtype)
        yield Learning(model, recipe.correction, runtime.seed, runtime.world)
    elif recipe.teacher_states is not None:
        if recipe.stored == "top_k" and pruned.arch.axis_size("vocab") < teacher.arch.axis_size("vocab"):
            raise UserError("distill.stored top_k needs a student with all of the teacher's tokens")
        yield stored_teacher(session, Path(recipe.teacher_states), session.splits.train, recipe)
    elif runtime.loading_device != runtime.device:
        yield Live(load_model(teacher, runtime.loading_device, runtime.dtype))
    else:
        with session.teacher_model() as model:
            yield Live(model)
