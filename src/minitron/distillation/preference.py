"""Preference training by trl: a model learns to prefer one answer to another, held to what it was before."""

import math
from pathlib import Path
from typing import Any

import torch

from minitron.data.chats import RefusedError, written
from minitron.data.preferences import Preference, turned_by_reward
from minitron.data.tokens import load_tokenizer
from minitron.distillation.trainer import write_trained
from minitron.errors import UserError
from minitron.files import write_jsonl
from minitron.history import Step, record_step
from minitron.model.language_model import load_model
from minitron.progress import Progress
from minitron.run import versions
from minitron.session import Session

HELDOUT_PART, MOST_HELDOUT = 8, 64
"""Held-out pairs are an eighth of all, at most 64."""
WARMUP_RATIO = 0.1
NUM_CHECKPOINTS = 10
FIGURES = ("rewards/accuracies", "rewards/margins", "logps/chosen", "logps/rejected")
"""What trl measures on held-out pairs, a reward being β times the gain in log-probability over the model before."""


def require_trl() -> None:
    """Check that trl is installed.

    Raises:
        UserError: it is not.
    """
    try:
        import trl  # noqa: F401
    except ImportError as error:
        raise UserError("prefer needs trl: pip install 'minitron[preference]'") from error


def prefer(session: Session, pairs: list[Preference], out: Path, work: Path) -> None:
    """Train the session's model on pairs of answers and write a Hugging Face folder at `out`.

    The reference is the model before: the log-probabilities that it gives the answers are computed once. `work`
    receives `metrics.jsonl` and `checkpoint/`, from which an interrupted run continues.

    Raises:
        UserError: a prompt leaves no room for an answer, or a device is asked for that trl does not train on.
    """
    recipe, model = session.recipe.prefer, session.teacher
    _require_room(pairs, load_tokenizer(model.folder), session.context)
    num_heldout = max(1, min(MOST_HELDOUT, len(pairs) // HELDOUT_PART))
    heldout, train = pairs[:num_heldout], pairs[num_heldout:]
    steps, read = max(1, math.ceil(recipe.epochs * len(train) / recipe.batch_size)), train
    if recipe.reward_scale is not None:  # drawn again in every epoch
        read = turned_by_reward(train * math.ceil(recipe.epochs), recipe.reward_scale, session.runtime.seed)
    trainer, loaded = _trainer(session, (read, heldout), steps, work / "checkpoint")
    with Progress("measure pairs", len(heldout), "pairs"):
        before = _figures(trainer.evaluate())
    complete = (path.parent for path in (work / "checkpoint").glob("checkpoint-*/trainer_state.json"))
    saved = sorted(complete, key=lambda path: int(path.name.rpartition("-")[-1]))
    with Progress("prefer", steps, "steps") as progress:
        trainer.add_callback(_callback(progress))
        trainer.train(resume_from_checkpoint=str(saved[-1]) if saved else None)
    with Progress("measure pairs", len(heldout), "pairs"):
        after = _figures(trainer.evaluate())
    write_jsonl(work / "metrics.jsonl", [row for row in trainer.state.log_history if "loss" in row])
    write_trained(loaded, model, out, session.runtime.world)
    step: Step = {
        "step": "prefer", "of": session.recipe.teacher, "data": session.recipe.data, "loss": list(recipe.loss),
        "beta": recipe.beta, "reward_scale": recipe.reward_scale, "learning_rate": recipe.learning_rate,
        "batch_size": recipe.batch_size, "steps": steps,
        "context": session.context, "pairs": len(train), "heldout_pairs": len(heldout), "before": before,
        "after": after, "dtype": session.runtime.training_dtype, "device": session.runtime.device.type,
        "seed": session.runtime.seed, "versions": versions() | {"trl": _version()},
    }  # fmt: skip
    record_step(out, model.folder, step)


def _require_room(pairs: list[Preference], tokenizer: Any, context: int) -> None:
    """Check that answers fit after their prompts; trl would leave such pairs out without a word.

    Raises:
        UserError: some do not, or the chat template refuses a prompt.
    """
    too_long = 0
    for pair in pairs:
        text = pair.to_row(has_template=False)["prompt"]
        if tokenizer.chat_template:
            try:
                text = written(tokenizer, list(pair.prompt), adds_prompt=True)
            except RefusedError as error:
                raise UserError(f"the chat template cannot write a prompt: {error}") from error
        too_long += len(tokenizer(text, add_special_tokens=False).input_ids) >= context
    if too_long:
        raise UserError(
            f"{too_long} of {len(pairs)} pairs have a prompt of {context} tokens or more, which leaves no room for an "
            "answer: raise --context, or leave them out"
        )


def _trainer(
    session: Session, pairs: tuple[list[Preference], list[Preference]], steps: int, folder: Path
) -> tuple[Any, Any]:
    """Return trl's trainer for all steps, and the model that it trains."""
    from datasets import Dataset, disable_progress_bars
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    recipe, runtime, distill = session.recipe.prefer, session.runtime, session.recipe.distill
    micro = math.gcd(recipe.batch_size, distill.micro_batch_size)
    renamed = "activation_checkpointing" in DPOConfig.__dataclass_fields__  # by later releases of transformers
    checkpointing = "activation_checkpointing" if renamed else "gradient_checkpointing"
    args = DPOConfig(
        output_dir=str(folder), max_steps=steps, learning_rate=recipe.learning_rate, lr_scheduler_type="cosine",
        warmup_steps=round(WARMUP_RATIO * steps), per_device_train_batch_size=micro, per_device_eval_batch_size=micro,
        gradient_accumulation_steps=recipe.batch_size // micro, beta=recipe.beta, loss_type=list(recipe.loss),
        max_length=session.context, precompute_ref_log_probs=True, bf16=runtime.dtype == torch.bfloat16,
        use_cpu=runtime.device.type == "cpu", **{checkpointing: distill.activation_checkpointing},
        seed=runtime.seed, save_steps=max(1, steps // NUM_CHECKPOINTS), save_total_limit=1, logging_steps=1,
        report_to=[], disable_tqdm=True,
    )  # fmt: skip
    if args.device != runtime.device and runtime.device.index not in (None, args.device.index):
        raise UserError(f"--device {runtime.device}: trl trains on the first GPU; CUDA_VISIBLE_DEVICES chooses it")
    args._n_gpu = min(1, args.n_gpu)  # several would need processes of their own
    loaded = load_model(session.teacher, runtime.device, torch.float32, runtime.attention)
    tokenizer = load_tokenizer(session.teacher.folder)
    datasets = [
        Dataset.from_list([pair.to_row(has_template=bool(tokenizer.chat_template)) for pair in part]) for part in pairs
    ]
    trainer = DPOTrainer(
        loaded, args=args, train_dataset=datasets[0], eval_dataset=datasets[1], processing_class=tokenizer
    )
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    return trainer, loaded


def _callback(progress: Progress) -> Any:
    from transformers import TrainerCallback

    class Advance(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            progress.advance(1)

    return Advance()


def _figures(measured: dict[str, float]) -> dict[str, float]:
    return {name.rpartition("/")[-1] if "rewards" in name else name: measured[f"eval_{name}"] for name in FIGURES}


def _version() -> str:
    from importlib.metadata import version

    return version("trl")
