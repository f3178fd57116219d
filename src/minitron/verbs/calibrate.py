"""Measure how important every part of a teacher is."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron.verbs.results import Calibrated

if TYPE_CHECKING:
    from minitron.recipe import RecipeSource


def calibrate(
    teacher: str | Path, out: str | Path, *, recipe: "RecipeSource" = None, overwrite: bool = False, **settings: Any
) -> Calibrated:
    """Write `calibration.safetensors` and `importance.safetensors` of a teacher into the folder `out`.

    `settings` are keys of the recipe, such as `data` or `calibration={"tokens": "32k"}`; `recipe` is a YAML file or
    the name of a recipe, which they override.

    Raises:
        UserError: an input cannot be used, or `out` may not be replaced.
    """
    from minitron.output import Output
    from minitron.pruning import require_measurable, write_importance
    from minitron.recipe import recipe_from
    from minitron.verbs.workspace import open_session

    output = Output(Path(out).absolute(), "importance.safetensors")
    session = open_session(recipe_from(recipe, teacher=teacher, **settings), output, overwrite=overwrite)
    require_measurable(session)
    _ = session.splits  # reads the text before the folder is made
    with output.work("calibrate") as work:
        importance = write_importance(work, session)
        output.publish(work)
    return Calibrated(output.path, {axis: list(scores.shape) for axis, scores in importance.items()})
