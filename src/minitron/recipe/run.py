"""The settings of a run: all parts of a recipe together."""

import os
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from minitron.errors import UserError
from minitron.recipe.cutting import (
    BudgetRecipe,
    CalibrationRecipe,
    DepthRecipe,
    PruneRecipe,
    SearchRecipe,
    VocabularyRecipe,
)
from minitron.recipe.parts import Count, Data, Part, Target, shares
from minitron.recipe.training import ENOUGH_STEPS, DistillRecipe, PreferRecipe, TuneRecipe

DEFAULT_CONTEXT = 1024
"""Tokens in a block where neither the recipe nor the teacher limits them."""
HELDOUT_PART, MOST_HELDOUT = 16, 16_384
"""Held-out text is a sixteenth of the tokens of the distillation, up to this limit."""


class ChatsRecipe(Part):
    """Chats that the teacher answers itself before the student is made, mixed into the training text: a chat model that
    is distilled on plain text alone stops answering."""

    share: float = Field(0.0, ge=0, lt=1)
    """Share of the training blocks, such as 0.1."""
    prompts: str | None = None
    """File of questions or chats (see `minitron generate`). None takes some of a built-in list of 61."""
    max_new_tokens: int = Field(128, ge=1)
    """Most tokens of an answer, drawn greedily."""

    @model_validator(mode="after")
    def _mixes_what_it_names(self) -> "ChatsRecipe":
        if self.prompts is not None and not self.share:
            raise ValueError("prompts are answered for chats.share, which is 0: give a share, such as 0.1")
        return self


class LineageRecipe(Part):
    """How the students of a series (several `target_params`) are made, each cut out of the next larger one."""

    taught_by: Literal["teacher", "larger"] = "teacher"
    """Which model teaches: the one teacher of the series, or the larger student that a student was cut from."""
    stores_states: bool = True
    """Run the teacher over the text once for the whole series, and keep its outputs until the last student is done."""
    nested: bool = False
    """Make the students in one training instead: each is the beginning of the next larger one, with which it shares its
    weights, and every step trains one of them (Nemotron Elastic, arXiv 2511.16664)."""
    weights: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Share of the steps that trains each of the nested students, largest first, such as 0.5, 0.3, 0.2. Empty takes
    equal shares, which cost the largest student little (docs/studies/nested.md)."""

    def shares(self, number: int) -> list[float]:
        """Return the share of the steps that trains each of `number` nested students, largest first; they sum to 1.

        Raises:
            UserError: `weights` are of another number of students.
        """
        if self.weights and len(self.weights) != number:
            raise UserError(f"lineage.weights has {len(self.weights)} numbers for {number} students")
        weights = self.weights or [1.0] * number
        return [weight / sum(weights) for weight in weights]


class EvaluationRecipe(Part):
    """What the final figures are measured on."""

    tokens: Count = 32_768
    """Tokens of evaluation text, which no other stage sees."""


class Recipe(Part):
    """All settings that decide the result of a run, apart from the machine."""

    teacher: str
    """A hub id, a folder, a .gguf file, or the built-in `smollm2`."""
    target_params: Annotated[Target | tuple[Target, ...] | None, BeforeValidator(shares)] = None
    """Limit on the student's parameters: a share of the teacher's (0.7), a count (94M) or a range (7.8B..8.5B). A
    falling list of targets makes a series of students."""
    budget: BudgetRecipe = BudgetRecipe()
    """Limits on other figures of the student."""
    shape: dict[str, Annotated[int, Field(ge=1)]] = Field({})
    """Sizes of the student by config name (`hidden_size: 3072`), in place of a budget and a search; sizes that are not
    named stay as they are."""
    family: str | None = None
    """Read the teacher as a model of this `model_type`, whatever its config says. None uses the config's."""
    text_only: bool = False
    """Whether to read the text model inside a multimodal teacher, whose images nothing will read any more."""
    data: Data = "wiki"
    """Text: a file of text, JSON, CSV, parquet or Arrow, a folder or a glob of such files, a hub data set
    (`org/name:config:split`), or the built-in `wiki`; or a mixture that maps sources to weights, by characters."""
    context: int | None = Field(None, ge=2)
    """Tokens in a block. None takes 1,024, or the longest context of the teacher if that is shorter."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Decides the order of the text and every random draw."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto takes a GPU where there is one."""
    dtype: str = "auto"
    """Dtype of forward passes: float32, bfloat16 or float16; auto is bfloat16 on GPUs and float32 on CPUs. On CPUs with
    AMX, auto also lets trainings round the operands of float32 products to bfloat16, which are summed in float32."""
    attn_implementation: (
        Literal["eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4"] | None
    ) = None
    """How transformers computes attention. Flash Attention needs its package, a GPU, and bfloat16 or float16. None is
    what transformers chooses; trainings that round products (see dtype) take eager where that keeps at most 2 GB."""
    calibration: CalibrationRecipe = CalibrationRecipe()
    vocabulary: VocabularyRecipe = VocabularyRecipe()
    depth: DepthRecipe = DepthRecipe()
    search: SearchRecipe = SearchRecipe()
    prune: PruneRecipe = PruneRecipe()
    distill: DistillRecipe = DistillRecipe()
    chats: ChatsRecipe = ChatsRecipe()
    tune: TuneRecipe = TuneRecipe()
    prefer: PreferRecipe = PreferRecipe()
    lineage: LineageRecipe = LineageRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()
    stages: tuple[dict[str, Any], ...] = ()
    """Steps that `compress` takes in a row, each with a `name` and any keys, which are laid over the rest of the
    recipe: `{name: 8b, shape: {hidden_size: 4096}, distill: {tokens: 94B}}`. A stage with a shape or a budget cuts a
    student out of the model before it; one without trains that student further, for instance at a longer `context`;
    `correct: true` trains the teacher itself, before the first student."""

    @model_validator(mode="after")
    def _has_one_target(self) -> "Recipe":
        if self.shape and self.has_budget:
            raise ValueError("give a shape, or a budget (target_params, budget), not both")
        return self

    @model_validator(mode="after")
    def _takes_enough_steps(self) -> "Recipe":
        """Make the batch of a short training smaller, where it is not given."""
        if "batch_size" not in self.distill.model_fields_set:
            processes = int(os.environ.get("WORLD_SIZE", "1"))  # of torchrun, each of which takes a share of a step
            blocks = self.distill.tokens // (self.context or DEFAULT_CONTEXT)
            sizes = [size for size in (8, 4, 2) if size % processes == 0 and blocks // size >= ENOUGH_STEPS]
            batch_size = sizes[0] if sizes else processes
            object.__setattr__(self, "distill", self.distill.model_copy(update={"batch_size": batch_size}))
        return self

    def context_within(self, longest: int | None) -> int:
        """Return the tokens in a block, for a teacher that was made for `longest` tokens.

        Raises:
            UserError: the recipe asks for more.
        """
        longest = longest or DEFAULT_CONTEXT
        context = self.context or min(DEFAULT_CONTEXT, longest)
        if context > longest:
            raise UserError(f"context {context} is above the {longest} tokens that {self.teacher} was made for")
        return context

    @property
    def heldout_tokens(self) -> int:
        """The held-out tokens that are read: as given, or a share of the tokens of the distillation."""
        return self.search.tokens or min(MOST_HELDOUT, max(1, self.distill.tokens // HELDOUT_PART))

    @property
    def has_budget(self) -> bool:
        """Whether a limit on size or speed is given, within which a shape is searched for."""
        limits = ("non_embedding_params", "active_params", "memory", "throughput", "latency")
        return self.target_params is not None or any(getattr(self.budget, name) is not None for name in limits)

    @property
    def has_target(self) -> bool:
        """Whether the recipe states what student to cut, by a shape or a budget."""
        return bool(self.shape) or self.has_budget
