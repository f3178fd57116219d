"""What a run is told: YAML or command-line options in, a validated configuration out."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from minitron.errors import UserError, nearest

UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def parse_count(text: Any) -> int:
    """`2M`, `40k`, `4.2B` or a plain number, as an integer.

    Raises:
        ValueError: it is none of these, or not positive.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmbt]?)", str(text).strip().replace("_", ""), re.IGNORECASE)
    count = round(float(found[1]) * UNITS[found[2].lower()]) if found else 0
    if count < 1:
        raise ValueError(f"'{text}' is not a count; accepted: a number such as 40000, 40k, 2M or 4.2B")
    return count


def parse_context(text: Any) -> int:
    """`4096` or `128k`, as an integer; a length's k is 1,024.

    Raises:
        ValueError: it is neither, or not positive.
    """
    found = re.fullmatch(r"([1-9]\d*)(k?)", str(text).strip(), re.IGNORECASE)
    if not found:
        raise ValueError(f"context '{text}' is no length; accepted: a number of tokens such as 4096, or 128k")
    return int(found[1]) * (1024 if found[2] else 1)


def _share(target: Any) -> Any:
    # 0.7 from YAML and "0.7" from the command line are the same recipe.
    try:
        return float(target) if 0 < float(target) <= 1 else str(target)
    except (TypeError, ValueError):
        return target


def _shares(targets: Any) -> Any:
    if isinstance(targets, str) and "," in targets:
        targets = targets.split(",")
    return tuple(map(_share, targets)) if isinstance(targets, (list, tuple)) else _share(targets)


Data = str | Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]
"""A source of documents, or several with the weight of each."""


def data_in_words(data: Data) -> str:
    """`wiki`, or `0.3 of wiki, 0.7 of code.jsonl`."""
    if isinstance(data, str):
        return data
    return ", ".join(f"{weight / sum(data.values()):.3g} of {source}" for source, weight in data.items())


Target = str | float
"""A share of the teacher's figure (0.7), an amount (94M, 20GiB), or a range of such (7.8B..8.5B)."""
Model = TypeVar("Model", bound=BaseModel)
Count = Annotated[int, BeforeValidator(parse_count)]
CountOrNone = Annotated[int, BeforeValidator(lambda value: 0 if str(value) == "0" else parse_count(value))]
Share = Annotated[Target, BeforeValidator(_share)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CalibrationRecipe(_Strict):
    """What importance is measured on."""

    tokens: Count = 32_768
    batch: Literal["l2", "mean", "var"] = "l2"
    """How the aggregates of blocks become one score (Minitron, arXiv 2407.14679, table 13)."""
    sequence: Literal["mean", "l2", "var"] = "mean"
    """How a block's tokens become one aggregate: of absolute values, of squares, or about their mean."""
    mamba_scores: Literal["x", "z", "out_proj"] = "x"
    """What Mamba heads and channels are scored by: the x or the z that the input projection makes, or what enters
    the output projection."""
    expert_scores: Literal["reap", "norm"] = "reap"
    """Experts by the norm of their output with or without the router's weight."""


class DepthRecipe(_Strict):
    """How layers are chosen."""

    score: Literal["block_influence", "perplexity", "kl", "logits_mse", "task"] = "block_influence"
    """What is lost without a layer; all but the first of the whole model in memory, on the first calibration tokens."""
    removal: Literal["one_shot", "iterative", "contiguous"] = "one_shot"
    """The lowest scores go; or the lowest goes and the rest is scored anew; or the best block of layers goes."""
    tokens: Count = 4_096
    task: str | None = None
    """A jsonl file of items (see `evaluation.multiple_choice.read_items`), whose accuracy is the score `task`."""
    items: Count = 200
    """Of these, the first so many."""


class PruneRecipe(_Strict):
    """What is done beyond dropping entries when a shape is cut; the defaults are those of docs/studies/pruning.md."""

    rotate: bool | None = None
    """Hidden is cut along principal directions instead of channels; None: where the family allows it."""
    rescale_norms: bool = True
    """Norms over fewer channels keep their scale."""
    refit: bool | None = None
    """Tensors that write the stream are fitted, layer after layer, to what the student lacks; None: where hidden stays
    whole. Where it is cut, a refit starts nearer and ends further off."""
    ridge: float = Field(3.0, ge=0)
    """Damping of that fit, as a share of the mean second moment, times inputs over calibration tokens."""
    rounds: int = Field(1, ge=1)
    """Importance is measured so often, each time on what the steps before have left."""
    merge_heads: bool = False
    """Query heads kept take up the difference to those dropped (Minitron, arXiv 2407.14679, section 2.3)."""


PLAIN = PruneRecipe(rotate=False, rescale_norms=False, refit=False)
"""The papers' method without any of the additions."""


class BudgetRecipe(_Strict):
    """What the student may cost beside, or instead of, `target_params`; it has to meet all that is given."""

    non_embedding_params: Share | None = None
    active_params: Share | None = None
    """All but the parameters of the experts that a token is not sent to."""
    memory: Share | None = None
    """Bytes of weights, KV cache and Mamba state, such as 20GiB."""
    throughput: str | None = None
    """At least so many tokens a second of prefill, over the batch, measured here: 1.5x the teacher's, or 900 tok/s."""
    latency: str | None = None
    """At most so much time for a token behind the context, measured here: 0.7x the teacher's, or 40ms."""
    batch: int = Field(1, ge=1)
    """Sequences that memory and speed are for."""
    context: Annotated[int, BeforeValidator(parse_context)] = 4096
    """Tokens of each."""
    dtype: Literal["float32", "bfloat16", "float16", "float8"] = "bfloat16"
    """Of weights and cache in memory; speed is measured in that of the run."""


class Span(_Strict):
    """Sizes from one to another, both included, in steps."""

    first: int = Field(ge=1)
    last: int = Field(ge=1)
    step: int = Field(1, ge=1)


class Factors(_Strict):
    """Sizes that are multiples of another size of the same shape."""

    times: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)]
    of: str = "hidden_size"


class SearchRecipe(_Strict):
    """How a shape is found."""

    tolerance: float = Field(0.05, gt=0, lt=1)
    """The shape lies within this share of the limit that binds."""
    space: dict[str, Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] | Span | Factors] = {}
    """Sizes that an axis may take, by config name, instead of those derived from the teacher."""
    multiple_of: dict[str, Annotated[int, Field(ge=1)]] = {}
    """Step of derived sizes, by config name; by default 64 or more for widths."""
    probe_tokens: CountOrNone = 4_096
    """How long one shape an axis is distilled to learn what cuts of it cost; 0: they are compared untrained."""
    zero_shot: int = Field(256, ge=1)
    """Shapes, of all within the budget those that should cost least, that are cut and compared with the teacher."""
    zero_shot_tokens: Count = 1_024
    """Of the held-out tokens, those on which that is done."""
    shortlist: int = Field(8, ge=1)
    """Of these, shapes that are pruned, mended and distilled for a while."""
    distill_tokens: CountOrNone = 30_000
    """How long that is for the best; 0: the untrained shapes decide."""
    batch_size: int = Field(2, ge=1)
    """Blocks a step of that."""
    halving: bool = True
    """After a quarter of these tokens, and again after half, only the better half goes on, and who is as good."""
    tokens: Count = 16_384
    """Held-out tokens that rank candidates and follow the distillation; fewer do not tell good shapes apart."""


class IntermediateRecipe(_Strict):
    """What of the teacher is matched beside its logits (`distillation.intermediate`); the teacher has to run along."""

    of: tuple[Literal["embedding", "block_output", "mlp_input", "attention"], ...] = ()
    """Helps where much depth was cut (Minitron, arXiv 2407.14679, tables 17 and 18): embedding and block_output."""
    layers: tuple[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]], ...] | None = None
    """Pairs of a teacher's and a student's layer, counted from 0; None: the third from the end of each."""
    loss: Literal["cosine", "mse"] = "cosine"
    """Of streams; attention is compared by its relations."""
    weight: float | None = Field(None, gt=0)
    """None: such that in the step before it would have been as large as the loss of the logits."""


class CorrectionRecipe(_Strict):
    """How the teacher goes on learning from the text while it teaches (`distill.correction`); it has to run along."""

    trains: Literal["nothing", "full", "norms", "lora"] = "nothing"
    """As `distill.trains`; what it learns is not kept."""
    lora_rank: int = Field(16, ge=1)
    learning_rate: float = Field(1e-4, gt=0)
    """At the peak of the student's schedule."""


class DistillRecipe(_Strict):
    """How the student is taught."""

    tokens: Count = 2_000_000
    documents: Literal["joined", "apart"] = "joined"
    """Of a block: attention and positions run on from one to the next, or begin anew with each."""
    batch_size: int = Field(8, ge=1)
    """Blocks a step, over all ranks."""
    micro_batch_size: int = Field(1, ge=1)
    """Blocks a forward pass."""
    learning_rate: float = Field(5e-4, gt=0)
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After the warm-up: a cosine; or the peak, and a straight line down at the end."""
    min_learning_rate_ratio: float = Field(0.1, ge=0, le=1)
    decay_ratio: float = Field(0.2, gt=0, le=1)
    """The share of the steps over which `wsd` comes down."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    optimizer: Literal["adamw", "adamw8bit", "muon"] = "adamw"
    """AdamW; with moments of eight bits (torchao); or Muon for the layers' matrices and AdamW for the rest."""
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    trains: Literal["full", "norms", "lora"] = "full"
    """All parameters; those of the norms; or low-rank adapters, which are merged in at the end."""
    lora_rank: int = Field(16, ge=1)
    loss: Literal["forward_kl", "reverse_kl", "jsd", "mse", "cosine"] = "forward_kl"
    """How far the student's distribution is from the teacher's (`distillation.losses`)."""
    temperature: float = Field(1.0, gt=0)
    beta: float = Field(0.5, gt=0, lt=1)
    """The teacher's share of the mixture that `jsd` compares with."""
    top_k: int | None = Field(None, ge=1)
    """Only so many of the teacher's likeliest tokens are told apart, all others are one class; None: all."""
    teacher_states: str | None = None
    """A folder where the teacher's word on every block is kept, written if it is not there; None: the teacher runs
    along."""
    stored: Literal["hidden", "top_k"] = "hidden"
    """What is kept: last hidden states, which give exact logits, or the `top_k` likeliest tokens and a tail."""
    stored_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Of hidden states."""
    label_weight: float = Field(0.0, ge=0)
    """Weight of the cross-entropy of the text's own next token, added to that loss."""
    intermediate: IntermediateRecipe = IntermediateRecipe()
    correction: CorrectionRecipe = CorrectionRecipe()
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Beside `metrics.jsonl`; each has to be installed."""
    activation_checkpointing: bool = False
    """Layers compute their insides anew for the backward pass: a third more work, memory for one layer at a time."""
    compile: bool = False
    """Layers and the comparison of logits go through `torch.compile`."""
    checkpoint_seconds: float = Field(60.0, ge=0)
    """Time between checkpoints; it changes no result."""

    @model_validator(mode="after")
    def _top_k_fits(self) -> "DistillRecipe":
        if self.stored == "top_k" and self.top_k is None:
            raise ValueError("stored: top_k needs top_k, the number of tokens that are kept")
        if self.top_k is not None and self.loss in {"mse", "cosine"}:
            raise ValueError(f"top_k goes with a loss of probabilities, not with {self.loss}")
        if self.teacher_states is not None:
            if self.intermediate.of:
                raise ValueError(
                    "intermediate needs the teacher to run along; teacher_states holds its last states alone"
                )
            if self.correction.trains != "nothing":
                raise ValueError("correction changes the teacher as it runs along; teacher_states holds what it was")
        return self


class LineageRecipe(_Strict):
    """How the members of a family are made (several `target_params`), each out of the next larger one."""

    taught_by: Literal["teacher", "larger"] = "teacher"
    """The teacher of all, or the larger member that a student was cut from."""
    stores_states: bool = True
    """The teacher runs over the text once for all members, and its states are kept until the last one is done."""


class EvaluationRecipe(_Strict):
    """What the final figures are measured on."""

    tokens: Count = 32_768


class Recipe(_Strict):
    """Everything that decides the result of `compress`, but for the machine."""

    teacher: str
    target_params: Annotated[Target | tuple[Target, ...] | None, BeforeValidator(_shares)] = None
    """All parameters; several, each below the one before, make a family."""
    budget: BudgetRecipe = BudgetRecipe()
    family: str | None = None
    """Read the teacher as this `model_type`, whatever its config says."""
    data: Data = "wiki"
    """A source, or a mixture: source → weight, by characters."""
    context: int | None = Field(None, ge=2)
    """Tokens in a block; by default 1,024, or all that the teacher was made for if that is less."""
    seed: int = Field(0, ge=0, lt=2**32)
    device: str = "auto"
    dtype: str = "auto"
    calibration: CalibrationRecipe = CalibrationRecipe()
    depth: DepthRecipe = DepthRecipe()
    search: SearchRecipe = SearchRecipe()
    prune: PruneRecipe = PruneRecipe()
    distill: DistillRecipe = DistillRecipe()
    lineage: LineageRecipe = LineageRecipe()
    evaluation: EvaluationRecipe = EvaluationRecipe()


RecipeSource = str | Path | Recipe | None
"""A YAML file, the name of a built-in recipe, a recipe, or None: the defaults."""


def load_recipe(path: Path | None, overrides: dict[str, Any]) -> Recipe:
    """The recipe in a YAML file with command-line options laid over it; `a.b` names an entry of a part.

    `path` may be the name of a recipe that comes along, such as `minitron-8b`.

    Raises:
        UserError: the file is missing or no mapping, or a key or a value is not accepted.
    """
    return _overlaid(_read_yaml(_of_name(path)) if path else {}, overrides, str(path) if path else "options")


def _overlaid(values: dict[str, Any], overrides: dict[str, Any], where: str) -> Recipe:
    for key, value in overrides.items():
        if value is not None:
            part, _, name = key.rpartition(".")
            target = values
            for step in part.split(".") if part else []:
                target = target.setdefault(step, {})
                if not isinstance(target, dict):
                    raise UserError(f"{where}: {part} must be a mapping of keys to values")
            target[name] = value
    return validate(Recipe, values, where)


def recipe_from(source: RecipeSource = None, **settings: Any) -> Recipe:
    """Return the recipe of a YAML file, of a built-in name or of another recipe, with settings laid over it.

    A setting is a key (`seed=1`), a part with its keys (`distill={"tokens": "2M"}`), or a dotted key; None leaves the
    recipe as it is.

    Raises:
        UserError: the file is missing, or a key or a value is not accepted.
    """
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Path):
            value = str(value)
        is_part = key in Recipe.model_fields and isinstance(Recipe.model_fields[key].default, _Strict)
        flat |= {f"{key}.{name}": entry for name, entry in value.items()} if is_part and value else {key: value}
    if isinstance(source, Recipe):
        return _overlaid(source.model_dump(), flat, "recipe")
    return load_recipe(None if source is None else Path(source), flat)


def option_count(option: str, text: str | int | None) -> int | None:
    """A count given on the command line, or None; what is none is a `UserError` that names the option."""
    try:
        return None if text is None else parse_count(text)
    except ValueError as error:
        raise UserError(f"{option}: {error}") from error


def option_lengths(option: str, text: str) -> list[int]:
    """`1,8` or `512,4k`, as integers; what is none is a `UserError` that names the option."""
    try:
        return [parse_context(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{option}: {error}") from error


def validate(model: type[Model], values: dict[str, Any], where: str) -> Model:
    """Build a model of the recipe, turning the first complaint into one clear line."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{where}: {_first_complaint(model, error)}") from error


def _first_complaint(model: type[BaseModel], error: ValidationError) -> str:
    complaint = error.errors()[0]
    location = ".".join(str(part) for part in complaint["loc"])
    if complaint["type"] == "extra_forbidden":
        owner = model
        for part in complaint["loc"][:-1]:
            annotation = owner.model_fields[str(part)].annotation
            assert isinstance(annotation, type)
            owner = annotation
        return f"unknown key '{location}', {nearest(str(complaint['loc'][-1]), list(owner.model_fields))}"
    if complaint["type"] == "missing":
        return f"{location} is not given"
    return f"{location}: {complaint['msg'].removeprefix('Value error, ')}"


def _of_name(path: Path) -> Path:
    """The file of a recipe that comes along, or the path itself."""
    own = {file.stem: file for file in sorted((Path(__file__).parent / "recipes").glob("*.yaml"))}
    if path.exists() or path.suffix or path.name != str(path):
        return path
    if path.name not in own:
        raise UserError(f"recipe '{path}' is neither a file nor one of {', '.join(own)}")
    return own[path.name]


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise UserError(f"recipe {path} does not exist")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"recipe {path} is no mapping of keys to values")
    return values
