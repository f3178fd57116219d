"""Supervised tuning: a model is trained on the text itself, on the answers of chats alone."""

import math
import shutil
from pathlib import Path

from minitron.data.blocks import Blocks
from minitron.data.chats import Chat, transcript
from minitron.data.corpus import read_documents
from minitron.data.tokens import load_tokenizer, tokenise
from minitron.distillation.record import training_step
from minitron.distillation.trainer import Trainer
from minitron.errors import UserError, courtesy
from minitron.evaluation.answering import Answerer
from minitron.evaluation.generation import Sampling
from minitron.history import hub_id_of, record_step
from minitron.model.checkpoint import Checkpoint, open_checkpoint
from minitron.model.language_model import load_model
from minitron.progress import Progress
from minitron.recipe import DistillRecipe, Recipe
from minitron.session import Session

RATES = {"lora": 5e-4}
"""The peak learning rate by what is trained, where a recipe gives none."""
OTHER_RATE = 1e-4
NUM_ANSWERS, ANSWER_TOKENS = 3, 64
"""The number of held-out chats that a model answers before and after, and the tokens of an answer."""


def recipe_of_tuning(recipe: Recipe, train: Blocks) -> DistillRecipe:
    """Return the settings of the training loop for the epochs, the learning rate and the documents of `recipe.tune`."""
    tune, distill = recipe.tune, recipe.distill
    steps = max(1, math.ceil(tune.epochs * len(train) / distill.batch_size))
    tokens = steps * distill.batch_size * train.context
    rate = tune.learning_rate or RATES.get(distill.trains, OTHER_RATE)
    return distill.model_copy(update={"tokens": tokens, "learning_rate": rate, "documents": tune.documents})


def require_tunable(recipe: Recipe) -> None:
    """Check that a recipe sets nothing that tuning does not do.

    Raises:
        UserError: it names losses to a teacher or stored teacher outputs, sets a key that `tune` has in another place,
            or keeps adapters that are not trained.
    """
    distill = recipe.distill
    for name, is_set in (
        ("intermediate", bool(distill.intermediate.of)),
        ("teacher_states", distill.teacher_states is not None),
        ("correction", distill.correction.trains != "nothing"),
        ("on_policy", distill.on_policy.share > 0),
        ("quantize", distill.quantize is not None),
    ):
        if is_set:
            raise UserError(f"distill.{name} needs a teacher, and tune has none: distill on this data, or leave it out")
    defaults = DistillRecipe()
    for name, instead in (
        ("learning_rate", "tune.learning_rate"),
        ("documents", "tune.documents"),
        ("tokens", "tune.epochs"),
        ("skip_tokens", "the data itself"),
        ("label_weight", "minitron distill"),
        ("top_k", "minitron distill"),
        ("loss", "minitron distill"),
        ("temperature", "minitron distill"),
    ):
        if getattr(distill, name) != getattr(defaults, name):
            raise UserError(f"distill.{name} does not count in tune; what does: {instead}")
    if recipe.tune.keeps_adapter and distill.trains != "lora":
        raise UserError(f"tune.keeps_adapter needs distill.trains lora, not {distill.trains}")


def tune(session: Session, out: Path, work: Path) -> None:
    """Train the session's model on its splits and write a Hugging Face folder at `out`.

    `work` receives `metrics.jsonl` and `checkpoint/`, from which an interrupted run continues. The history in
    `out/minitron.json` holds answers to held-out chats before and after the training.

    Raises:
        UserError: see `Trainer.distill`.
        StoppedError: SIGINT or SIGTERM arrived; the last step is saved.
    """
    splits, model, recipe = session.splits, session.teacher, recipe_of_tuning(session.recipe, session.splits.train)
    chats = _heldout_chats(session)
    before = _answers(session, model, chats)
    adapter = work / "adapter" if session.recipe.tune.keeps_adapter else None
    trainer = Trainer(
        None, recipe, splits.train, session.runtime, work, splits.heldout, stage="tune",
        adapter=adapter, base=hub_id_of(model.folder) or str(model.folder),
    )  # fmt: skip
    trainer.distill(model, out)
    if not session.runtime.world.is_main:
        return
    after = _answers(session, open_checkpoint(out), chats)
    step = training_step(trainer, session, model.arch) | {"epochs": session.recipe.tune.epochs}
    pairs = zip(chats, before, after, strict=False)
    step["answers"] = [{"asked": _asked(chat), "before": one, "after": other} for chat, one, other in pairs]
    record_step(out, model.folder, step)
    if adapter is not None:
        shutil.move(adapter, out / "adapter")


def _heldout_chats(session: Session) -> list[Chat]:
    """Return the first chats of the data that end with an answer and lie within the held-out text."""
    chats: list[Chat] = []
    packing, num_tokens = session.packing(session.recipe.tune.documents), 0
    for document in read_documents(session.recipe.data, session.recipe.seed):
        [tokens] = tokenise([document], packing.tokenizer)
        num_tokens += packing.gap(num_tokens, len(tokens.ids)) + len(tokens.ids)
        if num_tokens > session.splits.heldout.num_tokens or len(chats) == NUM_ANSWERS:
            break
        if isinstance(document, Chat) and document.messages[-1]["role"] == "assistant":
            chats.append(document)
    return chats


def _answers(session: Session, checkpoint: Checkpoint, chats: list[Chat]) -> list[str]:
    """Return what a model answers greedily, in the main process; nothing where there are no chats."""
    answers: list[tuple[str, bool]] = []
    if chats and session.runtime.world.is_main:
        with courtesy("answers to held-out chats"), Progress("answer"):
            runtime, tokenizer = session.runtime, load_tokenizer(checkpoint.folder)
            model = load_model(checkpoint, runtime.device, runtime.dtype, runtime.attention)
            answerer = Answerer(model, tokenizer, Sampling(max_new_tokens=ANSWER_TOKENS))
            transcripts = [transcript(chat, tokenizer) for chat in chats]
            answers = answerer.answers([each.text[: each.spans[-1][0]] for each in transcripts], 0)
    return [answer for answer, _ in answers]


def _asked(chat: Chat) -> str:
    return str(chat.messages[-2].get("content", "")) if len(chat.messages) > 1 else ""
