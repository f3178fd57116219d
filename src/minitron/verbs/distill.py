"""Train a smaller model on the outputs of a larger one."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron.verbs.results import Shaped

if TYPE_CHECKING:
    from minitron.recipe import RecipeSource


def distill(
    teacher: str | Path,
    student: str | Path,
    out: str | Path,
    *,
    recipe: "RecipeSource" = None,
    overwrite: bool = False,
    **settings: Any,
) -> Shaped:
    """Train the model `student` on the outputs of a teacher and write a Hugging Face folder at `out`.

    An interrupted run with equal inputs continues from its last checkpoint, in a hidden folder within `out`. Under
    torchrun the models are sharded with FSDP2. The teacher may have more tokens than the student. See `calibrate` for
    `settings`.

    Raises:
        UserError: the student has tokens that the teacher lacks, or the training cannot be done.
    """
    from minitron import distillation
    from minitron.model.source import open_teacher
    from minitron.output import Output
    from minitron.recipe import recipe_from
    from minitron.verbs.workspace import open_session, publish_student, resumable

    output, pruned = Output(Path(out).absolute(), "config.json"), open_teacher(str(student))
    session = open_session(
        recipe_from(recipe, teacher=teacher, **settings),
        output,
        overwrite=overwrite,
        inputs=(pruned.folder,),
        one_process=False,
    )
    session = session.over(pruned)
    _ = session.pieces  # what is wrong with the two tokenizers is an error before any work
    distillation.require_trainable(session, pruned.arch)
    with resumable(session, output, "distill", [pruned.fingerprint()]) as work:
        distillation.warn_of_repetition(session)
        distillation.distill(session, pruned, work / "student", work)
        publish_student(session, work, output)
    return Shaped(output.path, pruned.arch)
