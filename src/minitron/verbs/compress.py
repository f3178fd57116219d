"""The main job: a teacher and a budget in, a student, its figures and a report out."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron.model.arch import Arch
from minitron.verbs.results import Compressed, CompressedSeries

if TYPE_CHECKING:
    from minitron.recipe import RecipeSource


def compress(
    teacher: str | Path, out: str | Path, *, recipe: "RecipeSource" = None, overwrite: bool = False, **settings: Any
) -> Compressed | CompressedSeries:
    """Search for a shape, prune, distil and evaluate, in the run directory `out`; called again, it continues.

    `settings` are keys of the recipe, such as `target_params=0.7`, `data="wiki"` or `distill={"tokens": "2M"}`;
    `recipe` is a YAML file or the name of a recipe, which they override. Several `target_params` make a series, each
    student cut out of the next larger one; so do the `stages` of a recipe. With `lineage.nested` they share weights and
    are trained together.

    Raises:
        UserError: something asked for cannot be done; nothing is left behind that was not finished.
    """
    from minitron import nested, pipeline, series
    from minitron.recipe import recipe_from

    out, given = Path(out).absolute(), recipe_from(recipe, teacher=teacher, **settings)
    if isinstance(given.target_params, tuple) or given.stages or given.lineage.nested:
        make = nested.compress_nested if given.lineage.nested else series.compress_series
        members = make(given, out, overwrite)
        results = {name: _result(out / name, figures) for name, figures in members.items() if "student" in figures}
        corrected = {name: figures for name, figures in members.items() if "corrected" in figures}
        return CompressedSeries(out, results, corrected)
    return _result(out, pipeline.compress(given, out, overwrite))


def _result(out: Path, figures: dict[str, Any]) -> Compressed:
    from minitron.model.config import config_values

    student = out / "student"
    return Compressed(out, student, Arch.from_config(config_values(student)), figures)
