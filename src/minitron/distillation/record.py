"""What a training really did, for the history of the model that it made."""

from pathlib import Path
from typing import Any

from minitron.distillation.correction import RATE_WHILE_TEACHING, correction_rate
from minitron.distillation.optimizers import num_warmup_steps
from minitron.distillation.teacher import Learning, Live
from minitron.distillation.trainer import Trainer
from minitron.files import read_jsonl
from minitron.history import Step, history_of, record_step
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint
from minitron.run import versions
from minitron.session import Session


def write_training(
    folder: Path, trainer: Trainer, session: Session, trained: Checkpoint, member: str | None = None
) -> None:
    """Write the history of a trained model into its folder: that of the model `trained`, and this training.

    `member` is its name where a nested series was trained.
    """
    if session.runtime.world.is_main:
        record_step(folder, trained.folder, training_step(trainer, session, trained.arch, member))


def training_step(trainer: Trainer, session: Session, student: Arch, member: str | None = None) -> Step:
    """Return how a finished training was done, with the tokens that it processed and how many of them differ.

    A step without a teacher goes by the name of its stage, correct or tune: the model learnt the text itself.
    """
    recipe, train = trainer.recipe, trainer.train
    num_steps = recipe.num_steps(train.context)
    num_blocks = num_steps * recipe.batch_size
    rows = rows_of(trainer.work / "metrics.jsonl", member)
    perplexities = [row["heldout_perplexity"] for row in rows if "heldout_perplexity" in row]
    step: Step = {
        "step": trainer.stage if trainer.teacher is None else "distill",
        **(_matching(trainer, session, student) if trainer.teacher else {"of": session.recipe.teacher}),
        "trains": recipe.trains,
        "lora_rank": recipe.lora_rank if recipe.trains == "lora" else None,
        "lisa": [recipe.lisa_layers, recipe.lisa_steps] if recipe.trains == "lisa" else None,
        "neftune_alpha": recipe.neftune_alpha,
        "quantize": recipe.quantize,
        "learning_rate": recipe.learning_rate,
        "min_learning_rate": recipe.learning_rate * recipe.min_learning_rate_ratio,
        "schedule": recipe.schedule,
        "warmup_steps": num_warmup_steps(num_steps, recipe),
        "optimizer": recipe.optimizer,
        "data": session.recipe.data,
        "learns": "answers" if train.leaves_text_unlearnt else "all tokens",
        "chats": session.recipe.chats.share if session.mixes_chats else None,
        "documents": recipe.documents,
        "context": train.context,
        "batch_size": recipe.batch_size,
        "steps": num_steps,
        "series": _series(trainer, rows, member) if member else None,
        "steps_of_trial": sum("trial" in row for row in rows),
        "steps_skipped": sum("skipped" in row for row in rows),
        "tokens": num_blocks * train.context,
        "unique_tokens": min(num_blocks, len(train)) * train.context,
        "num_parameters": student.num_parameters,
        "dtype": ", then ".join(row["dtype"] for row in rows if "dtype" in row) or trainer.runtime.training_dtype,
        "device": trainer.runtime.device.type,
        "seed": trainer.runtime.seed,
        "versions": versions(),
    }
    if trainer.heldout and perplexities:
        step["heldout"] = {"tokens": trainer.heldout.num_tokens, "before": perplexities[0], "after": perplexities[-1]}
    return step


def rows_of(metrics: Path, member: str | None) -> list[dict[str, Any]]:
    """Return the rows of a training, or of a nested series those of one member."""
    return [row for row in read_jsonl(metrics) if row.get("member") == member]


def _series(trainer: Trainer, rows: list[dict[str, Any]], member: str) -> dict[str, Any]:
    """Return how a student was trained with others on shared weights."""
    weights = {each.name: round(each.weight, 4) for each in trainer.series}
    return {"member": member, "weights": weights, "steps": sum("learning_rate" in row for row in rows)}


def _matching(trainer: Trainer, session: Session, student: Arch) -> dict[str, Any]:
    """Return what the student was compared with, and how."""
    recipe, teacher = trainer.recipe, trainer.teacher
    compared, learning = trainer.compared(student), None
    if isinstance(teacher, Learning):
        rate = correction_rate(recipe.correction, RATE_WHILE_TEACHING)
        learning = {"trains": recipe.correction.trains, "learning_rate": rate}
    stored = f"stored {recipe.stored}" + (f" in {recipe.stored_dtype}" if recipe.stored == "hidden" else "")
    return {
        "teacher": session.recipe.teacher,
        "teacher_steps": history_of(session.teacher.folder).steps,
        "loss": recipe.loss,
        "beta": recipe.beta if recipe.loss == "jsd" else None,
        "temperature": recipe.temperature,
        "top_k": recipe.top_k,
        "label_weight": recipe.label_weight,
        "intermediate": compared.model_dump() if compared else None,
        "on_policy": recipe.on_policy.model_dump() if recipe.on_policy.share else None,
        "teacher_learns": learning,
        "teacher_outputs": "computed during training" if isinstance(teacher, Live) else stored,
    }
