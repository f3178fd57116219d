"""What verbs share: reading the recipe, checking where a result may go, and continuing what was interrupted."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minitron.errors import UserError, courtesy
from minitron.files import empty_folder, read_json, write_json
from minitron.model.checkpoint import open_checkpoint
from minitron.output import Output
from minitron.pruning import require_scores
from minitron.recipe import Recipe
from minitron.reports.card import write_card
from minitron.run import RUN_RECORD, local_inputs, teacher_of
from minitron.session import Session


def open_session(
    recipe: Recipe, out: Output, *, overwrite: bool, inputs: tuple[Path, ...] = (), one_process: bool = True
) -> Session:
    """Open the recipe's session, once its result may go to `out`.

    `inputs` are folders besides the teacher's that must not be inside a result that is replaced.

    Raises:
        UserError: see `Session.validate`, `Session.require_one_reading`, `require_scores` and `Output.require_usable`.
    """
    require_scores(recipe)
    session = Session(recipe)
    session.validate(one_process=one_process)
    out.require_usable(overwrite, (session.teacher.folder, *inputs, *local_inputs(recipe)))
    session.require_one_reading()
    return session


@contextmanager
def resumable(session: Session, out: Output, verb: str, sources: list[str], text: str | None = None) -> Iterator[Path]:
    """Yield a hidden folder within `out` from which an interrupted verb continues, and hold the lock of `out`.

    The folder is emptied when it belongs to other inputs: another recipe, teacher, text, or other `sources`; `text` is
    the fingerprint of what is read, by default that of the session's splits. While the block runs, the session's
    runtime is one of the processes that torchrun started.
    """
    identity = {
        "recipe": session.recipe.model_dump(mode="json"),
        "sources": [session.teacher.fingerprint(), *sources, text or session.splits.fingerprint()],
    }
    work = out.hidden(verb)
    with out.held(), session.joined() as runtime:
        world, record = runtime.world, work / RUN_RECORD
        if world.is_main and not (record.exists() and read_json(record) == identity):
            empty_folder(work)
            write_json(record, identity)
        world.barrier()
        can_continue = [work / name for name in ("checkpoint", "candidates.jsonl")]
        try:
            yield work
            world.barrier()
            can_continue = []
        except UserError:
            raise
        except BaseException:  # interrupted: scores that are complete are kept as well
            can_continue.append(work / "importance.safetensors")
            raise
        finally:
            if world.is_main and not any(path.exists() for path in can_continue):
                shutil.rmtree(work, ignore_errors=True)


def publish_student(session: Session, work: Path, out: Output) -> None:
    """Move the finished student to its place, with its model card and the curves of its training beside the weights."""
    if not session.runtime.world.is_main:
        return
    shutil.copyfile(work / "metrics.jsonl", work / "student" / "metrics.jsonl")
    if (work / "tensorboard").exists():
        shutil.copytree(work / "tensorboard", work / "student" / "tensorboard")
    with courtesy("the model card"):
        write_card(work / "student", open_checkpoint(work / "student").arch)
    out.publish(work / "student")


def run_directory(recipe: Recipe) -> Path | None:
    """Return the run directory that is given in the place of a model, or None."""
    run = Path(recipe.teacher).expanduser()
    return run if (run / RUN_RECORD).is_file() else None


def student_of(recipe: Recipe, against: str | None) -> tuple[Recipe, str | None]:
    """For a run directory, return the recipe of its student, to be compared with its teacher; else both arguments.

    Raises:
        UserError: the run has no student yet.
    """
    run = run_directory(recipe)
    if run is None:
        return recipe, against
    if not (run / "student").is_dir():
        raise UserError(f"{run} has no student yet")
    return recipe.model_copy(update={"teacher": str(run / "student")}), against or str(teacher_of(run))
