"""Merge two models of one shape."""

from pathlib import Path

from minitron.errors import UserError
from minitron.verbs.results import Shaped


def merge(
    one: str | Path, other: str | Path, out: str | Path, *, weight: float = 0.5, overwrite: bool = False
) -> Shaped:
    """Write the model whose weights lie between those of two models of one shape; `weight` is the share of `other`.

    Two students that were tuned differently from one start, for instance, or a student before and after its tuning.
    Each may be a run directory, for its student, or a model.

    Raises:
        UserError: the weight is not between 0 and 1, the models differ in shape or tokens, or `out` may not be written.
    """
    from minitron.data.tokens import load_tokenizer
    from minitron.history import history_of, record_step
    from minitron.model.interpolated import interpolate, require_mergeable
    from minitron.model.source import open_teacher
    from minitron.output import Output
    from minitron.recipe import Recipe
    from minitron.reports.card import write_card
    from minitron.verbs.workspace import student_of

    if not 0 <= weight <= 1:
        raise UserError(f"--weight {weight:g}: accepted: 0 (all of the first model) to 1 (all of the second)")
    models = [open_teacher(student_of(Recipe(teacher=str(model)), None)[0].teacher) for model in (one, other)]
    require_mergeable(*models)
    vocabularies = [load_tokenizer(model.folder).get_vocab() for model in models]
    if vocabularies[0] != vocabularies[1]:
        raise UserError(f"{models[0].folder} and {models[1].folder} have different tokens")
    output = Output(Path(out).absolute(), "config.json")
    output.require_usable(overwrite, tuple(model.folder for model in models))
    with output.work("merge") as work:
        (folder := work / "merged").mkdir()
        interpolate(models[0], models[1], weight, folder)
        merged = {"with": str(other), "with_steps": history_of(models[1].folder).steps, "weight": weight}
        record_step(folder, models[0].folder, {"step": "interpolate", "of": str(one), **merged})
        write_card(folder, models[0].arch)
        output.publish(folder)
    return Shaped(output.path, models[0].arch)
