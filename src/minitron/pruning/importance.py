"""Measures importance, and writes and reads the files that hold it."""

import json
import logging
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from minitron.data.tokens import load_tokenizer
from minitron.errors import UserError
from minitron.files import whole_file
from minitron.model.arch import Arch
from minitron.model.weights import open_safetensors
from minitron.pruning.calibrate import calibrate
from minitron.pruning.depth import require_depth_score, require_removable, score_depth
from minitron.pruning.other_text import other_text, require_memory_to_write
from minitron.pruning.rotate import rotates
from minitron.pruning.scores import SCORED_AS, Importance, require_width_scores, score
from minitron.pruning.selection import score_shape
from minitron.pruning.statistics import STREAM_MOMENT, Statistics
from minitron.recipe import Recipe
from minitron.session import Session

logger = logging.getLogger(__name__)


def require_scores(recipe: Recipe) -> None:
    """Check that the scores that a recipe names exist, before any work.

    Raises:
        UserError: one does not; the message lists those that do.
    """
    require_width_scores(recipe.calibration)
    require_depth_score(recipe.depth)


def measure_importance(session: Session, removed: set[int] | None = None) -> Importance:
    """Score every axis of the session's model on its calibration blocks.

    Scores of depth other than block influence are measured for every number of layers in `removed`, by default for
    up to half of the layers.

    Raises:
        UserError: all calibration tokens are equal, an activation is NaN or infinite, or the recipe names a score that
            does not exist or does not suit the model.
    """
    return _measure(session, removed)[1]


DEPTH_SETTINGS = ("score", "removal", "task")
"""The settings of `depth` that decide the scores of layers, apart from the amount of text."""


def write_importance(folder: Path, session: Session, removed: set[int] | None = None) -> Importance:
    """Write `calibration.safetensors` and `importance.safetensors` into a folder; return the importance.

    The files record how it was measured. See `measure_importance` for `removed` and the errors.
    """
    statistics, importance = _measure(session, removed)
    sums = {key: value for key, value in statistics.items() if key != STREAM_MOMENT}  # stored with the scores
    metadata = {"teacher": session.source.identity(), "measured": json.dumps(how_measured(session))}
    for name, tensors in (("calibration", sums), ("importance", importance)):
        with whole_file(folder / f"{name}.safetensors") as staging:
            entries = {key: value.contiguous() for key, value in tensors.items()}
            save_file(entries, staging, metadata=metadata)
    return importance


def read_importance(path: Path, session: Session) -> Importance:
    """Read what `write_importance` wrote of the session's model, from the file or from the folder that holds it.

    A file of an earlier version, which does not record its settings, is read with a warning.

    Raises:
        UserError: the importance was measured on another model, or with other scores than those of the recipe.
    """
    teacher, path = session.source, _file(path)
    file = open_safetensors(path)
    importance: Importance = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for axis in teacher.arch.prunable_axes:
        shape = list(importance[axis].shape) if axis in importance else None
        if shape != score_shape(teacher.arch, axis):
            raise UserError(f"{path} is not the importance of this teacher: axis {axis} has shape {shape}")
    metadata = file.metadata() or {}
    if metadata.get("teacher") != teacher.identity():
        raise UserError(f"{path} is not the importance of this teacher: it was measured on other weights")
    if (recorded := read_how_measured(path)) is None:
        logger.warning("%s does not record the settings that it was measured with", path)
        return importance
    measured = {f"calibration.{key}": value for key, value in recorded["scores"].items()}
    measured |= {f"depth.{key}": value for key, value in recorded["depth"].items()}
    measured.setdefault("calibration.other_text", "random")  # as in earlier versions
    for key, wanted in _scoring_settings(session.recipe, teacher.arch).items():
        if measured.get(key) != wanted:
            before = measured.get(key) or "null"
            raise UserError(
                f"{path} was measured with {key} {before}, and {wanted or 'null'} is asked for: "
                f"calibrate again, or give --set {key}={before}"
            )
    return importance


def _scoring_settings(recipe: Recipe, arch: Arch) -> dict[str, str | None]:
    """Return the settings that decide what is scored and how in a model of this shape, by dotted key."""
    scored = {SCORED_AS.get(axis, axis) for axis in arch.prunable_axes} | ({"mamba"} if "mhead" in arch.axes else set())
    settings = {
        f"calibration.{key}": value
        for key, value in recipe.calibration.model_dump(exclude={"tokens"}).items()
        if not key.endswith("_scores") or key.removesuffix("_scores") in scored
    }
    if not rotates(arch, recipe.prune):
        del settings["calibration.other_text"]
    return settings | {f"depth.{key}": getattr(recipe.depth, key) for key in DEPTH_SETTINGS}


def how_measured(session: Session) -> dict[str, Any]:
    """Return on which data and with which scores `measure_importance` measures, for the history of a pruned model."""
    recipe, blocks = session.recipe, session.calibration_blocks
    return {
        "data": recipe.data,
        "tokens": blocks.num_tokens,
        "context": blocks.context,
        "seed": recipe.seed,
        "scores": recipe.calibration.model_dump(exclude={"tokens"}),
        "depth": recipe.depth.model_dump(),
    }


def read_how_measured(path: Path) -> dict[str, Any] | None:
    """Return how the importance in a file, or in the folder that holds it, was measured; None: it is not recorded."""
    measured = (open_safetensors(_file(path)).metadata() or {}).get("measured")
    return None if measured is None else dict(json.loads(measured))


def _file(path: Path) -> Path:
    return path / "importance.safetensors" if path.is_dir() else path


def require_measurable(session: Session) -> None:
    """Check that the model can be scored as the recipe says, before its text is read.

    Raises:
        UserError: the recipe asks for a rotation or a removal of layers that the family cannot have, or the memory does
            not hold a model that has to write text.
    """
    if rotates(session.source.arch, session.recipe.prune):
        require_memory_to_write(session.source, session.recipe.calibration, session.runtime)
    require_removable(session.source.arch, session.recipe.depth)


def _measure(session: Session, removed: set[int] | None) -> tuple[Statistics, Importance]:
    require_measurable(session)
    blocks, recipe, source = session.calibration_blocks, session.recipe, session.source
    if len(tokens := blocks.ids.unique()) < 2:
        raise UserError(f"the calibration text holds only token {int(tokens)}: is it nothing but padding?")
    others = None
    if rotates(source.arch, recipe.prune):
        others = other_text(source, blocks, recipe=recipe.calibration, runtime=session.runtime)
    statistics = calibrate(source, blocks, recipe=recipe.calibration, runtime=session.runtime, others=others)
    importance = score(statistics, source, recipe.calibration)
    if recipe.depth.score == "block_influence" and recipe.depth.removal == "one_shot":
        return statistics, importance
    tokenizer = load_tokenizer(session.teacher.folder) if recipe.depth.score == "task" else None
    blocks = blocks[: max(1, recipe.depth.tokens // session.context)]
    removed = set(range(1, source.arch.axis_size("layer") // 2 + 1)) if removed is None else removed
    with session.source_model() as model:
        layers = score_depth(model, source.arch, blocks, recipe=recipe.depth, removed=removed, tokenizer=tokenizer)
    return statistics, importance | layers
