"""Distillation: train a smaller model on the next-token distribution of a larger one, in one training loop."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minitron.data.blocks import Blocks
from minitron.distillation import trainer
from minitron.distillation.teacher import Learning, Live, Teacher, stored
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
        UserError: see `trainer.distill`.
        StoppedError: SIGINT or SIGTERM arrived; the last step is saved.
    """
    with _teacher_of(session, pruned) as teacher:
        _train(session, teacher, pruned, out, work)


def correct(session: Session, out: Path, work: Path) -> None:
    """Train the session's teacher itself on the text and write a Hugging Face folder at `out`; see `distill`.

    A teacher that has not seen such text teaches it badly (teacher correction, arXiv 2408.11796, section 2).
    """
    _train(session, None, session.teacher, out, work)


def _train(session: Session, teacher: Teacher | None, student: Checkpoint, out: Path, work: Path) -> None:
    runtime = session.runtime
    trainer.distill(
        teacher, student, session.splits.train, session.splits.heldout, session.recipe.distill,
        out, work, runtime.seed, runtime.device, runtime.dtype, runtime.world,
    )  # fmt: skip


@contextmanager
def _teacher_of(session: Session, pruned: Checkpoint) -> Iterator[Teacher]:
    """Yield the teacher as the recipe wants it: running along, learning from the text as well, or stored."""
    recipe, teacher, runtime = session.recipe.distill, session.teacher, session.runtime
    if recipe.correction.trains != "nothing":
        # A model of its own: others go on measuring the teacher as it was.
        model = load_model(teacher, runtime.loading_device, runtime.weights_dtype)
        yield Learning(model, recipe.correction, runtime.seed, runtime.world)
    elif recipe.teacher_states is None:
        if runtime.loading_device != runtime.device:
            yield Live(load_model(teacher, runtime.loading_device, runtime.dtype))
            return
        with session.teacher_model() as model:
            yield Live(model)
    else:
        if recipe.stored == "top_k" and pruned.arch.axis_size("vocab") < teacher.arch.axis_size("vocab"):
            raise UserError("distill.stored top_k needs a student with all of the teacher's tokens")
        yield stored_teacher(session, Path(recipe.teacher_states), session.splits.train, recipe)


def stored_teacher(session: Session, folder: Path, blocks: Blocks, recipe: DistillRecipe) -> Teacher:
    """Return the teacher's outputs on some blocks from a folder; run the teacher first for what is missing there.

    Raises:
        UserError: see `teacher.stored`.
    """
    runtime = session.runtime
    identity = {"teacher": session.teacher.fingerprint(), "blocks": blocks.fingerprint(), "dtype": str(runtime.dtype)}
    head = read_head(session.teacher, runtime.device, runtime.dtype)
    return stored(folder, identity, session.teacher_model, head, blocks, recipe, runtime.world)
