"""Plans: what the stages of a recipe would take in memory, time, disk and money, from configs alone."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from minitron.errors import UserError
from minitron.model.arch import Arch
from minitron.model.memory import attention_windows
from minitron.model.work import Work, forward_flops, layers_along, step_work
from minitron.planning.disk import disk_space
from minitron.planning.layers import Place
from minitron.planning.machine import Machine
from minitron.planning.memory import Peak, loading_memory, training_memory
from minitron.recipe import DistillRecipe, Recipe
from minitron.stages import Kind, Stage, nested_stages, stages_of, stores_states

if TYPE_CHECKING:
    from minitron.nas.effort import Effort
    from minitron.nas.shapes import Shapes

UTILISATION = 0.4
"""The share of a GPU's operations that a training reaches, between the 38 and 43 % of Llama 3 405B on H100s (arXiv
2407.21783, table 4); a program that is less tuned reaches less."""
SPARE = 0.1
"""The share of memory that a plan leaves free: predictions in docs/studies/planning.md were 5 to 14 % too low, since
allocators lose memory between tensors, most of it in small trainings."""


@dataclass(frozen=True)
class Teacher:
    """A teacher's config: its shape, its windows of attention, and what a plan needs in addition."""

    arch: Arch
    config: Mapping[str, Any]
    """The entries of `config.config_values`."""
    longest: int | None
    """The most tokens that it was made for; None where its config does not state them."""
    dtype: str
    """The dtype of its files."""

    @property
    def windows(self) -> list[int]:
        """The windows, in tokens, of the layers that attend to the last tokens only."""
        return attention_windows(self.config)


@dataclass(frozen=True)
class Change:
    """A change of a stage's settings, and what its peak is then."""

    settings: str
    peak: Peak
    fits: bool


@dataclass(frozen=True)
class StagePlan:
    """What one stage takes."""

    name: str
    kind: Kind
    teaches: Arch | None
    """The model that teaches; None where a teacher is corrected."""
    student: Arch
    """The model that is trained: of a budget, the largest shape within it."""
    smallest: Arch | None
    """Of a budget, the smallest shape within it."""
    num_shapes: int
    recipe: DistillRecipe
    place: Place
    work: Work
    extra_flops: Mapping[str, float]
    """Operations outside the steps, by what they are for."""
    peak: Peak
    search_peak: Peak | None
    """Of the trials of a search, each of which runs in one process."""
    loading: float
    """Bytes of the CPU's memory that each of several processes takes while it loads its models; 0 for one process."""
    disk: Mapping[str, float]
    changes: tuple[Change, ...] = ()
    problems: tuple[str, ...] = field(default=())
    """Why it cannot run as it is."""

    @property
    def num_steps(self) -> int:
        """Steps of the training."""
        return self.recipe.num_steps(self.place.context)

    @property
    def tokens(self) -> int:
        """Tokens of all steps."""
        return self.num_steps * self.recipe.batch_size * self.place.context

    @property
    def flops(self) -> float:
        """Operations of the whole stage."""
        return self.num_steps * self.work.total + sum(self.extra_flops.values())


def plan_stages(recipe: Recipe, teacher: Teacher, machine: Machine, dtype: str) -> list[StagePlan]:
    """Return the plan of every stage of a recipe, or of its only run.

    A stage starts from the student of the one before; of a budget, the largest shape within it is taken.

    Raises:
        UserError: see `stages_of`; a shape cannot be cut, or no shape is within a budget; or the recipe states no
            target.
    """
    is_nested = recipe.lineage.nested
    stages = _nested(recipe) if is_nested else stages_of(recipe) or (Stage("run", recipe),)
    is_series = isinstance(recipe.target_params, tuple)
    plans: list[StagePlan] = []
    source = teacher.arch
    for number, stage in enumerate(stages):
        teaches = source if stage.is_taught_by_larger and number else teacher.arch
        stores = is_series and not is_nested and stores_states(recipe) and not stage.is_taught_by_larger
        plan = _stage_plan(stage, replace(teacher, arch=teaches), source, machine, dtype, stores, number == 0)
        plans.append(plan)
        if stage.kind != "correct" and not is_nested:
            source = plan.student
    return plans


def _nested(recipe: Recipe) -> tuple[Stage, ...]:
    """Return the stages of a nested series, each with its share of the tokens; the teacher is scored for the first."""
    stages = nested_stages(recipe)
    planned: list[Stage] = []
    for stage, share in zip(stages, recipe.lineage.shares(len(stages)), strict=True):
        parts: dict[str, Any] = {
            "distill": recipe.distill.model_copy(update={"tokens": round(share * recipe.distill.tokens)})
        }
        if planned:
            parts["calibration"] = recipe.calibration.model_copy(update={"tokens": 0})
        planned.append(replace(stage, recipe=stage.recipe.model_copy(update=parts)))
    return tuple(planned)


def fits(peak: Peak, machine: Machine) -> bool:
    """Return whether a peak leaves `SPARE` of a device's memory; true where the memory is not known."""
    return machine.memory is None or peak.total <= (1 - SPARE) * machine.memory


def _stage_plan(
    stage: Stage, teacher: Teacher, source: Arch, machine: Machine, dtype: str, stores: bool, is_first: bool
) -> StagePlan:
    recipe, arch = stage.recipe, teacher.arch
    context = recipe.context_within(teacher.longest or recipe.context)
    masked, attention = _masked(recipe, teacher, context), _attention(recipe, machine)
    place = Place(context, dtype, machine.device, machine.num_devices, masked, attention)
    archs, shapes = _students(stage, teacher, source)
    student, num_shapes = archs[-1], len(shapes) if shapes else 1
    distill = recipe.distill
    if stores:
        distill = distill.model_copy(update={"teacher_states": "teacher-states"})
    teaches = None if stage.kind == "correct" else arch
    if teaches is None:
        distill = distill.model_copy(update={"correction": type(distill.correction)(), "teacher_states": None})
    peak = training_memory(student, teaches, distill, place)
    forward, stored = forward_flops(arch, context, teacher.windows), distill.teacher_states is not None
    work = step_work(student, teaches, distill, context, teacher.windows)
    extra: dict[str, float] = {}
    if stored and teaches is not None and (is_first or not stores):
        extra["teacher outputs"] = forward * max(distill.tokens, recipe.calibration.tokens)
    search_peak = None
    if stage.kind == "cut":
        extra["calibration"] = recipe.calibration.tokens * forward_flops(source, context, teacher.windows)
        if shapes:
            search, effort = _search(recipe, arch, shapes, context, teacher.windows)
            extra["search"] = effort.added * effort.distillation
            if effort.trial_steps:
                search_peak = training_memory(student, arch, search, replace(place, num_ranks=1))
    plan = StagePlan(
        stage.name, stage.kind, teaches, student, archs[0] if num_shapes > 1 else None, num_shapes, distill, place,
        work, extra, peak, search_peak, loading_memory(student, teaches, distill, place),
        disk_space(stage.kind, student, arch, distill, context, teacher.dtype),
        problems=tuple(_problems(distill, machine)),
    )  # fmt: skip
    return plan if fits(peak, machine) else replace(plan, changes=tuple(_changes(plan, machine)))


def _attention(recipe: Recipe, machine: Machine) -> str | None:
    """Return the attention of a training as in `Place`: on a CPU whose products are exact, the fused kernel."""
    if recipe.attn_implementation is not None or machine.device != "cpu":
        return recipe.attn_implementation
    import torch

    from minitron.runtime import rounds_products

    return None if rounds_products(recipe.dtype, torch.device("cpu")) else "sdpa"


def _masked(recipe: Recipe, teacher: Teacher, context: int) -> float:
    """Return the share of attention layers that need a mask: for documents apart, or windows below the context."""
    if recipe.distill.documents != "joined":
        return 1.0
    return sum(window < context for window in teacher.windows) / max(1, layers_along(teacher.arch, "query"))


def _students(stage: Stage, teacher: Teacher, source: Arch) -> tuple[list[Arch], "Shapes | None"]:
    """Return the smallest and the largest shape that a stage may train, and all shapes where there is a search."""
    recipe = stage.recipe
    if stage.kind == "correct":
        return [teacher.arch], None
    if stage.kind == "distill":
        return [source], None
    if recipe.shape:
        shape = source.resized(**recipe.shape)
        source.require_prunable_to(shape)
        return [shape], None
    if not recipe.has_budget:
        raise UserError("the recipe states no student: give a shape (--set shape.hidden_size=448) or target_params")
    from minitron.nas.budget import parse_budget
    from minitron.nas.runnable import of_passing_sizes
    from minitron.nas.shapes import every_shape, feasible

    assert not isinstance(recipe.target_params, tuple)
    target = recipe.target_params
    budget = parse_budget(target, recipe.budget, recipe.search.tolerance, teacher.arch, teacher.windows)
    shapes = of_passing_sizes(every_shape(source, budget, recipe.search, teacher.windows), recipe.search)
    shapes = feasible(shapes, budget)
    counts = shapes.figures["num_parameters"]
    ends = [shapes[int(counts.argmin())], shapes[int(counts.argmax())]]
    return ends, shapes if len(shapes) > 1 else None


def _search(
    recipe: Recipe, teacher: Arch, shapes: "Shapes", context: int, windows: list[int]
) -> tuple[DistillRecipe, "Effort"]:
    """Return how a search trains in its trials, and how much it does."""
    from minitron.nas.effort import Costs
    from minitron.nas.probes import probes
    from minitron.nas.trial import trial_recipe

    effort = Costs(recipe, teacher, shapes, probes(shapes), context, windows).affordable()
    trial = trial_recipe(recipe.distill, max(1, effort.trial_steps), context)
    return trial.model_copy(update={"teacher_states": "search"}), effort


def _problems(recipe: DistillRecipe, machine: Machine) -> Iterator[str]:
    ranks = machine.num_devices
    if recipe.batch_size % ranks:
        yield f"distill.batch_size {recipe.batch_size} cannot be split equally among {ranks} processes"
    if ranks > 1 and recipe.optimizer == "adamw8bit":
        yield "distill.optimizer adamw8bit runs in one process"
    if ranks > 1 and "lora" in {recipe.trains, recipe.correction.trains}:
        yield "adapters (lora) run in one process"


def _changes(plan: StagePlan, machine: Machine) -> Iterator[Change]:
    """Yield what lowers the peak, each change by itself, then all changes of the recipe together, then more devices."""
    recipe, num_ranks = plan.recipe, plan.place.num_ranks
    single: dict[str, dict[str, Any]] = {}
    if not recipe.activation_checkpointing:
        single["distill.activation_checkpointing=true"] = {"activation_checkpointing": True}
    if recipe.micro_batch_size > 1:
        single["distill.micro_batch_size=1"] = {"micro_batch_size": 1}
    if recipe.optimizer == "adamw" and num_ranks == 1:
        single["distill.optimizer=adamw8bit"] = {"optimizer": "adamw8bit"}
    keeps_teacher = recipe.intermediate.of or recipe.correction.trains != "nothing"
    if plan.teaches is not None and recipe.teacher_states is None and not keeps_teacher:
        single["distill.teacher_states=FOLDER"] = {"teacher_states": "FOLDER"}

    def changed(words: str, update: dict[str, Any], place: Place) -> Change:
        peak = training_memory(plan.student, plan.teaches, recipe.model_copy(update=update), place)
        return Change(words, peak, fits(peak, machine))

    for words, update in single.items():
        yield changed(words, update, plan.place)
    together = {key: value for update in single.values() for key, value in update.items()}
    if len(single) > 1:
        yield changed(" and ".join(single), together, plan.place)
    if machine.device == "cuda" and recipe.optimizer == "adamw":
        without_states = {key: value for key, value in together.items() if key not in {"optimizer", "teacher_states"}}
        count = num_ranks
        while (count := 2 * count) <= recipe.batch_size:
            if recipe.batch_size % count:
                break
            found = changed(
                f"{count} devices" + (", with activation checkpointing" if without_states else ""),
                without_states, replace(plan.place, num_ranks=count),
            )  # fmt: skip
            if found.fits:
                yield found
                break
