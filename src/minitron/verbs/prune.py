"""Cut a teacher to a shape, without training it."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from minitron.errors import UserError
from minitron.files import read_json, require_space
from minitron.verbs.results import Shaped

if TYPE_CHECKING:
    from minitron.recipe import RecipeSource
    from minitron.verbs.inspect import DryRun


def prune(
    teacher: str | Path,
    out: str | Path | None = None,
    *,
    arch: str | Path | None = None,
    importance: str | Path | None = None,
    random: bool = False,
    recipe: "RecipeSource" = None,
    overwrite: bool = False,
    **settings: Any,
) -> "Shaped | DryRun":
    """Write a pruned Hugging Face folder at `out`; without `out`, say what shape would come out.

    The shape is given by sizes among the `settings` (`hidden_size=448`), by an `arch.json`, or by a budget
    (`target_params=0.7`), within which the best shape is searched for. Importance is read from a folder that
    `calibrate` wrote, or measured on the recipe's data. Other `settings` are keys of the recipe. With `random` a model
    of that shape is written whose weights are random, which pruned models are compared with.

    Raises:
        UserError: several of these are given, or the shape cannot be cut out of the teacher.
    """
    from minitron import nas, pruning
    from minitron.history import record_step
    from minitron.output import Output
    from minitron.pruning import how_measured, measure_importance, read_how_measured, read_importance
    from minitron.recipe import recipe_from
    from minitron.verbs.inspect import dry_run, read_arch, split_sizes
    from minitron.verbs.workspace import open_session

    given = {**settings, "recipe": recipe}
    sizes, settings = split_sizes(settings)
    if sum(map(bool, (sizes, arch, settings.get("target_params")))) > 1:
        raise UserError("give sizes, --arch or --target-params, not several of them")
    if out is None:
        return dry_run(teacher, given, arch)
    output = Output(Path(out).absolute(), "config.json")
    session = open_session(recipe_from(recipe, teacher=teacher, **settings), output, overwrite=overwrite)
    source, chosen = session.source, None
    if arch:
        chosen = read_arch(Path(arch), source.arch)
    elif sizes := sizes or session.recipe.shape:
        chosen = source.arch.resized(**sizes)
        source.arch.require_prunable_to(chosen)
    else:
        shapes, budget = nas.shapes_within(session)
    if is_given := chosen is not None:
        nas.check_shape(session, chosen)
    require_space(output.path, source.num_bytes)
    removed = (
        nas.removed_layers(shapes) if chosen is None else {source.arch.axis_size("layer") - chosen.axis_size("layer")}
    )
    with output.work("prune") as work:
        scores: pruning.Importance = {}
        if importance:
            scores = read_importance(Path(importance), session)
        elif not (random and is_given) or nas.ranks_together(session):
            scores = measure_importance(session, removed)
        if chosen is None:
            with TemporaryDirectory() as folder:
                chosen = nas.search(session, scores, shapes, budget, Path(folder))
        elif sizes:
            chosen = nas.ranked_shape(session, scores, sizes)
        measured = None
        if not random:
            measured = read_how_measured(Path(importance)) if importance else how_measured(session)
        session = pruning.over_vocabulary(session, chosen.axis_size("vocab"))
        source = session.source
        write = pruning.write_random if random else pruning.prune
        step = write(session, chosen, scores, work / "pruned")
        if not random:
            step["measured"] = measured
        record_step(work / "pruned", source.folder, step)
        if is_given:
            nas.warn_of_order(source, chosen, read_json(work / "pruned" / "config.json"))
        output.publish(work / "pruned")
    return Shaped(output.path, chosen, random_seed=session.runtime.seed if random else None)
