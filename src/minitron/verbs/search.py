"""Find the best shape within a budget."""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron.errors import courtesy
from minitron.files import empty_folder, write_json
from minitron.verbs.results import Shaped

if TYPE_CHECKING:
    from minitron.recipe import RecipeSource


def search(
    teacher: str | Path, out: str | Path, *, recipe: "RecipeSource" = None, overwrite: bool = False, **settings: Any
) -> Shaped:
    """Write `arch.json`, `candidates.jsonl`, `search.json` and a plot for a teacher and a budget into the folder `out`.

    An interrupted search with equal inputs continues from a hidden folder within `out`. Under torchrun, candidates
    are split among the processes. See `calibrate` for `settings`.

    Raises:
        UserError: the budget is not understood, or no shape meets it.
    """
    from safetensors.torch import load_file

    from minitron import nas
    from minitron.output import Output
    from minitron.pruning import write_importance
    from minitron.recipe import recipe_from
    from minitron.reports.candidates import write_candidates_picture
    from minitron.verbs.workspace import open_session, resumable

    output = Output(Path(out).absolute(), "candidates.jsonl")
    session = open_session(
        recipe_from(recipe, teacher=teacher, **settings), output, overwrite=overwrite, one_process=False
    )
    shapes, budget = nas.shapes_within(session)
    with resumable(session, output, "search", []) as work:
        world, scores = session.runtime.world, work / "importance.safetensors"
        if world.is_main and not scores.exists():
            write_importance(work, session, nas.removed_layers(shapes))
        world.barrier()
        arch = nas.search(session, load_file(scores), shapes, budget, work)
        if world.is_main:
            found = work / "found"
            empty_folder(found)
            for name in ("candidates.jsonl", "search.json"):
                shutil.copyfile(work / name, found / name)
            write_json(found / "arch.json", arch.to_dict())
            with courtesy("candidates.svg"):
                write_candidates_picture(found)
            output.publish(found)
    return Shaped(output.path, arch)
