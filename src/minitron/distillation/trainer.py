"""The training loop: a student learns a teacher's next-token distribution, or the text itself.

The state of a run is the step, the student and the optimizer; the blocks of a step follow from the seed and the step.
A run that is killed continues from its last checkpoint to bit-identical results (on a CPU).
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron.data.blocks import Blocks
from minitron.data.tokens import load_tokenizer
from minitron.distillation.checkpoint import Models, load_checkpoint, save_checkpoint, saved_step
from minitron.distillation.correction import RATE_WHILE_TEACHING, correction_rate
from minitron.distillation.intermediate import Intermediate, compare_on_the_way, pairs_compared
from minitron.distillation.metrics import Metrics, is_measured, require_trackers
from minitron.distillation.nested import Member, Nested, drawn
from minitron.distillation.noise import add_noise
from minitron.distillation.objective import Objective
from minitron.distillation.on_policy import OnPolicy, continued
from minitron.distillation.optimizers import learning_rate, make_optimizer, take_step
from minitron.distillation.parallel import lighten, shard, whole
from minitron.distillation.parameters import Trained, choose_parameters
from minitron.distillation.rounding import require_roundable, simulate_rounding
from minitron.distillation.teacher import Learning, Live, SpelledLive, Teacher
from minitron.errors import UserError, courtesy
from minitron.evaluation.generation import PROMPT_TOKENS, greedy_continuation
from minitron.evaluation.perplexity import measure_perplexity
from minitron.files import whole_folder
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint
from minitron.model.language_model import Headless, attention_in_training, load_model
from minitron.model.writing import write_model
from minitron.progress import Progress
from minitron.recipe import DistillRecipe, IntermediateRecipe
from minitron.runtime import Runtime, World, stop_on_signals

MOST_SKIPPED = 10
"""The number of consecutive steps without a finite loss and gradient, all of them skipped, that ends the run."""
NUM_EVALUATIONS = 5
"""The number of measurements of held-out perplexity along the way, in addition to the one before the first step."""


@dataclass
class Student:
    """A pruned model in memory while it is trained."""

    headless: Headless
    checkpoint: Checkpoint
    """The pruned model on disk."""
    trained: Trained
    """How its parameters are trained."""
    nested: tuple[Nested, ...] = ()
    """Smaller students that are the beginnings of this one."""

    def of_step(self, step: int, series: tuple[Member, ...], seed: int) -> tuple[Headless, str | None]:
        """Return the model that a step trains, and its name within a nested series."""
        if not series:
            return self.headless, None
        number = drawn(step, [member.weight for member in series], seed)
        return (self.headless, *self.nested)[number], series[number].name


@dataclass(frozen=True)
class Trainer:
    """Trains students on a teacher's outputs over one text, or without a teacher on the text alone.

    `work` receives `metrics.jsonl`, one row per step, and `checkpoint/`, from which a killed run continues and which
    the caller may remove once the student is safe. Weights train in float32; the runtime's dtype is that of forward
    passes.
    """

    teacher: Teacher | None
    recipe: DistillRecipe
    train: Blocks
    runtime: Runtime
    work: Path
    heldout: Blocks | None = None
    """Blocks whose perplexity is measured along the way; None: nothing is measured."""
    stage: str = "distill"
    """The name of the progress line."""
    adapter: Path | None = None
    """A folder for the adapters that were trained, besides merging them into the student."""
    base: str = ""
    """The path or hub id of the model that these adapters belong to."""
    series: tuple[Member, ...] = ()
    """Students that are the beginnings of each other and share weights, largest first; empty for one student alone."""

    def distill(self, pruned: Checkpoint, out: Path) -> None:
        """Train a pruned model for all steps of the recipe and write the student to the folder `out`.

        Raises:
            UserError: see `require_trainable`; or ten steps in a row had no finite loss and gradient.
            StoppedError: SIGINT or SIGTERM arrived; the checkpoint is that of the last step.
        """
        require_trainable(self.recipe, pruned.arch, self.runtime.dtype, num_ranks=self.runtime.world.size)
        student = self.trained(pruned)
        if self.adapter is not None:
            student.trained.save_adapter(self.adapter, self.base)
        student.trained.finish()
        write_trained(student.headless.model, pruned, out, self.runtime.world)

    def distill_nested(self, outs: list[Path]) -> None:
        """Train the members of the series together and write each as a student to a folder of `outs`; see `distill`."""
        student = self.trained(self.series[0].pruned)
        write_trained(student.headless.model, self.series[0].pruned, outs[0], self.runtime.world)
        for nested, out in zip(student.nested, outs[1:], strict=True):
            with torch.no_grad():
                write_state(nested.model, nested.tensors(), nested.member.pruned, out)

    def trained(self, pruned: Checkpoint, until: int | None = None) -> Student:
        """Return the student in memory after all steps; with `until`, after that step, with a checkpoint on disk.

        The rows of `metrics.jsonl` are marked as those of a trial then.

        Raises:
            UserError: ten steps in a row had no finite loss and gradient.
            StoppedError: SIGINT or SIGTERM arrived; the checkpoint is that of the last step.
        """
        recipe, runtime = self.recipe, self.runtime
        # Evaluation mode throughout: dropout has no place in matching another model's outputs.
        attention = attention_in_training(pruned.arch, recipe.micro_batch_size, self.train.context, runtime)
        headless = Headless(load_model(pruned, runtime.loading_device, runtime.weights_dtype, attention))
        if recipe.quantize is not None:
            simulate_rounding(headless.model, pruned, recipe.quantize)
        intermediate = self._intermediate(headless, pruned)
        student = Student(headless, pruned, choose_parameters(headless.model, pruned.arch, recipe, runtime.seed))
        student.nested = tuple(
            Nested(
                member, headless, load_model(member.pruned, runtime.loading_device, runtime.weights_dtype, attention)
            )
            for member in self.series[1:]
        )
        lighten(headless, pruned.arch, recipe)
        shard(headless, pruned.arch, runtime)
        if isinstance(self.teacher, Live):
            lighten(self.teacher.headless, self.teacher.arch, recipe)
            teacher, arch = self.teacher.headless, self.teacher.arch
            shard(teacher, arch, runtime, is_teacher=True)
        if recipe.neftune_alpha is not None:
            add_noise(headless.model.get_input_embeddings(), recipe.neftune_alpha)  # type: ignore[operator]
        models: Models = {"student": (headless, make_optimizer(headless, recipe))}
        if isinstance(self.teacher, Learning):
            teacher = self.teacher.headless
            models["teacher"] = teacher, make_optimizer(teacher, recipe)
        _Loop(self, student, models, Objective(self.teacher, recipe, runtime, intermediate)).run(until)
        return student

    def compared(self, pruned: Arch) -> IntermediateRecipe | None:
        """Return the losses inside the layers, with what is compared and where; None: there are none.

        Raises:
            UserError: the recipe names some, and the teacher is not in memory.
        """
        recipe = self.recipe.intermediate
        if not isinstance(self.teacher, Live) or isinstance(self.teacher, SpelledLive):
            if recipe.of:
                raise UserError("distill.intermediate needs the teacher in memory, not stored teacher outputs")
            return None
        depths = self.teacher.arch.axis_size("layer"), pruned.axis_size("layer")
        if not (kinds := recipe.compared(*depths)):
            return None
        return recipe.model_copy(update={"of": kinds, "layers": pairs_compared(recipe, self.teacher.arch, pruned)})

    def _intermediate(self, student: Headless, pruned: Checkpoint) -> Intermediate | None:
        recipe = self.compared(pruned.arch)
        if recipe is None or not isinstance(self.teacher, Live):
            return None
        model, arch = self.teacher.headless.model, self.teacher.arch
        return compare_on_the_way(model, arch, student, pruned.arch, recipe, self.runtime.device)


@dataclass
class _Loop:
    """One student's way through the steps."""

    trainer: Trainer
    student: Student
    models: Models
    objective: Objective
    step: int = 0
    is_trial: bool = field(default=False, init=False)
    metrics: Metrics = field(init=False)

    def run(self, until: int | None) -> None:
        """Take steps up to `until`, by default all; save checkpoints on the way and when asked to stop."""
        trainer, world = self.trainer, self.trainer.runtime.world
        last, self.is_trial = self.num_steps if until is None else until, until is not None
        # A training that continues a trial is measured from the pruned model on as well, before its state is read.
        start = self._evaluate(trainer.heldout) if trainer.heldout and not is_measured(trainer.work) else []
        self._begin(max(0, saved_step(trainer.work, world) - 1))
        self.step = load_checkpoint(trainer.work, self.models, world)
        self.metrics = Metrics(trainer.work, self.step, trainer.recipe.trackers, world, start)
        tokens = last * self.step_tokens
        with (
            Progress(trainer.stage, tokens, done=self.step * self.step_tokens) as progress,
            stop_on_signals() as request,
        ):
            saved_at = time.monotonic()
            while self.step < last:
                self._take_step(progress)
                is_stopping = world.agree(request.signal_number is not None)
                is_due = is_stopping or self.step == last
                if (self.is_trial or self.step < self.num_steps) and (
                    is_due or world.agree(time.monotonic() - saved_at >= trainer.recipe.checkpoint_seconds)
                ):
                    save_checkpoint(trainer.work, self.models, self.step, world, is_trial=self.is_trial)
                    saved_at = time.monotonic()
                if self.step < last and is_stopping:
                    request.stop()

    @property
    def step_tokens(self) -> int:
        """Tokens per step."""
        return self.trainer.recipe.batch_size * self.trainer.train.context

    @property
    def num_steps(self) -> int:
        """Steps of the whole training."""
        return self.trainer.recipe.num_steps(self.trainer.train.context)

    def _take_step(self, progress: Progress) -> None:
        """Take one step of the student, and of a teacher that learns; write a row of metrics."""
        recipe, train = self.trainer.recipe, self.trainer.train
        headless, optimizer = self.models["student"]
        trained, name = self.student.of_step(self.step, self.trainer.series, self.trainer.runtime.seed)
        rate = learning_rate(self.step, self.num_steps, recipe)
        self._begin(self.step)
        numbers = batch_indices(self.step, recipe.batch_size, len(train), self.trainer.runtime.seed)
        blocks, objective = train[numbers], self.objective
        on_policy = OnPolicy(objective, recipe, self.num_steps)
        if length := on_policy.length(self.step, train.context):
            with self.trainer.runtime.autocast():
                blocks = continued(headless.model, blocks, length)
            numbers, objective = torch.arange(len(blocks)), on_policy.objective_of(length, train.context)
        sums = objective.accumulate(trained, blocks, numbers)
        loss, intermediate_loss, added_loss, teacher_loss = self.trainer.runtime.world.sum(sums).tolist()
        norm = take_step(headless, optimizer, rate, recipe.max_grad_norm, loss)
        is_finite = math.isfinite(loss) and math.isfinite(norm)
        self.step += 1
        row: dict[str, Any] = {"step": self.step, "tokens": self.step * self.step_tokens, "learning_rate": rate}
        if self.trainer.runtime.training_dtype != self.metrics.last("dtype"):  # the first step here, or on this machine
            row["dtype"] = self.trainer.runtime.training_dtype
        if self.is_trial:
            row["trial"] = True
        if name:
            row["member"] = name
        if length:
            row["continued_by"] = length
        row |= {"loss": loss, "grad_norm": norm} if is_finite else {"skipped": f"loss {loss}, gradient {norm}"}
        if self.objective.intermediate and is_finite:
            weight = added_loss / intermediate_loss if intermediate_loss else 0.0
            row |= {"intermediate_loss": intermediate_loss, "intermediate_weight": weight}
        if "teacher" in self.models:
            share = correction_rate(recipe.correction, RATE_WHILE_TEACHING) / recipe.learning_rate
            take_step(*self.models["teacher"], rate * share, recipe.max_grad_norm, teacher_loss)
            row["teacher_loss"] = teacher_loss
        progress.advance(self.step_tokens)
        if self.trainer.heldout and self.step in self._evaluation_steps:
            figures, *others = sorted(self._evaluate(self.trainer.heldout), key=lambda each: each.get("member") != name)
            row |= figures
            for other in others:
                self.metrics.add(step=row["step"], tokens=row["tokens"], **other)
        self.metrics.add(**row)
        if self.metrics.num_skipped_last == MOST_SKIPPED:
            raise UserError(
                f"{row['skipped']} at step {self.step}, the last of {MOST_SKIPPED} in a row: a model's weights are "
                f"broken, or distill.learning_rate {recipe.learning_rate} is too high"
            )
        progress.note(f"loss {loss:.3f}{self.metrics.in_words()}")

    def _begin(self, step: int) -> None:
        """Prepare a step: which layers train in it, and what it draws."""
        self.student.trained.begin(step, self.models["student"][1])
        if self.trainer.recipe.neftune_alpha is not None or self.trainer.recipe.on_policy.share:
            torch.manual_seed(self.trainer.runtime.seed * 1_000_003 + step)

    @property
    def _evaluation_steps(self) -> set[int]:
        return {round(self.num_steps * (i + 1) / NUM_EVALUATIONS) for i in range(NUM_EVALUATIONS)}

    def _evaluate(self, heldout: Blocks) -> list[dict[str, Any]]:
        """Measure held-out perplexity; in one process also generate text after the beginning of the held-out text.

        Returns the figures of the student, or of each member of its series by name, the largest first.
        """
        headless, folder = self.student.headless, self.student.checkpoint.folder
        with self.trainer.runtime.autocast():
            figures: dict[str, Any] = {"heldout_perplexity": measure_perplexity(headless, heldout).perplexity}
            if self.trainer.runtime.world.size == 1 and (folder / "tokenizer.json").exists():
                prompt = heldout.ids[:1, :PROMPT_TOKENS]
                with courtesy("generated text"):
                    figures["sample"] = greedy_continuation(headless.model, load_tokenizer(folder), prompt)
            if not self.trainer.series:
                return [figures]
            rows = [{"member": self.trainer.series[0].name, **figures}]
            for nested in self.student.nested:
                perplexity = measure_perplexity(nested, heldout).perplexity
                rows.append({"member": nested.member.name, "heldout_perplexity": perplexity})
            return rows


def require_trainable(recipe: DistillRecipe, student: Arch, dtype: torch.dtype, *, num_ranks: int) -> None:
    """Check what would otherwise fail in the first step, when teacher and text are read already.

    Raises:
        UserError: the batch cannot be split among the ranks, an option runs in one process only, `top_k` is the whole
            vocabulary, the scheme of `quantize` does not fit the student, a tracker is not installed, or the dtype is
            float16.
    """
    if recipe.batch_size % num_ranks:
        raise UserError(f"distill.batch_size {recipe.batch_size} cannot be split equally among {num_ranks} ranks")
    if num_ranks > 1 and recipe.optimizer == "adamw8bit":
        raise UserError("distill.optimizer adamw8bit runs in one process; accepted under torchrun: adamw")
    for key, trains in (("trains", recipe.trains), ("correction.trains", recipe.correction.trains)):
        if num_ranks > 1 and trains in {"lora", "lisa"}:
            raise UserError(f"distill.{key} {trains} runs in one process; accepted under torchrun: full, norms")
    if num_ranks > 1 and recipe.on_policy.share:
        raise UserError("distill.on_policy generates with a whole model, in one process; leave it out under torchrun")
    if recipe.top_k is not None and recipe.top_k >= student.axis_size("vocab"):
        raise UserError(f"distill.top_k {recipe.top_k} leaves no tail of {student.axis_size('vocab')} tokens")
    if recipe.quantize is not None:
        require_roundable(student, recipe.quantize)
    require_trackers(recipe.trackers)
    if dtype == torch.float16:
        raise UserError("gradients of distillation are too small for float16; accepted: auto, float32, bfloat16")


def batch_indices(step: int, batch_size: int, num_blocks: int, seed: int) -> Tensor:
    """Return the numbers of a step's blocks, (batch_size,): epoch after epoch, each in an order of its own."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    orders = {
        epoch: torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        for epoch in {position // num_blocks for position in positions}
    }
    return torch.stack([orders[position // num_blocks][position % num_blocks] for position in positions])


def write_trained(model: Any, like: Checkpoint, out: Path, world: World) -> None:
    """Write a model that was trained, in the dtype of the model on disk that it began as, to the folder `out`."""
    saved = model.state_dict().keys()
    state = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    for name, parameter in model.named_parameters():
        value = whole(parameter)  # gathering takes every rank; keeping and writing take one
        if world.is_main:
            state[name] = value.to(like.dtype).cpu()
    if world.is_main:
        write_state(model, state, like, out)
    world.barrier()


def write_state(model: Any, state: Mapping[str, Tensor], like: Checkpoint, out: Path) -> None:
    """Write a transformers model with the tensors of `state`, in the dtype of `like`, to the folder `out`."""
    tensors = {name: value.to(like.dtype).cpu().contiguous() for name, value in state.items()}
    with Progress("write student"), whole_folder(out) as staging:
        write_model(staging, model, tensors, like)
