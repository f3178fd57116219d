"""Train a model on pairs of answers, of which one is preferred."""

from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron.errors import UserError
from minitron.verbs.results import Shaped

if TYPE_CHECKING:
    from minitron.recipe import RecipeSource


def prefer(
    model: str | Path, out: str | Path, *, recipe: "RecipeSource" = None, overwrite: bool = False, **settings: Any
) -> Shaped:
    """Train a model, such as a tuned student, on pairs of answers (DPO) and write a Hugging Face folder at `out`.

    Rows of the data hold `chosen` and `rejected`. The reference is the model before. Of a run directory, the student is
    trained. `prefer` is the part of the recipe
    that counts; see `calibrate` for `settings`.

    Raises:
        UserError: trl is missing, no data is named, or a row does not fit.
    """
    from minitron import distillation
    from minitron.data.preferences import read_preferences
    from minitron.output import Output
    from minitron.recipe import recipe_from
    from minitron.verbs.workspace import open_session, publish_student, resumable, student_of

    if not recipe and "data" not in settings:
        raise UserError("prefer needs --data, pairs of answers: rows with 'prompt', 'chosen' and 'rejected'")
    distillation.require_trl()
    output = Output(Path(out).absolute(), "config.json")
    settled, _ = student_of(recipe_from(recipe, teacher=model, **settings), None)
    session = open_session(settled, output, overwrite=overwrite)
    if not isinstance(session.recipe.data, str):
        raise UserError("prefer takes one source of pairs, not a mixture")
    pairs = read_preferences(session.recipe.data, session.recipe.seed)
    with resumable(session, output, "prefer", [], sha256(repr(pairs).encode()).hexdigest()) as work:
        distillation.prefer(session, pairs, work / "student", work)
        publish_student(session, work, output)
    return Shaped(output.path, session.teacher.arch)
