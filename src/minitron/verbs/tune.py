"""Train a model on texts, chats or questions with answers."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron.errors import UserError
from minitron.verbs.results import Shaped

if TYPE_CHECKING:
    from minitron.recipe import RecipeSource


def tune(
    model: str | Path, out: str | Path, *, recipe: "RecipeSource" = None, overwrite: bool = False, **settings: Any
) -> Shaped:
    """Train a model, such as a student, on the recipe's data and write a Hugging Face folder at `out`.

    Of chats and of questions with answers, only the answers are learnt. The first example is printed as the model sees
    it. Of a run directory, the student is trained. An interrupted run continues as in `distill`. `tune` and `distill`
    are the parts of the recipe that count; see `calibrate` for `settings`.

    Raises:
        UserError: no data is named, a row of it does not fit, or the training cannot be done.
    """
    from minitron import distillation
    from minitron.data.corpus import read_documents
    from minitron.data.example import example_in_words
    from minitron.data.packing import read_examples
    from minitron.data.tokens import load_tokenizer
    from minitron.output import Output
    from minitron.progress import announce
    from minitron.recipe import recipe_from
    from minitron.verbs.workspace import open_session, publish_student, resumable, student_of

    if not recipe and "data" not in settings:
        raise UserError("tune needs --data, what to learn: texts, chats, or questions with answers")
    output = Output(Path(out).absolute(), "config.json")
    settled, _ = student_of(recipe_from(recipe, teacher=model, **settings), None)
    session = open_session(settled, output, overwrite=overwrite, one_process=False)
    distillation.require_tunable(settled)
    first = next(read_documents(settled.data, settled.seed))
    announce(example_in_words(first, load_tokenizer(session.teacher.folder)))
    session.splits = read_examples(settled.data, session.packing(settled.tune.documents), settled.heldout_tokens)
    distillation.require_trainable(session, session.teacher.arch, tuned=True)
    with resumable(session, output, "tune", []) as work:
        distillation.tune(session, work / "student", work)
        publish_student(session, work, output)
    return Shaped(output.path, session.teacher.arch)
