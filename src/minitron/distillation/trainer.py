"""The training loop: a pruned student learns the teacher's distribution over the next token, or the text itself.

The state of a run is the step, the student and the optimizer; which blocks a step sees follows from the seed
and the step alone. A run that is killed continues from its last checkpoint to the same bits (on a CPU).
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron.data.blocks import Blocks, load_tokenizer
from minitron.distillation.checkpoint import Trained, load_checkpoint, save_checkpoint
from minitron.distillation.fused import States, TopTokens, logit_loss
from minitron.distillation.intermediate import Intermediate, compare_on_the_way
from minitron.distillation.losses import Comparison, comparison_of
from minitron.distillation.metrics import Metrics
from minitron.distillation.optimizers import learning_rate, make_optimizers, take_step
from minitron.distillation.parallel import lighten, shard, whole
from minitron.distillation.parameters import choose_parameters
from minitron.distillation.teacher import Learning, Live, Teacher
from minitron.errors import UserError
from minitron.evaluation.generation import PROMPT_TOKENS, greedy_continuation
from minitron.evaluation.perplexity import measure_perplexity, next_token_nll
from minitron.files import whole_folder
from minitron.model.checkpoint import Checkpoint, write_model
from minitron.model.language_model import Head, Headless, Readout, load_model
from minitron.progress import Progress
from minitron.recipe import DistillRecipe
from minitron.runtime import World, stop_on_signals

MOST_SKIPPED = 10
"""Steps in a row whose loss or gradient is not finite, and which are therefore skipped, before the run gives up."""
NUM_EVALUATIONS = 5
"""Held-out perplexity is measured this often along the way, and once before the first step."""


def distill(
    teacher: Teacher | None,
    pruned: Checkpoint,
    train: Blocks,
    heldout: Blocks,
    recipe: DistillRecipe,
    out: Path,
    work: Path,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    world: World,
) -> None:
    """Train the pruned checkpoint on the teacher's distribution and write the student to `out`.

    Without a teacher it learns from the text itself, by next-token cross-entropy: what training from scratch is.

    `work` receives `metrics.jsonl`, a row a step, and `checkpoint/`, from which a killed run continues and which
    the caller may remove once the student is safe. Weights train in float32; `dtype` is that of the
    forward pass.

    Raises:
        UserError: the batch cannot be dealt out to the ranks, the dtype is float16, `top_k` is the whole vocabulary, or
            ten steps in a row had no finite loss and gradient.
        StoppedError: SIGINT or SIGTERM came; the checkpoint is of the step that was just done.
    """
    if recipe.batch_size % world.size:
        raise UserError(f"distill.batch_size {recipe.batch_size} cannot be dealt out to {world.size} ranks equally")
    if recipe.top_k is not None and recipe.top_k >= pruned.arch.axis_size("vocab"):
        raise UserError(f"distill.top_k {recipe.top_k} leaves no tail of {pruned.arch.axis_size('vocab')} tokens")
    if dtype == torch.float16:
        raise UserError("gradients of distillation are too small for float16; accepted: auto, float32, bfloat16")
    student, finish = trained(teacher, pruned, train, heldout, recipe, work, seed, device, dtype, world)
    finish()
    _write_student(student, pruned, out, world)


def trained(
    teacher: Teacher | None,
    pruned: Checkpoint,
    train: Blocks,
    heldout: Blocks | None,
    recipe: DistillRecipe,
    work: Path,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
    world: World,
    until: int | None = None,
    stage: str = "distill",
) -> tuple[Headless, Callable[[], None]]:
    """The student in memory after all its steps, and what makes a stock model of it; otherwise as `distill`.

    With `until` it is left after so many steps, with a checkpoint to go on from. Without `heldout` nothing is measured
    along the way.
    """
    # In evaluation mode throughout: dropout has no place in matching another model's outputs.
    student = Headless(
        load_model(
            pruned, device if world.size == 1 else torch.device("cpu"), torch.promote_types(dtype, torch.float32)
        )
    )
    between = _between(teacher, student, pruned, recipe, device)
    finish = choose_parameters(student.model, pruned.arch, recipe, seed, world)
    lighten(student, pruned.arch, recipe)
    shard(student, pruned.arch, world, device, dtype)
    if isinstance(teacher, Live):
        lighten(teacher.headless, teacher.arch, recipe)
        shard(teacher.headless, teacher.arch, world, device, dtype, is_teacher=True)
    models: Trained = {"student": (student, make_optimizers(student, pruned.arch, recipe, world))}
    if isinstance(teacher, Learning):
        models["teacher"] = teacher.headless, make_optimizers(teacher.headless, teacher.arch, recipe, world)
    _loop(teacher, models, between, pruned, train, heldout, recipe, work, seed, dtype, world, until, stage)
    return student, finish


def num_steps_of(recipe: DistillRecipe, context: int) -> int:
    """How many steps the recipe's tokens are."""
    return max(1, recipe.tokens // (recipe.batch_size * context))


def batch_indices(step: int, batch_size: int, num_blocks: int, seed: int) -> Tensor:
    """Which blocks a step sees, (batch_size,): epoch after epoch, each in an order of its own."""
    positions = range(step * batch_size, (step + 1) * batch_size)
    orders = {
        epoch: torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
        for epoch in {position // num_blocks for position in positions}
    }
    return torch.stack([orders[position // num_blocks][position % num_blocks] for position in positions])


def _between(
    teacher: Teacher | None, student: Headless, pruned: Checkpoint, recipe: DistillRecipe, device: torch.device
) -> Intermediate | None:
    if not recipe.intermediate.of:
        return None
    if not isinstance(teacher, Live):
        raise UserError("distill.intermediate needs a teacher that runs along")
    return compare_on_the_way(teacher.headless.model, teacher.arch, student, pruned.arch, recipe.intermediate, device)


def _loop(
    teacher: Teacher | None,
    trained: Trained,
    between: Intermediate | None,
    pruned: Checkpoint,
    train: Blocks,
    heldout: Blocks | None,
    recipe: DistillRecipe,
    work: Path,
    seed: int,
    dtype: torch.dtype,
    world: World,
    until: int | None,
    stage: str,
) -> None:
    step_tokens = recipe.batch_size * train.context
    num_steps = num_steps_of(recipe, train.context)
    last = num_steps if until is None else until
    evaluate_at = {round(num_steps * (i + 1) / NUM_EVALUATIONS) for i in range(NUM_EVALUATIONS)} if heldout else set()
    student, optimizers = trained["student"]
    step, weight = load_checkpoint(work, trained, world) or (0, recipe.intermediate.weight or 0.0)
    metrics = Metrics(work, step, recipe.trackers, world)
    with Progress(stage, last * step_tokens, done=step * step_tokens) as progress, stop_on_signals() as request:
        if step == 0 and heldout:
            metrics.add(step=0, tokens=0, **_evaluate(student, heldout, pruned, dtype, world))
        saved_at = time.monotonic()
        while step < last:
            rate = learning_rate(step, num_steps, recipe)
            numbers = batch_indices(step, recipe.batch_size, len(train), seed)
            sums = accumulate(
                teacher, student, train[numbers], numbers, recipe, dtype, world, between=between, weight=weight
            )
            of_logits, on_the_way, of_teacher = world.sum(sums).tolist()
            loss = of_logits + weight * on_the_way
            norm = take_step(student, optimizers, rate, recipe.max_grad_norm, loss)
            is_good = math.isfinite(loss) and math.isfinite(norm)
            step += 1
            row: dict[str, Any] = {"step": step, "tokens": step * step_tokens, "learning_rate": rate}
            row |= {"loss": loss, "grad_norm": norm} if is_good else {"skipped": f"loss {loss}, gradient {norm}"}
            if between:
                row |= {"intermediate_loss": on_the_way, "intermediate_weight": weight}
                if is_good and on_the_way and recipe.intermediate.weight is None:
                    weight = of_logits / on_the_way
            if "teacher" in trained:
                share = recipe.correction.learning_rate / recipe.learning_rate
                take_step(*trained["teacher"], rate * share, recipe.max_grad_norm, of_teacher)
                row["teacher_loss"] = of_teacher
            progress.advance(step_tokens)
            if heldout and step in evaluate_at:
                row |= _evaluate(student, heldout, pruned, dtype, world)
            metrics.add(**row)
            if metrics.num_skipped_last == MOST_SKIPPED:
                raise UserError(
                    f"{row['skipped']} at step {step}, the last of {MOST_SKIPPED} in a row: a model's weights are "
                    f"broken, or distill.learning_rate {recipe.learning_rate} is too high"
                )
            progress.note(f"loss {loss:.3f}{metrics.in_words()}")
            is_wished = world.agree(request.signal_number is not None)
            if step < num_steps and (
                is_wished or step == last or world.agree(time.monotonic() - saved_at >= recipe.checkpoint_seconds)
            ):
                save_checkpoint(work, trained, step, weight, world)
                saved_at = time.monotonic()
            if step < last and is_wished:
                request.stop()


def accumulate(
    teacher: Teacher | None,
    student: Headless,
    blocks: Blocks,
    numbers: Tensor,
    recipe: DistillRecipe,
    dtype: torch.dtype,
    world: World,
    between: Intermediate | None = None,
    weight: float = 0.0,
) -> Tensor:
    """Add one step's gradient to the student's from this rank's share of the step's blocks, by `numbers` (B,).

    That is the gradient of the loss of the logits plus `weight` times that of what lies `between`. To a teacher that
    learns as well, add that of its own cross-entropy.

    Returns this rank's part of these three losses, (3,); the parts of all ranks add up to the mean over the step's
    tokens.
    """
    device = next(student.parameters()).device
    total = torch.zeros(3, dtype=torch.float64, device=device)
    # The one place where the loss is normalised: by the tokens of the whole step, on all ranks.
    num_tokens = max(1, int(blocks.teaches.sum()))
    num_labels = max(1, int((blocks.targets >= 0).sum()))
    mine = torch.arange(len(blocks)).chunk(world.size)[world.rank]
    for part in mine.split(recipe.micro_batch_size):
        block = blocks[part]
        ids, targets = block.ids.to(device), block.targets.to(device)
        is_learnt = None if block.is_learnt is None else block.teaches.to(device)
        positions = None if (places := block.positions) is None else places.to(device)
        readout: Readout
        said: States | TopTokens
        of_teacher: Tensor | None = None
        with between.watching() if between else nullcontext():
            if teacher is None:
                readout = partial(_cross_entropy, targets=targets, num_labels=num_labels)
            else:
                if isinstance(teacher, Learning):
                    with _computing_in(dtype, device):
                        said, of_teacher = teacher.learn(ids, positions, targets)
                else:
                    said = teacher(ids, numbers[part], positions)
                of_classes = isinstance(said, TopTokens)
                readout = partial(
                    _logit_loss, teacher=said, num_tokens=num_tokens, is_learnt=is_learnt,
                    temperature=recipe.temperature,
                    comparison=_comparison(recipe.loss, recipe.beta, recipe.top_k, of_classes, recipe.compile),
                    operands=dtype if device.type == "cuda" and dtype == torch.bfloat16 else None,
                    labels=targets if recipe.label_weight else None, label_weight=recipe.label_weight,
                    num_labels=num_labels,
                )  # fmt: skip
            if between:
                readout = partial(_both, of_logits=readout, on_the_way=partial(between.loss, is_learnt, num_tokens))
            with _computing_in(dtype, device):
                losses = student(ids, readout, positions)
        loss = losses[0] + weight * losses[1] if between else losses
        (loss * world.size).backward()  # FSDP averages gradients over ranks; the loss is a sum already
        total[: losses.numel()] += losses.detach().double()
        if of_teacher is not None:  # behind the student's, which reads the teacher's output matrix as gathered
            of_teacher = of_teacher / num_labels
            (of_teacher * world.size).backward()
            total[2] += of_teacher.detach()
    return total


def _both(hidden: Tensor, head: Head, of_logits: Readout, on_the_way: Callable[[], Tensor]) -> Tensor:
    """Both losses, (2,); inside `forward`, since the projection is one of the parameters that FSDP gathers there."""
    with torch.autocast(hidden.device.type, enabled=False):
        return torch.stack([of_logits(hidden, head), on_the_way()])


@cache
def _comparison(kind: str, beta: float, top_k: int | None, of_classes: bool, compiled: bool) -> Comparison:
    found = comparison_of(kind, beta, top_k, of_classes)
    return torch.compile(found) if compiled else found


def _computing_in(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """Weights of float32 are used in `dtype`, where that is bfloat16."""
    return torch.autocast(device.type, dtype, enabled=dtype == torch.bfloat16)


def _evaluate(
    student: Headless, heldout: Blocks, pruned: Checkpoint, dtype: torch.dtype, world: World
) -> dict[str, Any]:
    """Held-out perplexity; and, from one process, how the student goes on from the beginning of the held-out text."""
    with _computing_in(dtype, next(student.parameters()).device):
        found: dict[str, Any] = {"heldout_perplexity": measure_perplexity(student, heldout).perplexity}
        if world.size == 1 and (pruned.folder / "tokenizer.json").exists():
            prompt = heldout.ids[:1, :PROMPT_TOKENS]
            found["sample"] = greedy_continuation(student.model, load_tokenizer(pruned.folder), prompt)
    return found


def _cross_entropy(hidden: Tensor, head: Head, targets: Tensor, num_labels: int) -> Tensor:
    return next_token_nll(hidden, head, targets) / num_labels


def _logit_loss(
    hidden: Tensor,
    head: Head,
    teacher: States | TopTokens,
    is_learnt: Tensor | None,
    labels: Tensor | None,
    **given: Any,
) -> Tensor:
    if is_learnt is not None:
        hidden, teacher = hidden[is_learnt], teacher.at(is_learnt)
        labels = None if labels is None else labels[is_learnt]
    with torch.autocast(hidden.device.type, enabled=False):
        return logit_loss(hidden, head, teacher, labels=labels, **given)


def _write_student(student: Headless, pruned: Checkpoint, out: Path, world: World) -> None:
    saved = student.model.state_dict().keys()
    state = {name: buffer for name, buffer in student.model.named_buffers() if name in saved}
    for name, parameter in student.model.named_parameters():
        value = whole(parameter)  # gathering takes every rank; keeping and writing take one
        if world.is_main:
            state[name] = value.to(pruned.dtype).cpu()
    if world.is_main:
        with Progress("write student"), whole_folder(out) as staging:
            write_model(staging, student.model, state, pruned)
    world.barrier()
