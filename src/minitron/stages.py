"""What a stage does with its inputs, whether it runs alone or within `compress`."""

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from minitron.data.blocks import Blocks, load_tokenizer
from minitron.distillation.teacher import Learning, Live, Teacher, stored
from minitron.distillation.trainer import distill
from minitron.errors import UserError
from minitron.evaluation.continuation import PROMPT_TOKENS, continuation
from minitron.evaluation.perplexity import measure_perplexity
from minitron.files import (
    read_json,
    whole_file,
    whole_folder,
)
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint, open_safetensors
from minitron.model.language_model import load_model, read_head
from minitron.progress import Progress
from minitron.pruning.calibrate import STREAM_MOMENT
from minitron.pruning.cut import cut_to, write_pruned
from minitron.pruning.importance import Importance, score_shape
from minitron.pruning.repair import mended
from minitron.pruning.rounds import score_in_rounds
from minitron.recipe import DistillRecipe
from minitron.runtime import World, num_ranks
from minitron.session import Session


def write_statistics(folder: Path, inputs: Session, removed: set[int] | None = None) -> Importance:
    """`calibration.safetensors` and `importance.safetensors` of the inputs' teacher; its scores are returned.

    `removed` is how many layers may have to go (`Session.importance`).
    """
    importance = inputs.importance(removed)
    sums = {key: value for key, value in inputs.statistics.items() if key != STREAM_MOMENT}  # that goes with the scores
    for name, tensors in (("calibration", sums), ("importance", importance)):
        with whole_file(folder / f"{name}.safetensors") as staging:
            entries = {key: value.contiguous() for key, value in tensors.items()}
            save_file(entries, staging, metadata={"teacher": inputs.whole.identity()})
    return importance


def read_importance(path: Path, teacher: Checkpoint) -> Importance:
    """The scores in such a file, or in the folder that holds it.

    Raises:
        UserError: they are not this teacher's.
    """
    path = path / "importance.safetensors" if path.is_dir() else path
    file = open_safetensors(path)
    importance: Importance = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for axis in teacher.arch.prunable_axes:
        found = list(importance[axis].shape) if axis in importance else None
        if found != score_shape(teacher.arch, axis):
            raise UserError(f"{path} is not the importance of this teacher: axis {axis} has shape {found}")
    if (file.metadata() or {}).get("teacher") != teacher.identity():
        raise UserError(f"{path} is not the importance of this teacher: it was measured on other weights")
    return importance


def read_arch(path: Path, teacher: Arch) -> Arch:
    """The shape in an `arch.json`, checked to be one that the teacher can be cut to."""
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    values = read_json(path)
    arch = teacher.resized(
        **{
            key: size
            for key, size in values.items()
            if key not in {"model_type", *(teacher.flags.keys() - teacher.sizes.keys())}
        }
    )
    teacher.require_prunable_to(arch)
    return arch


def write_pruned_folder(
    inputs: Session, arch: Arch, importance: Importance, folder: Path, blocks: Blocks | None = None
) -> None:
    """What the inputs say is cut, cut to a shape and mended as the recipe says, as a Hugging Face folder.

    It is mended on `blocks`, by default those of the calibration.
    """
    teacher, recipe = inputs.whole, inputs.recipe.prune
    blocks = inputs.calibration_blocks if blocks is None else blocks
    if recipe.rounds > 1:
        importance = score_in_rounds(
            teacher, arch, importance, recipe.rounds, blocks, inputs.recipe.calibration,
            inputs.device, inputs.dtype, folder.parent,
        )  # fmt: skip
    with whole_folder(folder) as staging:
        write_pruned(
            teacher, cut_to(arch, teacher, importance, recipe),
            lambda cut: mended(teacher, cut, blocks, recipe, inputs.device, inputs.dtype), staging,
        )  # fmt: skip


def teacher_of(inputs: Session, pruned: Checkpoint, world: World) -> Teacher:
    """The teacher itself, or what was stored of it."""
    recipe, checkpoint = inputs.recipe.distill, inputs.teacher
    where = inputs.device if world.size == 1 else torch.device("cpu")
    if recipe.correction.trains != "nothing":
        # A model of its own: others go on measuring the teacher as it was.
        model = load_model(checkpoint, where, torch.promote_types(inputs.dtype, torch.float32))
        return Learning(model, recipe.correction, inputs.recipe.seed, world)
    if recipe.teacher_states is None:
        return Live(inputs.model if where == inputs.device else load_model(checkpoint, where, inputs.dtype))
    if recipe.stored == "top_k" and pruned.arch.axis_size("vocab") < checkpoint.arch.axis_size("vocab"):
        raise UserError("distill.stored top_k needs a student with all of the teacher's tokens")
    return stored_word(inputs, Path(recipe.teacher_states), inputs.splits.train, recipe, world)


def stored_word(inputs: Session, folder: Path, blocks: Blocks, recipe: DistillRecipe, world: World) -> Teacher:
    """What the teacher says of some blocks, from a folder, where it is stored first if it is not there."""
    identity = {
        "teacher": inputs.teacher.fingerprint(),
        "blocks": blocks.fingerprint(),
        "dtype": str(inputs.dtype),
    }
    head = read_head(inputs.teacher, inputs.device, inputs.dtype)
    return stored(folder, identity, lambda: inputs.model, head, blocks, recipe, world)


def train(inputs: Session, teacher: Teacher | None, pruned: Checkpoint, out: Path, work: Path, world: World) -> None:
    """`distillation.trainer.distill` on the inputs' text by their recipe."""
    distill(
        teacher, pruned, inputs.splits.train, inputs.splits.heldout, inputs.recipe.distill,
        out, work, inputs.recipe.seed, inputs.device, inputs.dtype, world,
    )  # fmt: skip


def measure(
    inputs: Session, checkpoint: Checkpoint, blocks: Blocks, stage: str, num_samples: int = 0
) -> dict[str, Any]:
    """Parameters, perplexity and speed of a model on some blocks, as `eval.json` has them.

    With `num_samples`, also how it goes on behind the beginnings of so many blocks, for people to read.
    """
    model = inputs.model if checkpoint is inputs.teacher else load_model(checkpoint, inputs.device, inputs.dtype)
    with Progress(stage, blocks.num_tokens) as progress:
        figures = measure_perplexity(model, blocks, progress.advance).to_dict()
    if num_samples:
        tokenizer = load_tokenizer(checkpoint.folder)
        prompts = blocks.ids[:num_samples, :PROMPT_TOKENS].split(1)
        figures["samples"] = [continuation(model, tokenizer, prompt) for prompt in prompts]
    return {
        "num_parameters": checkpoint.arch.num_parameters,
        "num_non_embedding_parameters": checkpoint.arch.num_non_embedding_parameters,
        **figures,
    }


def shape(arch: Arch) -> dict[str, Any]:
    """Sizes, and the exact count that follows from them."""
    return {"num_parameters": arch.num_parameters, "arch": arch.to_dict()}


def require_one_process() -> None:
    """See that torchrun did not start several.

    Raises:
        UserError: it did.
    """
    if num_ranks() > 1:
        raise UserError("only search, distill and correct run under torchrun; run this one in one process")


def require_one_vocabulary(teacher: Checkpoint, student: Checkpoint) -> None:
    """The same tokens under the same numbers; the models may have more entries than these, as padding.

    Raises:
        UserError: they are not.
    """
    tokens, of_student = (load_tokenizer(model.folder).get_vocab() for model in (teacher, student))
    if tokens != of_student:
        differing = len(tokens.items() ^ of_student.items())
        raise UserError(f"teacher and student have different tokenizers: {differing} tokens are not the same")
    smaller = min(model.arch.axis_size("vocab") for model in (teacher, student))
    if (highest := max(tokens.values(), default=0)) >= smaller:
        raise UserError(f"the tokenizer knows token {highest}, one of the models {smaller} tokens only")
