"""Pruning: score every part of a model, select what stays, slice the tensors, repair what is left, and write it."""

from pathlib import Path

from safetensors.torch import save_file

from minitron.data.blocks import Blocks, load_tokenizer
from minitron.errors import UserError
from minitron.files import whole_file, whole_folder
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint, open_safetensors
from minitron.pruning.calibrate import STREAM_MOMENT, Statistics, calibrate
from minitron.pruning.cut import cut_to, write_pruned
from minitron.pruning.depth import score_depth
from minitron.pruning.importance import Importance, score, score_shape
from minitron.pruning.repair import mended
from minitron.pruning.rotate import turns
from minitron.pruning.rounds import score_in_rounds
from minitron.session import Session

__all__ = ["Importance", "measure_importance", "prune", "read_importance", "write_importance"]


def prune(session: Session, arch: Arch, importance: Importance, out: Path, *, blocks: Blocks | None = None) -> None:
    """Cut the session's model to a shape, repair it as the recipe says, and write a Hugging Face folder at `out`.

    Repairs are fitted on `blocks`, by default the calibration blocks.

    Raises:
        UserError: the recipe asks for something that the family cannot have, or there are too few calibration tokens.
    """
    teacher, recipe, runtime = session.source, session.recipe.prune, session.runtime
    blocks = session.calibration_blocks if blocks is None else blocks
    if recipe.rounds > 1:
        importance = score_in_rounds(
            teacher, arch, importance, recipe.rounds, blocks, session.recipe.calibration,
            runtime.device, runtime.dtype, out.parent,
        )  # fmt: skip
    with whole_folder(out) as staging:
        write_pruned(
            teacher, cut_to(arch, teacher, importance, recipe),
            lambda cut: mended(teacher, cut, blocks, recipe, runtime.device, runtime.dtype), staging,
        )  # fmt: skip


def measure_importance(session: Session, removed: set[int] | None = None) -> tuple[Statistics, Importance]:
    """Run the session's model over its calibration blocks; return the statistics and the scores of every axis.

    Other scores of depth than block influence are measured for every number of layers in `removed`, by default for
    up to half of the layers.

    Raises:
        UserError: the calibration text is one token repeated, or an activation is NaN or infinite.
    """
    blocks, recipe, arch, runtime = session.calibration_blocks, session.recipe, session.source.arch, session.runtime
    if len(tokens := blocks.ids.unique()) < 2:
        raise UserError(f"the calibration text holds token {int(tokens)} alone: is it nothing but padding?")
    moment = turns(arch, recipe.prune)
    statistics = calibrate(session.source, blocks, recipe.calibration, runtime.device, runtime.dtype, moment)
    importance, depth = score(statistics, arch, recipe.calibration), recipe.depth
    if depth.score == "block_influence" and depth.removal == "one_shot":
        return statistics, importance
    tokenizer = load_tokenizer(session.teacher.folder) if depth.score == "task" else None
    blocks = blocks[: max(1, depth.tokens // session.context)]
    removed = set(range(1, arch.axis_size("layer") // 2 + 1)) if removed is None else removed
    with session.source_model() as model:
        return statistics, importance | score_depth(model, arch, blocks, depth, removed, tokenizer)


def write_importance(folder: Path, session: Session, removed: set[int] | None = None) -> Importance:
    """Write `calibration.safetensors` and `importance.safetensors` into a folder; return the scores.

    See `measure_importance` for `removed` and the errors.
    """
    statistics, importance = measure_importance(session, removed)
    sums = {key: value for key, value in statistics.items() if key != STREAM_MOMENT}  # stored with the scores
    for name, tensors in (("calibration", sums), ("importance", importance)):
        with whole_file(folder / f"{name}.safetensors") as staging:
            entries = {key: value.contiguous() for key, value in tensors.items()}
            save_file(entries, staging, metadata={"teacher": session.source.identity()})
    return importance


def read_importance(path: Path, teacher: Checkpoint) -> Importance:
    """Read the scores that `write_importance` wrote, from the file or from the folder that holds it.

    Raises:
        UserError: the scores were measured on another model.
    """
    path = path / "importance.safetensors" if path.is_dir() else path
    file = open_safetensors(path)
    importance: Importance = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for axis in teacher.arch.prunable_axes:
        shape = list(importance[axis].shape) if axis in importance else None
        if shape != score_shape(teacher.arch, axis):
            raise UserError(f"{path} is not the importance of this teacher: axis {axis} has shape {shape}")
    if (file.metadata() or {}).get("teacher") != teacher.identity():
        raise UserError(f"{path} is not the importance of this teacher: it was measured on other weights")
    return importance
