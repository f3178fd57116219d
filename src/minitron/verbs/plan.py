"""Plan a recipe: what its stages would take in memory, time, disk and money, from configs alone, without weights."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minitron.errors import UserError
from minitron.files import read_json
from minitron.model.arch import Arch
from minitron.model.config import config_values
from minitron.model.source import config_of
from minitron.model.work import layers_along
from minitron.planning import SPARE, UTILISATION, StagePlan, Teacher, fits, plan_stages
from minitron.planning.machine import Machine, described_machine, this_machine
from minitron.recipe import Recipe, RecipeSource, recipe_from
from minitron.reports.figures import Rows
from minitron.verbs.results import Result

TRAINING_DTYPES = ("bfloat16", "float32")
KEPT = ("student", "pruned model")
"""What stays on disk when a stage is over."""


@dataclass(frozen=True, repr=False)
class Planned(Result):
    """What the stages of a recipe would take on a machine."""

    teacher: Arch
    stages: list[StagePlan]
    machine: Machine
    utilisation: float
    """The share of the machine's operations that a training is taken to reach."""
    price: float | None
    """Price of one device per hour."""

    def seconds(self, flops: float) -> float | None:
        """Return the time of some operations on all devices; None where their speed is not known."""
        speed = self.machine.flops
        return flops / (speed * self.machine.num_devices * self.utilisation) if speed else None

    def hours(self, stage: StagePlan) -> float | None:
        """Return the hours of a stage."""
        seconds = self.seconds(stage.flops)
        return None if seconds is None else seconds / 3600

    def cost(self, stage: StagePlan) -> float | None:
        """Return the price of a stage."""
        hours = self.hours(stage)
        return None if hours is None or self.price is None else hours * self.machine.num_devices * self.price

    @property
    def disk(self) -> float:
        """The most bytes on disk at a time: what all stages leave, and what one of them needs meanwhile."""
        left = sum(size for stage in self.stages for name, size in stage.disk.items() if name in KEPT)
        return left + max(sum(size for name, size in stage.disk.items() if name not in KEPT) for stage in self.stages)

    def to_dict(self) -> dict[str, Any]:
        """Return all figures, in bytes, operations, hours and tokens per second."""
        return {
            "teacher": self.teacher.to_dict() | {"num_parameters": self.teacher.num_parameters},
            "machine": asdict(self.machine),
            "utilisation": self.utilisation,
            "price": self.price,
            "disk": self.disk,
            "stages": [self._stage_dict(stage) for stage in self.stages],
        }

    def _stage_dict(self, stage: StagePlan) -> dict[str, Any]:
        step = self.seconds(stage.work.total)
        return {
            "name": stage.name,
            "kind": stage.kind,
            "arch": stage.student.to_dict(),
            "num_parameters": stage.student.num_parameters,
            "smallest_num_parameters": (stage.smallest or stage.student).num_parameters,
            "num_shapes": stage.num_shapes,
            "context": stage.place.context,
            "dtype": stage.place.dtype,
            "steps": stage.num_steps,
            "tokens": stage.tokens,
            "flops_per_step": asdict(stage.work),
            "flops_besides": dict(stage.extra_flops),
            "memory": {"moment": stage.peak.moment, "total": stage.peak.total, **stage.peak.parts},
            "fits": fits(stage.peak, self.machine),
            "search_memory": stage.search_peak and stage.search_peak.total,
            "loading_memory": stage.loading,
            "changes": [
                {"settings": change.settings, "memory": change.peak.total, "fits": change.fits}
                for change in stage.changes
            ],
            "problems": list(stage.problems),
            "tokens_per_second": None if step is None else stage.tokens / stage.num_steps / step,
            "hours": self.hours(stage),
            "cost": self.cost(stage),
            "disk": dict(stage.disk),
        }

    def rows(self) -> Rows:
        """Return a column per stage and a row per figure."""
        return [row for _, rows in self._sections for row in rows]

    def tables(self) -> list[tuple[Rows, str, str]]:
        """Return the tables of training, memory, and time and disk, with what does not fit and what that can change."""
        tables = [(rows, caption, "") for caption, rows in self._sections]
        last, caption, _ = tables[-1]
        return [*tables[:-1], (last, caption, "\n".join(self._remarks()))]

    @property
    def _sections(self) -> list[tuple[str, Rows]]:
        head = ["", *(stage.name for stage in self.stages)]

        def row(name: str, values: list[str]) -> list[str]:
            return [name, *values]

        stages = self.stages
        training = [
            head,
            row("trained parameters", [_range(stage) for stage in stages]),
            row(
                "teacher's parameters",
                [f"{stage.teaches.num_parameters:,}" if stage.teaches else "" for stage in stages],
            ),
            row("context", [f"{stage.place.context:,}" for stage in stages]),
            row("steps", [f"{stage.num_steps:,}" for stage in stages]),
            row("tokens", [f"{stage.tokens:,}" for stage in stages]),
            row("operations per step, student", [_operations(stage.work.student) for stage in stages]),
            row("recomputed activations", [_operations(stage.work.recomputation) for stage in stages]),
            row("teacher", [_operations(stage.work.teacher) for stage in stages]),
            *(
                row(f"operations of {name}", [_operations(stage.extra_flops.get(name, 0)) for stage in stages])
                for name in dict.fromkeys(name for stage in stages for name in stage.extra_flops)
            ),
        ]
        parts = dict.fromkeys(name for stage in stages for name in stage.peak.parts)
        memory = [
            head,
            *(row(name, [_gigabytes(stage.peak.parts.get(name, 0)) for stage in stages]) for name in parts),
            row("in all", [_gigabytes(stage.peak.total) for stage in stages]),
            row("at its peak, which is the", [stage.peak.moment for stage in stages]),
            row("fits", ["yes" if fits(stage.peak, self.machine) else "NO" for stage in stages]),
            row(
                "trials of the search",
                [_gigabytes(stage.search_peak.total if stage.search_peak else 0) for stage in stages],
            ),
            row("CPU memory of each process, loading", [_gigabytes(stage.loading) for stage in stages]),
        ]
        names = dict.fromkeys(name for stage in stages for name in stage.disk)
        rest = [
            head,
            row("tokens per second", [_number(self._stage_dict(stage)["tokens_per_second"]) for stage in stages]),
            row("hours", [_number(self.hours(stage)) for stage in stages]),
            row("price", [_number(self.cost(stage)) for stage in stages]),
            *(row(f"disk: {name}", [_gigabytes(stage.disk.get(name, 0)) for stage in stages]) for name in names),
        ]
        device = "GPU" if self.machine.device == "cuda" else "CPU"
        return [
            ("training", _filled(training)),
            (f"memory of each {device}", _filled(memory)),
            (f"time at {self.utilisation:.0%} of {self.machine.in_words()}, and disk", _filled(rest)),
        ]

    def _remarks(self) -> list[str]:
        machine, lines = self.machine, []
        for stage in self.stages:
            shape = {name: size for name, size in stage.student.sizes.items() if size != self.teacher.sizes[name]}
            words = " ".join(f"{name} {size}" for name, size in shape.items()) or "the teacher's shape"
            largest = f", the largest of {stage.num_shapes:,} within the budget" if stage.num_shapes > 1 else ""
            lines.append(f"{stage.name}: {words}{largest}")
            lines += [f"{stage.name} cannot run: {problem}" for problem in stage.problems]
            if not fits(stage.peak, machine):
                assert machine.memory is not None
                usable = _gigabytes((1 - SPARE) * machine.memory)
                lines.append(f"{stage.name} does not fit into {usable}, {1 - SPARE:.0%} of the memory; it would take")
                lines += [
                    f"    {_gigabytes(change.peak.total)} with {change.settings}{', which fits' if change.fits else ''}"
                    for change in stage.changes
                ]
            if stage.search_peak and not fits(stage.search_peak, machine):
                lines.append(
                    f"{stage.name}: trials of the search do not fit, each of which runs in one process: give a shape, "
                    "or --set search.distill_tokens=0"
                )
        hours = [self.hours(stage) for stage in self.stages]
        if all(hour is not None for hour in hours):
            costs = [self.cost(stage) or 0 for stage in self.stages]
            price = f", price {_number(sum(costs))}" if self.price is not None else ""
            lines.append(f"in all {_number(sum(filter(None, hours)))} hours{price}, {_gigabytes(self.disk)} of disk")
        else:
            lines.append(f"in all {_gigabytes(self.disk)} of disk; give --gpu-flops for times")
        if machine.num_devices > 1:
            lines.append(
                f"several GPUs need torchrun: torchrun --nproc-per-node {machine.num_devices} -m minitron compress"
            )
        if any(layers_along(stage.student, "mhead") for stage in self.stages):
            lines.append(
                "Mamba layers are counted as fused kernels (mamba-ssm) hold them; without these they take more"
            )
        return lines


def plan(
    recipe: RecipeSource = None,
    teacher: str | Path | None = None,
    *,
    gpus: str | None = None,
    gpu_memory: str | None = None,
    gpu_flops: str | None = None,
    utilisation: float = UTILISATION,
    price: float | None = None,
    **settings: Any,
) -> Planned:
    """Return what the stages of a recipe would take: memory per device, operations, time, disk and price.

    Only the teacher's config is read. `gpus` names a machine (`8xH100`), or counts GPUs (`8`) whose `gpu_memory` (80GB)
    and dense `gpu_flops` (989T per second) are given; without it the plan is for this machine, in one process.
    `utilisation` is the share of these operations that a training is taken to reach; `price` is that of one GPU per
    hour. `settings` are keys of the recipe.

    Raises:
        UserError: recipe, machine or teacher are not understood, or a student cannot be cut as the recipe states.
    """
    given = recipe_from(recipe, **settings, **({} if teacher is None else {"teacher": teacher}))
    if not 0 < utilisation <= 1:
        raise UserError(f"--utilisation {utilisation} is not a share; accepted: above 0, at most 1")
    if price is not None and price < 0:
        raise UserError(f"--price {price} is below 0; accepted: the price of one GPU per hour")
    machine, dtype = _machine(given, gpus, gpu_memory, gpu_flops)
    read = _teacher(given)
    return Planned(read.arch, plan_stages(given, read, machine, dtype), machine, utilisation, price)


def _machine(recipe: Recipe, gpus: str | None, memory: str | None, flops: str | None) -> tuple[Machine, str]:
    if gpus is None and memory is not None:
        gpus = "1"
    if gpus is not None:
        dtype = "bfloat16" if recipe.dtype == "auto" else recipe.dtype
    else:
        from minitron.runtime import resolve_device, resolve_dtype

        dtype = str(resolve_dtype(recipe.dtype, resolve_device(recipe.device))).removeprefix("torch.")
    if dtype not in TRAINING_DTYPES:
        raise UserError(f"dtype {dtype} is not one to train in; accepted: auto, {', '.join(TRAINING_DTYPES)}")
    if gpus is not None:
        return described_machine(gpus, memory, flops, dtype), dtype
    return this_machine(recipe.device, flops, recipe.dtype), dtype


def _teacher(recipe: Recipe) -> Teacher:
    path = config_of(recipe.teacher, recipe.family)
    values = config_values(path, recipe.family)
    stated = read_json(path / "config.json" if path.is_dir() else path)
    dtype = stated.get("dtype") or stated.get("torch_dtype") or "bfloat16"
    return Teacher(Arch.from_config(values), values, stated.get("max_position_embeddings"), str(dtype))


def _range(stage: StagePlan) -> str:
    counts = [f"{arch.num_parameters:,}" for arch in (stage.smallest, stage.student) if arch is not None]
    return " to ".join(counts)


def _filled(rows: Rows) -> Rows:
    """Return the rows that have a value."""
    return [rows[0], *(row for row in rows[1:] if any(row[1:]))]


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.2f} GB" if size else ""


def _operations(number: float) -> str:
    return f"{number:.2e}" if number else ""


def _number(number: float | None) -> str:
    if number is None:
        return ""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
