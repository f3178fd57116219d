"""What a run will do, in words before it begins: tokens of its steps, and the time that they take on this machine."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from minitron import nas
from minitron.distillation.throughput import Throughput, measure_throughput
from minitron.distillation.trainer import NUM_EVALUATIONS
from minitron.errors import courtesy
from minitron.model.arch import Arch
from minitron.model.memory import attention_windows
from minitron.model.work import forward_flops, step_work
from minitron.nas.shapes import Shapes
from minitron.progress import Progress, clock
from minitron.session import Session


@dataclass(frozen=True)
class Expected:
    """What a step of a run, or a part of one, is expected to take."""

    name: str
    tokens: int
    seconds: float | None
    """None where it is not known."""
    is_part: bool = False
    """Whether it is a part of the search."""

    def in_words(self) -> str:
        """Return a line of the table."""
        name = f"  {self.name}" if self.is_part else self.name
        tokens = f"{self.tokens:,} tokens" if self.tokens else ""
        return f"  {name:<14}{tokens:>18}{clock(self.seconds) if self.seconds is not None else '':>12}".rstrip()


def forecast(session: Session, shapes: Shapes) -> list[Expected]:
    """Return what each step of a run takes that cuts a student, of the largest of the shapes.

    Operations are those of `model.work`; a timed step of two layers says how long they take. Reading and writing of
    models, and the measurement of speeds, are left out.
    """
    student, speed = shapes[int(np.argmax(shapes.figures["num_parameters"]))], None
    with courtesy("the expected time"), Progress("time a step"):
        recipe, blocks = session.recipe.distill, session.splits.train
        runtime, teacher = session.runtime, session.teacher.arch
        speed = measure_throughput(session.source, student, teacher, recipe, runtime=runtime, blocks=blocks)
    return list(_steps(session, shapes, student, speed))


def in_words(expected: Sequence[Expected]) -> str:
    """Return a forecast as lines of text."""
    lines = [each.in_words() for each in expected]
    unknown = all(each.seconds is None for each in expected)
    heading = "expected, without times, for which the memory does not suffice:" if unknown else "expected, about:"
    return "\n".join([heading, *lines])


def taken_in_words(taken: dict[str, float], expected: dict[str, float]) -> str:
    """Return how long the steps of a run took, in seconds, and how long they were expected to take, as text."""
    parts = [
        f"{name} {clock(seconds)}" + (f" (expected {clock(expected[name])})" if name in expected else "")
        for name, seconds in taken.items()
    ]
    return f"it took: {', '.join(parts)}"


def _steps(session: Session, shapes: Shapes, student: Arch, speed: Throughput | None) -> Iterator[Expected]:
    recipe, distill, context = session.recipe, session.recipe.distill, session.context
    windows, size = attention_windows(session.source.config.to_dict()), session.runtime.world.size
    weights = student.num_parameters / size

    def part(name: str, tokens: int, flops: float, *, updates: float = 0.0, is_part: bool = False) -> Expected:
        seconds = flops * speed.per_operation + updates * speed.per_parameter if speed else None
        return Expected(name, tokens, seconds, is_part)

    def exact(name: str, tokens: int, flops: float) -> Expected:
        return Expected(name, tokens, flops * speed.per_exact_operation if speed else None)

    forward, of_teacher, of_source = (
        forward_flops(arch, context, windows) for arch in (student, session.teacher.arch, session.source.arch)
    )
    num_steps, heldout, evaluated = distill.num_steps(context), recipe.heldout_tokens, recipe.evaluation.tokens
    step = step_work(student, session.teacher.arch, distill, context, windows)
    calibration, steps_of_trial, repair = recipe.calibration.tokens, 0, 0.0
    yield exact("calibrate", calibration, calibration * of_source)
    costs = nas.costs_of(session, shapes)
    if not recipe.shape:
        effort = costs.affordable()
        updates = {"probes": len(costs.probes) * effort.probe_tokens // context,
                   "trials": effort.tokens["trials"] // (distill.batch_size * context)}  # fmt: skip
        parts = [
            part(name, effort.tokens[name], flops / size, updates=updates.get(name, 0) * weights, is_part=True)
            for name, flops in effort.flops.items()
            if flops
        ]
        yield Expected("search", 0, sum(each.seconds or 0.0 for each in parts) if speed else None)
        yield from parts
        steps_of_trial = effort.trial_steps if effort.kept else 0
    if not steps_of_trial:
        repair = costs.repair_flops
    yield exact("prune", 0, repair)
    remaining = num_steps - steps_of_trial
    flops = remaining * step.total + (NUM_EVALUATIONS + 1) * heldout * forward
    tokens = remaining * distill.batch_size * context
    yield part("distill", tokens, flops / size, updates=remaining * weights)
    yield exact("evaluate", evaluated, evaluated * (of_teacher + 2 * forward))
