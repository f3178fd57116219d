"""Times a step of a few layers, to know before a training how long it takes on this machine."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minitron.data.blocks import Blocks
from minitron.distillation.fused import States
from minitron.distillation.objective import Objective
from minitron.distillation.optimizers import make_optimizer
from minitron.errors import UserError
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint
from minitron.model.language_model import Head, Headless, attention_in_training, random_model
from minitron.model.work import BACKWARD, forward_flops
from minitron.recipe import DistillRecipe, IntermediateRecipe
from minitron.runtime import Runtime

NUM_LAYERS = 2
BYTES_PER_PARAMETER = 16
"""Weight, gradient and two moments, in float32."""


@dataclass(frozen=True)
class Throughput:
    """How fast this machine trains."""

    per_operation: float
    """Seconds for an operation of a step: of layers, output matrices and their comparison, as a step mixes them."""
    per_exact_operation: float
    """Seconds for an operation of layers outside of trainings, whose products may be more exact."""
    per_parameter: float
    """Seconds in which the optimizer moves a weight."""


def measure_throughput(
    source: Checkpoint, student: Arch, teacher: Arch, recipe: DistillRecipe, *, runtime: Runtime, blocks: Blocks
) -> Throughput | None:
    """Time a student's step on one block, with two layers of its size and random weights.

    Returns None where the memory does not hold these layers, or the family has no model of so few.
    """
    try:
        small = student.resized(num_hidden_layers=max(NUM_LAYERS, len(student.layer_counts)))
    except UserError:
        return None
    free = runtime.free_memory
    logits = 2 * blocks.context * student.axis_size("vocab")
    if free is not None and BYTES_PER_PARAMETER * small.num_parameters + 4 * logits > free:
        return None
    block, numbers, context = blocks[:1], torch.zeros(1, dtype=torch.int64), blocks.context
    runtime = replace(runtime, attention=attention_in_training(student, recipe.micro_batch_size, context, runtime))
    headless = Headless(random_model(source, small, runtime, runtime.weights_dtype))
    vocab, width = teacher.axis_size("vocab"), teacher.axis_size("hidden")
    head = Head(torch.zeros(vocab, width, device=runtime.device, dtype=runtime.dtype), headless.softcap)
    states = States(torch.zeros(1, context, width, device=runtime.device, dtype=runtime.dtype), head)
    logits_alone = {"intermediate": IntermediateRecipe(of=()), "quantize": None}
    objective = Objective(lambda *_: states, recipe.model_copy(update=logits_alone), runtime)
    ids = block.ids.to(runtime.device)

    def forward() -> Tensor:
        with runtime.autocast():
            total: Tensor = headless(ids, lambda hidden, _: hidden.float().sum())
        return total

    def layers() -> None:
        with runtime.training():
            forward().backward()

    def step() -> None:
        objective.accumulate(headless, block, numbers)

    of_layers, of_step = _seconds(layers, runtime), _seconds(step, runtime)
    with torch.no_grad():
        of_forward = _seconds(forward, runtime)
    optimizer = make_optimizer(headless, recipe)

    def update() -> None:
        optimizer.step()

    of_update = _seconds(update, runtime)
    in_small, in_student, in_teacher = (_layer_flops(arch, context) for arch in (small, student, teacher))
    per_token = of_layers / context * ((1 + BACKWARD) * in_student + in_teacher) / ((1 + BACKWARD) * in_small)
    per_token += max(0.0, of_step - of_layers) / context
    operations = (1 + BACKWARD) * forward_flops(student, context) + forward_flops(teacher, context)
    exact = of_forward / context / in_small
    return Throughput(per_token / operations, exact, of_update / small.num_parameters)


def _layer_flops(arch: Arch, context: int) -> float:
    return forward_flops(arch, context) - 2 * arch.axis_size("vocab") * arch.axis_size("hidden")


def _seconds(run: Callable[[], object], runtime: Runtime) -> float:
    """Return the seconds of a call, after one that is not counted."""
    run()
    if runtime.device.type == "cuda":
        torch.cuda.synchronize(runtime.device)
    started = time.perf_counter()
    run()
    if runtime.device.type == "cuda":
        torch.cuda.synchronize(runtime.device)
    return time.perf_counter() - started
