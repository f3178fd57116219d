"""Distillation: train a smaller model on the next-token distribution of a larger one, in one training loop."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minitron.data.blocks import Blocks
from minitron.distillation import trainer
from minitron.distillation.teacher import Learning, Live, Source, Teacher, stored
from minitron.distillation.trainer import Trainer
from minitron.errors import UserError
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint
from minitron.model.language_model import load_model, read_head
from minitron.recipe import DistillRecipe
from minitron.runtime import num_ranks
from minitron.session import Session

__all__ = ["correct", "distill", "require_trainable", "stored_teacher"]


def distill(session: Session, pruned: Checkpoint, out: Path, work: Path) -> None:
    """Train a pruned model on the outputs of the session's teacher and write a Hugging Face folder at `out`.

    `work` receives `metrics.jsonl` and `checkpoint/`, from which an interrupted run continues.

    Raises:
        UserError: see `require_trainable`, `Trainer.distill` and `stored_teacher`.
        StoppedError: SIGINT or SIGTERM arrived; the last step is saved.
    """
    require_trainable(session, pruned.arch)
    with _teacher_of(session) as teacher:
        _trainer(session, teacher, work).distill(pruned, out)


def correct(session: Session, out: Path, work: Path) -> None:
    """Train the session's teacher itself on the text and write a Hugging Face folder at `out`; see `distill`.

    A teacher that has not seen such text teaches it badly (teacher correction, arXiv 2408.11796, section 2).
    """
    require_trainable(session, session.teacher.arch)
    _trainer(session, None, work).distill(session.teacher, out)


def require_trainable(session: Session, student: Arch) -> None:
    """Check what a training of a student of this shape would fail on; teacher and text are not read for it.

    Verbs call this before their first work, with the number of processes that torchrun started.

    Raises:
        UserError: see `trainer.require_trainable`; or stored classes of the teacher hold tokens that the student lacks.
    """
    recipe = session.recipe.distill
    trainer.require_trainable(recipe, student, session.runtime.dtype, num_ranks=num_ranks())
    stores_classes = recipe.teacher_states is not None and recipe.stored == "top_k"
    if stores_classes and student.axis_size("vocab") < session.teacher.arch.axis_size("vocab"):
        raise UserError("distill.stored top_k needs a student with all of the teacher's tokens")


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
def _teacher_of(session: Session) -> Iterator[Teacher]:
    """Yield the teacher as the recipe describes it: in memory, learning from the text as well, or stored."""
    recipe, teacher, runtime = session.recipe.distill, session.teacher, session.runtime
    if recipe.correction.trains != "nothing":
        # A model of its own, since it changes: the session's stays as it is.
        model = load_model(teacher, runtime.loading_device, runtime.weights_dtype)
        yield Learning(model, recipe.correction, runtime.seed)
    elif recipe.teacher_states is not None:
        yield stored_teacher(session, Path(recipe.teacher_states), session.splits.train, recipe)
    elif runtime.loading_device != runtime.device:
        yield Live(load_model(teacher, runtime.loading_device, runtime.dtype))
    else:
        with session.teacher_model() as model:
            yield Live(model)
