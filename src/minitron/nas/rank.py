"""From all shapes within a budget to the best one: predict, compare untrained, distil a few for a while, choose."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from minitron.data.blocks import Blocks
from minitron.distillation import stored_teacher
from minitron.distillation.teacher import Teacher
from minitron.errors import UserError
from minitron.files import read_json, read_jsonl, write_json, write_jsonl
from minitron.model.arch import Arch
from minitron.model.memory import attention_windows
from minitron.nas.budget import Budget, Limit, Serving, parse_budget, speed_limits
from minitron.nas.probes import predicted, probes
from minitron.nas.seconds import Seconds
from minitron.nas.shapes import Shapes, every_shape, feasible, shortlist
from minitron.nas.speed import Speeds
from minitron.nas.standings import standings
from minitron.nas.trial import TIE, Row, Trial, compete, trial_recipe
from minitron.nas.zero_shot import ZeroShot
from minitron.progress import Progress, beside
from minitron.pruning.importance import Importance
from minitron.recipe import DistillRecipe, Target
from minitron.session import Session

SPEED_MARGIN = 0.1
"""Shapes whose estimated seconds are so far below what is asked for are looked at, too, but none above it.

Of larger shapes less loss is expected: were those a little above the limit let in, they would take all places.
"""


def shapes_within(session: Session) -> tuple[Shapes, Budget]:
    """All shapes that are within what can be computed of the recipe's budget; and that budget, speeds left out.

    Raises:
        UserError: there is no budget, it is not understood, or no shape meets it.
    """
    target = session.recipe.target_params
    if isinstance(target, tuple):
        raise UserError("several target_params make a family of models, which is what compress does; give one")
    budget, windows = budget_of(session, target), attention_windows(session.source.config.to_dict())
    shapes = every_shape(session.source.arch, budget, session.recipe.search, windows)
    of_counts = budget.of_counts if _asks_for_speed(session) else budget
    return feasible(shapes, of_counts), budget


def budget_of(session: Session, target: Target | None) -> Budget:
    """The recipe's budget with a target for all parameters, speeds left out."""
    recipe, teacher = session.recipe, session.teacher
    windows = attention_windows(teacher.config.to_dict())
    return parse_budget(target, recipe.budget, recipe.search.tolerance, teacher.arch, windows)


def removed_layers(shapes: Shapes) -> set[int]:
    """How many layers the shapes are short of."""
    depth = shapes.teacher.axis_size("layer")
    return {depth - int(layers) for layers in set(shapes.sizes["num_hidden_layers"].tolist())}


def search(session: Session, importance: Importance, shapes: Shapes, budget: Budget, folder: Path) -> Arch:
    """The best of the shapes; `candidates.jsonl` and `search.json` in `folder` say why.

    A killed search goes on from there and from `folder/search`, which is removed at the end: nothing that was finished
    is done again.
    """
    if (folder / "search.json").exists():  # written last
        return _arch(session.source.arch, next(row for row in read_jsonl(folder / "candidates.jsonl") if row["chosen"]))
    world = session.runtime.world
    task = _Task(session, importance, folder)
    shapes, budget = task.with_speeds(shapes, budget)
    rows = task.candidates(shapes)
    archs = [_arch(session.source.arch, row) for row in rows]
    task.compare_untrained(rows, archs)
    numbers = task.short_list(rows, archs, budget)
    if session.recipe.search.distill_tokens and len(numbers) > 1:
        numbers = task.compare_distilled(rows, archs, numbers)
    chosen = _choose(rows, numbers)
    if world.is_main:
        for i, row in enumerate(rows):
            row["chosen"] = i == chosen
        write_jsonl(task.log, rows)
        write_json(folder / "search.json", task.summary(rows, budget, len(shapes)))
    world.barrier()
    if world.is_main:
        shutil.rmtree(task.work, ignore_errors=True)
    return archs[chosen]


class _Task:
    """One search, its files and what it cost."""

    def __init__(self, session: Session, importance: Importance, folder: Path) -> None:
        self.session, self.importance, self.world = session, importance, session.runtime.world
        world = self.world
        self.log, self.work = folder / "candidates.jsonl", folder / "search"
        asked = session.recipe.budget
        serving = (
            Serving(asked.batch, asked.context, asked.dtype)
            if _asks_for_speed(session)
            else Serving(1, session.context)
        )
        device, dtype = session.runtime.device, session.runtime.dtype
        self.teacher_speeds = Speeds(session.teacher, serving, device, dtype, self.work / "teacher-speed.jsonl")
        beside = self.teacher_speeds if _asks_for_speed(session) else None  # else they only break ties
        self.speeds = Speeds(session.source, serving, device, dtype, self.work / "speeds.jsonl", beside)
        self.recipe, self.seconds = session.recipe.search, Seconds(self.work / "seconds.json", world)
        if world.is_main:
            self.work.mkdir(parents=True, exist_ok=True)
        world.barrier()

    def with_speeds(self, shapes: Shapes, budget: Budget) -> tuple[Shapes, Budget]:
        """The shapes that come near the limits on speed by an estimate, and the budget with these limits."""
        if not _asks_for_speed(self.session):
            return shapes, budget
        teacher, asked = self.session.teacher, self.session.recipe.budget
        most = getattr(teacher.config, "max_position_embeddings", None) or asked.context
        if asked.context > most:
            raise UserError(f"budget.context {asked.context} is above the {most} tokens that the teacher was made for")
        if self.world.is_main:
            known = [self.session.source.arch, *probes(shapes).values(), shapes[0], shapes[len(shapes) - 1]]
            with self.seconds.of("speed"), Progress("speed", len(known) + 1, "shapes") as progress:
                self.teacher_speeds(teacher.arch)
                progress.advance(1)
                for arch in known:
                    self.speeds(arch)
                    progress.advance(1)
            self.teacher_speeds.forget()
        self.world.barrier()
        limits = speed_limits(asked, self.recipe.tolerance, self.teacher_speeds(teacher.arch))
        estimated = {name: value for name, value in self.speeds.estimated(shapes).items() if name in limits}
        shapes = Shapes(shapes.teacher, shapes.sizes, {**shapes.figures, **estimated})
        loose = {name: Limit(limit.low * (1 - SPEED_MARGIN), limit.high) for name, limit in limits.items()}
        near = feasible(shapes, Budget({**budget.limits, **loose}, budget.serving))
        return near, Budget({**budget.limits, **limits}, budget.serving)

    def candidates(self, shapes: Shapes) -> list[Row]:
        """The rows of the log; begun, where there are none, with the shapes of the lowest predicted loss."""
        if self.world.agree(not self.log.exists()):
            probed = self._probed(shapes)
            expected = predicted(shapes, self.importance, probed)
            numbers = shortlist(shapes, expected.argsort(kind="stable").tolist(), self.recipe.zero_shot)
            rows = [
                {
                    "arch": shapes[i].to_dict(),
                    **{name: value for name, value in shapes.figures_of(i).items() if not name.endswith("_seconds")},
                    "predicted_kl": float(expected[i]),
                    "zero_shot_kl": None, "distilled_kl": {}, "prefill_seconds": None, "decode_seconds": None,
                    "chosen": False,
                }
                for i in numbers
            ]  # fmt: skip
            if self.world.is_main:
                write_jsonl(self.log, rows)
        self.world.barrier()
        return read_jsonl(self.log)

    def _probed(self, shapes: Shapes) -> dict[str, tuple[Arch, float]]:
        """By axis its probe and the KL of that, after a little training if the recipe wants it."""
        found, path = probes(shapes), self.work / "probes.json"
        known: dict[str, float] = read_json(path) if path.exists() else {}
        missing = [axis for axis in found if axis not in known]
        if not missing:
            return {axis: (probe, known[axis]) for axis, probe in found.items()}
        measure = self._measure_probes()
        with self.seconds.of("probes"):
            for pairs in self.world.map_in_rounds(lambda axis: measure(axis, found[axis]), missing):
                known.update(pairs)
                if self.world.is_main:
                    write_json(path, known)
        self.world.barrier()
        return {axis: (probe, known[axis]) for axis, probe in found.items()}

    def _measure_probes(self) -> Callable[[str, Arch], float]:
        if not (self.recipe.probe_tokens and self.recipe.distill_tokens):
            untrained = self._zero_shot()
            return lambda _, probe: untrained(probe)
        trial = self._trial
        return lambda axis, probe: trial(f"probe-{axis}", probe, self.recipe.probe_tokens, f"probe of {axis}")

    @cached_property
    def _trial(self) -> Trial:
        """Trains candidates on what of the text is for that, with what the teacher says of it."""
        recipe, train = self.session.recipe, self.session.splits.train
        if recipe.distill.teacher_states is None:
            train = train[: max(1, self.recipe.distill_tokens // self.session.context)]
            of_train = self._word(self.work / "train", train, trial_recipe(recipe))
        else:
            of_train = self._word(Path(recipe.distill.teacher_states), train, recipe.distill)
        return Trial(self.session, self.importance, train, of_train, self.word_of_heldout, self.work)

    @cached_property
    def word_of_heldout(self) -> Teacher:
        """What the teacher says of the held-out blocks."""
        recipe = trial_recipe(self.session.recipe).model_copy(update={"stored": "hidden"})
        return self._word(self.work / "heldout", self.session.splits.heldout, recipe)

    def _word(self, folder: Path, blocks: Blocks, recipe: DistillRecipe) -> Teacher:
        with self.seconds.of("teacher"):
            return stored_teacher(self.session, folder, blocks, recipe)

    def compare_untrained(self, rows: list[Row], archs: list[Arch]) -> None:
        """Fill in `zero_shot_kl`, one sorted teacher after the other."""
        missing = [i for i, row in enumerate(rows) if row["zero_shot_kl"] is None]
        if not missing:
            return
        measure = self._zero_shot()
        missing.sort(key=lambda i: measure.key(archs[i]))
        with (
            Progress("zero-shot", len(rows), "candidates", done=len(rows) - len(missing)) as progress,
            self.seconds.of("zero_shot"),
        ):
            for pairs in self.world.map_in_rounds(lambda i: measure(archs[i]), missing):
                for i, kl in pairs:
                    rows[i]["zero_shot_kl"] = kl
                if self.world.is_main:
                    write_jsonl(self.log, rows)
                progress.advance(len(pairs))
                known = [row["zero_shot_kl"] for row in rows if row["zero_shot_kl"] is not None]
                progress.note(f"least KL {min(known):.3f}")

    def short_list(self, rows: list[Row], archs: list[Arch], budget: Budget) -> list[int]:
        """The candidates of least loss that differ enough, with their speeds; those too slow are left out.

        Most of the places are for kinds of cuts: what a cut of some axes costs beside others is what neither measure
        knows well (docs/studies/search.md), so that the best of every kind should have its trial first.
        """
        sizes = {name: np.array([arch.sizes[name] for arch in archs]) for name in archs[0].sizes}
        as_shapes = Shapes(self.session.source.arch, sizes, {})
        # The best by either measure in turn: each knows what the other does not (docs/studies/search.md).
        by_each = [sorted(range(len(rows)), key=lambda i: rows[i][key]) for key in ("predicted_kl", "zero_shot_kl")]
        kinds = first_of_each_kind(self.session.source.arch, archs, by_each[0])[: self.recipe.shortlist * 3 // 4]
        order = list(dict.fromkeys([*kinds, *(i for pair in zip(*by_each, strict=True) for i in pair)]))
        left = list(order)
        chosen: list[int] = []
        while left and len(chosen) < self.recipe.shortlist:
            wanted = shortlist(as_shapes, [*chosen, *left], self.recipe.shortlist)
            if not (new := [i for i in wanted if i not in chosen]):
                break
            for i in new:
                left.remove(i)
                self._measure_speed(rows[i], archs[i])
                figures = {name: rows[i][name] for name in budget.limits}
                if budget.fits(figures):
                    chosen.append(i)
        self.teacher_speeds.forget()
        if self.world.is_main:
            write_jsonl(self.log, rows)
        self.world.barrier()
        if not chosen:
            near = min((row for row in rows if row["prefill_seconds"]), key=lambda row: float(budget.excess(row)))
            nearest = ", ".join(f"{name} {near[name]:,.4g}" for name in budget.limits)
            raise UserError(
                f"no candidate meets the budget as measured; the nearest has {nearest} ({json.dumps(near['arch'])})"
            )
        return sorted(chosen, key=order.index)

    def _measure_speed(self, row: Row, arch: Arch) -> None:
        if self.world.is_main:
            with self.seconds.of("speed"):
                row.update(self.speeds(arch))
        row.update(self.world.gather({name: row[name] for name in ("prefill_seconds", "decode_seconds")})[0])

    def compare_distilled(self, rows: list[Row], archs: list[Arch], numbers: list[int]) -> list[int]:
        """Distil the short list; what is returned went all the way."""
        trial = self._trial
        with beside(lambda: standings(rows, archs, numbers)), self.seconds.of("distill"):
            return compete(rows, numbers, archs, trial, self.world, lambda: write_jsonl(self.log, rows))

    def summary(self, rows: list[Row], budget: Budget, num_shapes: int) -> dict[str, Any]:
        """`search.json`: what was asked, and how much was done for the answer."""
        recipe, context = self.session.recipe, self.session.context
        runs = [max(map(int, row["distilled_kl"])) for row in rows if row["distilled_kl"]]
        return {
            "limits": {name: {"low": limit.low, "high": limit.high} for name, limit in budget.limits.items()},
            "memory_of": asdict(budget.serving),
            "speed_of": {**asdict(self.speeds.serving), **self.speeds.where},
            "teacher_speed": self.teacher_speeds.remembered(self.session.teacher.arch),
            "probes": read_json(self.work / "probes.json"),
            "feasible": num_shapes,
            "compared": {"shapes": len(rows), "tokens_each": self._zero_shot_blocks.num_tokens},
            "distilled": {"shapes": len(runs), "tokens": sum(runs), "tokens_each": max(runs, default=0)},
            "teacher_tokens": self.session.splits.heldout.num_tokens + (max(runs, default=0) // context * context),
            "heldout_tokens": self.session.splits.heldout.num_tokens, "context": context, "seed": recipe.seed,
            "seconds": self.seconds.spent,
        }  # fmt: skip

    @property
    def _zero_shot_blocks(self) -> Blocks:
        return self.session.splits.heldout[: max(1, self.recipe.zero_shot_tokens // self.session.context)]

    def _zero_shot(self) -> ZeroShot:
        return ZeroShot(self.session, self.importance, self._zero_shot_blocks, self.word_of_heldout)


def _asks_for_speed(session: Session) -> bool:
    return session.recipe.budget.throughput is not None or session.recipe.budget.latency is not None


def first_of_each_kind(teacher: Arch, archs: list[Arch], order: list[int]) -> list[int]:
    """In this order the first shape of every set of sizes that are smaller than the teacher's."""
    found: dict[frozenset[str], int] = {}
    for i in order:
        found.setdefault(frozenset(name for name, size in archs[i].sizes.items() if size < teacher.sizes[name]), i)
    return list(found.values())


def _choose(rows: list[Row], numbers: list[int]) -> int:
    """The least loss of the last comparison; of those as good but for a tie, the fastest."""

    def loss(number: int) -> float:
        distilled = rows[number]["distilled_kl"]
        return float(distilled[max(distilled, key=int)] if distilled else rows[number]["zero_shot_kl"])

    least = min(map(loss, numbers))
    tied = [number for number in numbers if loss(number) <= least * (1 + TIE)]
    return min(tied, key=lambda number: (rows[number]["prefill_seconds"], loss(number)))


def _arch(teacher: Arch, row: Row) -> Arch:
    return teacher.resized(**{name: row["arch"][name] for name in teacher.sizes})
