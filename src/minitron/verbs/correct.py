"""Train a teacher on the text that it is to teach with."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron.verbs.results import Shaped

if TYPE_CHECKING:
    from minitron.recipe import RecipeSource


def correct(
    teacher: str | Path, out: str | Path, *, recipe: "RecipeSource" = None, overwrite: bool = False, **settings: Any
) -> Shaped:
    """Train a teacher itself on the recipe's data and write a Hugging Face folder at `out`.

    A teacher that has not seen such data teaches it badly ("teacher correction", arXiv 2408.11796, section 2). An
    interrupted run continues as in `distill`. See `calibrate` for `settings`.

    Raises:
        UserError: the training cannot be done.
    """
    from minitron import distillation
    from minitron.output import Output
    from minitron.recipe import recipe_from
    from minitron.verbs.workspace import open_session, publish_student, resumable

    output = Output(Path(out).absolute(), "config.json")
    session = open_session(
        recipe_from(recipe, teacher=teacher, **settings), output, overwrite=overwrite, one_process=False
    )
    distillation.require_correctable(session)
    with resumable(session, output, "correct", [session.teacher.fingerprint()]) as work:
        distillation.warn_of_repetition(session)
        distillation.correct(session, work / "student", work)
        publish_student(session, work, output)
    return Shaped(output.path, session.teacher.arch)
