"""The settings of a run: reads YAML, command-line options or keyword arguments into a validated `Recipe`.

The attribute docstrings of the classes below are the reference of all recipe keys. Counts accept suffixes (`40k`,
`2M`). Many defaults are measured in docs/studies.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from minitron.errors import UserError, nearest
from minitron.quantities import parse_context, parse_count

DEFAULT_CONTEXT = 1024
"""Tokens in a block where neither the recipe nor the teacher limits them."""
HELDOUT_PART, MOST_HELDOUT = 16, 16_384
"""Held-out text is a sixteenth of the tokens of the distillation, up to this limit."""


def _share(target: Any) -> Any:
    # 0.7 from YAML and "0.7" from the command line have to give equal recipes, so that a run can be continued.
    try:
        return float(target) if 0 < float(target) <= 1 else str(target)
    except (TypeError, ValueError):
        return target


def _shares(targets: Any) -> Any:
    if isinstance(targets, str) and "," in targets:
        targets = targets.split(",")
    return tuple(map(_share, targets)) if isinstance(targets, (list, tuple)) else _share(targets)


Data = str | Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]
"""One source of documents, or a mixture: a mapping from source to weight."""


def data_in_words(data: Data) -> str:
    """Describe the data in words: `wiki`, or `0.3 of wiki, 0.7 of code.jsonl`."""
    if isinstance(data, str):
        return data
    return ", ".join(f"{weight / sum(data.values()):.3g} of {source}" for source, weight in data.items())


Target = str | float
"""A share of the teacher's figure (0.7), an amount (94M, 20GiB), or a range of amounts (7.8B..8.5B)."""
Model = TypeVar("Model", bound=BaseModel)
Count = Annotated[int, BeforeValidator(parse_count)]
CountOrNone = Annotated[int, BeforeValidator(lambda value: 0 if str(value) == "0" else parse_count(value))]
Derived = Annotated[int | None, BeforeValidator(lambda value: value and (0 if value == "0" else parse_count(value)))]
DerivedCount = Annotated[int | None, BeforeValidator(lambda value: None if value is None else parse_count(value))]
"""A count; None leaves it to the program."""
Share = Annotated[Target, BeforeValidator(_share)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CalibrationRecipe(_Strict):
    """How the importance of heads, neurons, channels, experts and layers is measured.

    Names of scores and aggregates are those of the tables in `pruning.scores` and `pruning.statistics`, which
    `pruning.require_scores` checks.
    """

    tokens: Count = 32_768
    """Tokens of training text on which importance is measured."""
    batch: str = "l2"
    """How the aggregates of all blocks become one score: `l2` (root of the sum of squares), `mean` or `var`. The
    default is Minitron's choice (arXiv 2407.14679, table 13)."""
    sequence: str = "mean"
    """How the activations of one block's tokens become one aggregate: `mean` of absolute values, `l2` norm, or `var`.
    The default is Minitron's choice (arXiv 2407.14679, table 13)."""
    mamba_scores: str = "x"
    """Which activation scores Mamba heads and channels: `x` or `z`, which the input projection computes, or `out_proj`,
    the input of the output projection."""
    expert_scores: str = "reap"
    """How experts are scored: by the norm of their output, with (`reap`) or without (`norm`) the router's weight."""
    ffn_scores: str = "input_of_second"
    """How MLP neurons are scored: by the aggregate of the inputs of the second matrix (`input_of_second`, as
    Model-Optimizer does); by that of the outputs of the first one, before the nonlinearity (`first_linear`, Minitron,
    arXiv 2407.14679, section 2.2), in gated MLPs of the gate, which the nonlinearity is applied to; or by the sum of
    |weight| × activation norm over the weights that read the neuron (`wanda`, arXiv 2306.11695)."""
    head_scores: str = "norm_of_aggregates"
    """How query heads and KV groups are scored, on the inputs of the output projection: by the norm, over the head's
    channels, of each channel's aggregate (`norm_of_aggregates`, as Model-Optimizer does); or by the aggregate of each
    token's norm over the head (`aggregate_of_norms`, Minitron, arXiv 2407.14679, section 2.2)."""


class VocabularyRecipe(_Strict):
    """Which tokens a student keeps, where its vocabulary is cut; docs/studies/vocabulary.md has the measurements."""

    trim: bool = False
    """Let the search choose the size of the vocabulary too, among those that cover 95 to 99.5 % of the training text's
    tokens, or those of `search.space.vocab_size`. Off by default: what leaves is rare words and other languages."""
    least_coverage: float = Field(0.95, ge=0, le=1)
    """The share of the tokens of held-out text that have to stay. Fewer are an error: the text of the training is then
    too short or too unlike what the student will read, or the vocabulary too small."""


class DepthRecipe(_Strict):
    """How the layers to drop are chosen."""

    score: str = "block_influence"
    """What scores a layer. `block_influence` comes from the calibration pass at no further cost; `perplexity`, `kl`,
    `logits_mse` and `task` run the whole model in memory without the layer and measure its loss, KL or logits, or its
    accuracy on a task."""
    removal: Literal["one_shot", "iterative", "contiguous"] = "one_shot"
    """How scores become dropped layers: drop those with the lowest scores at once; drop the lowest one and score the
    others again; or drop the best run of consecutive layers."""
    ranking: Literal["within_kinds", "together"] = "within_kinds"
    """Which layers are compared where layers are of several kinds (Mamba, attention, MLP): those of one kind, after the
    depth is split among the kinds in proportion; or all of them, so that the ranking splits the depth (Minitron-SSM,
    arXiv 2504.11409, section 3; Nemotron Nano 2, arXiv 2508.14444, section 4). The best layer of every kind is kept,
    and numbers of layers that are given by kind (`num_attention_layers`) hold either way. Without weights, as in
    `prune --dry-run`, the depth is split in proportion."""
    tokens: Count = 4_096
    """Calibration tokens on which scores other than `block_influence` and `task` are measured."""
    task: str | None = None
    """The jsonl file of multiple-choice items (see `evaluation.multiple_choice.read_items`) whose accuracy is the score
    `task`."""
    items: Count = 200
    """Use only the first `items` items of `task`."""


class PruneRecipe(_Strict):
    """What repairs a pruned model before any training; docs/studies/pruning.md compares the options."""

    rotate: bool | None = None
    """Cut hidden along principal directions of the residual stream instead of channel by channel. None rotates where
    the family allows it: the gain lasts through distillation."""
    rescale_norms: bool = True
    """Rescale the weights of norms that have lost channels, so that their outputs keep their scale."""
    refit: bool = False
    """Fit the matrices that write the residual stream, layer after layer, to the difference between teacher and
    student. For a model that will not be trained, or hardly: it starts nearer to its teacher, but after training it is
    better only on text of the calibration's kind, and the fit costs as much as training on the calibration tokens."""
    ridge: float = Field(3.0, ge=0)
    """Damping of the refit, as a share of the mean second moment of a matrix's inputs, multiplied by the number of
    inputs over the number of calibration tokens. Much less damping follows the calibration text too closely."""
    rounds: int = Field(1, ge=1)
    """Number of steps in which the model is pruned; importance is measured again before each step."""
    merge_heads: bool = False
    """Add the difference to dropped query heads into the heads that are kept (Minitron, arXiv 2407.14679, section 2.3).
    The paper's rule pairs heads where at most half of a group's heads are dropped; beyond that, every kept head is
    merged with its mirror image at the cut, and the least important heads are dropped unmerged. Off by default: it was
    worse in the comparison of docs/studies/pruning.md."""


CUT_ONLY = PruneRecipe(rotate=False, rescale_norms=False, refit=False)
"""Pruning without rotation, repair or merging of heads."""


class BudgetRecipe(_Strict):
    """Limits that the student has to meet in addition to `target_params`, or instead of it; it meets all of them."""

    non_embedding_params: Share | None = None
    """Limit on the parameters outside the embeddings: a share of the teacher's (0.7), a count (94M) or a range."""
    active_params: Share | None = None
    """Limit on the parameters that one token uses, counting only the experts to which it is routed."""
    memory: Share | None = None
    """Limit on the bytes of weights, KV cache and Mamba state, such as 20GiB, or a share of the teacher's bytes."""
    throughput: str | None = None
    """Least speed of prefill over the whole batch, measured on this device: 1.5x the teacher's, or 900 tok/s."""
    latency: str | None = None
    """Most time per decoded token after the context, measured on this device: 0.7x the teacher's, or 40ms."""
    batch: int = Field(1, ge=1)
    """Number of sequences for which `memory`, `throughput` and `latency` hold."""
    context: Annotated[int, BeforeValidator(parse_context)] = 4096
    """Tokens per sequence for which `memory`, `throughput` and `latency` hold; 128k means 131,072."""
    dtype: Literal["float32", "bfloat16", "float16", "float8"] = "bfloat16"
    """Dtype of weights and cache for the limit on memory; speed is measured in the dtype of the run."""


class Span(_Strict):
    """Sizes from `first` to `last`, both included, in steps."""

    first: int = Field(ge=1)
    """The smallest size."""
    last: int = Field(ge=1)
    """The largest size."""
    step: int = Field(1, ge=1)
    """Difference between neighbouring sizes."""


class Factors(_Strict):
    """Sizes that are multiples of another size of one shape, such as an MLP of 2.5, 3 or 4 times hidden."""

    times: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)]
    """The factors."""
    of: str = "hidden_size"
    """The config name of the size that is multiplied."""


class SearchRecipe(_Strict):
    """How the search finds a shape within the budget; docs/studies/search.md has the measurements."""

    tolerance: float = Field(0.05, gt=0, lt=1)
    """How far a shape may stay below the limit that binds, as a share of that limit."""
    space: dict[str, Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)] | Span | Factors] = {}
    """Sizes that the search may choose from, by config name (`hidden_size: [448, 512]`), in place of sizes derived from
    the teacher: a list, a span (`first`, `last`, `step`), or factors of another size (`times`, `of`). Numbers of layers
    of a kind (`num_attention_layers: [4]`) are sizes as well; kinds that are not named share the other layers."""
    multiple_of: dict[str, Annotated[int, Field(ge=1)]] = {}
    """Step of derived sizes, by config name. The default for widths is 64 or more, as matrix units require."""
    fixed: tuple[str, ...] = ()
    """Sizes that stay as they are in the teacher, by config name, unless `space` lists them. Heads that are fixed keep
    their number per group, if groups are dropped."""
    engine: Literal["vllm", "trtllm", "megatron", "llama.cpp"] | None = None
    """Offer only the shapes that this engine runs, by what was read in its sources (docs/how-to/engines.md)."""
    tensor_parallel: int = Field(1, ge=1)
    """Number of GPUs over which the engine splits every tensor."""
    effort: float = Field(0.25, ge=0)
    """The operations that a search adds at most to those of the distillation, as a share of them. The five numbers
    below follow from it where they are None; those that are given hold, and are counted. The trial of the chosen shape
    is the beginning of its distillation, so it adds nothing. With 0 the shape is predicted from untrained probes."""
    probe_tokens: Derived = None
    """Tokens on which each probe is distilled, one block per step: one shape per axis, cut along this axis alone, to
    learn what cuts of it cost, and the whole teacher, to learn what the training does by itself. None takes at most 4
    blocks: much longer probes predict worse. 0 compares the probes untrained."""
    zero_shot: DerivedCount = None
    """Number of shapes that are cut and compared with the teacher untrained: those with the least predicted loss. None
    takes at most 256. No more than `shortlist` are not compared: there is nothing to choose."""
    zero_shot_tokens: DerivedCount = None
    """Held-out tokens on which untrained shapes and probes are compared with the teacher. None takes 1,024."""
    shortlist: DerivedCount = None
    """Number of shapes that are pruned, repaired and distilled in trials. None takes at most 8."""
    distill_tokens: Derived = None
    """Tokens on which the best two shapes of the short list are distilled. The others stop before: of a longer list,
    only the better half continues after a half of these tokens, or a quarter of them, and a shape that ties with it.
    None takes at most 32,768 tokens, or 16 steps of the distillation where these are more. 0 skips the trials:
    untrained shapes decide."""
    tokens: DerivedCount = None
    """Held-out tokens that rank candidates and follow every distillation. Fewer tokens do not distinguish good shapes:
    between two of them, the difference on one block of 512 tokens varies by 0.07 nats. None takes a sixteenth of
    `distill.tokens`, at most 16,384."""

    @model_validator(mode="after")
    def _engine_is_named(self) -> "SearchRecipe":
        if self.tensor_parallel > 1 and self.engine is None:
            raise ValueError("tensor_parallel is the number of GPUs of an engine: name it by engine (--for)")
        return self


DEEP_CUT = 0.75
"""The share of the teacher's layers, at most which a student has whose depth was cut a lot."""
STATES_BYTES = {"bfloat16": 2, "float32": 4}


class IntermediateRecipe(_Strict):
    """Losses inside the layers, in addition to the loss of the logits; the teacher has to run during training."""

    of: tuple[Literal["embedding", "block_output", "mlp_input", "attention"], ...] | None = None
    """What is compared: embeddings, outputs of layers, inputs of MLPs, attention relations. None compares embeddings
    and layer outputs where the student lacks a quarter of the teacher's layers or more and the teacher runs during
    training, and nothing else (Minitron, arXiv 2407.14679, tables 17 and 18); `[]` compares nothing."""
    layers: tuple[tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=0)]], ...] | None = None
    """Pairs of a teacher's and a student's layer, counted from 0. None compares the third layer from the end of
    each."""
    loss: Literal["cosine", "mse"] = "cosine"
    """Distance between hidden states: 1 − cosine similarity, or squared error. Attention has a distance of its own."""
    norms: Literal["own", "teacher"] = "own"
    """Which norm hidden states have passed: each model's own, after which the projection follows, as in the paper; or
    the teacher's for both, after the projection."""
    weight: float | None = Field(None, gt=0)
    """Weight of the sum of these losses. None weights them in every block of text such that they add as much as the
    loss of the logits there, without the label loss (the paper's dynamic α)."""

    def compared(self, teacher_layers: int, student_layers: int) -> tuple[str, ...]:
        """Return what is compared: what `of` names, or without that the best of table 17 where depth was cut a lot."""
        if self.of is not None:
            return self.of
        return ("embedding", "block_output") if student_layers <= DEEP_CUT * teacher_layers else ()


class OriginalTraining(_Strict):
    """How the teacher itself was trained, as far as it is known; teacher correction follows it (arXiv 2408.11796,
    section 2)."""

    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate, of which correction takes a fifth."""
    min_learning_rate: float | None = Field(None, ge=0)
    """Learning rate at the end, at which `minitron correct` ends as well. None ends at
    `distill.min_learning_rate_ratio` of the peak."""
    schedule: Literal["cosine", "wsd"] | None = None
    """Schedule of `minitron correct`. None takes `distill.schedule`."""


class CorrectionRecipe(_Strict):
    """Training of the teacher on the text: while it teaches, which needs the teacher to run during training, or
    beforehand by `minitron correct`, which was better in docs/studies/distillation.md."""

    trains: Literal["nothing", "full", "norms", "lora"] = "nothing"
    """Which weights of the teacher are trained while it teaches: none, all, those of the norms, or low-rank adapters.
    The trained teacher is not kept."""
    lora_rank: int = Field(16, ge=1)
    """Rank of the adapters, with `trains: lora`."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate of the teacher; while it teaches, it follows the student's schedule. None takes a fifth of the
    `original` one; if that is not given either, 1e-4 while it teaches, and `distill.learning_rate` in `minitron
    correct`."""
    original: OriginalTraining = OriginalTraining()

    @model_validator(mode="after")
    def _has_one_rate(self) -> "CorrectionRecipe":
        if self.learning_rate is not None and self.original.learning_rate is not None:
            raise ValueError("give learning_rate, or original.learning_rate, a fifth of which is the rate, not both")
        return self


class DistillRecipe(_Strict):
    """How the student is trained on the outputs of the teacher."""

    tokens: Count = 2_000_000
    """Tokens to train on; the text is repeated where it is shorter."""
    skip_tokens: CountOrNone = 0
    """Tokens of the training text to pass over at first; `stages` on one text continue where the one before stopped."""
    documents: Literal["joined", "apart"] = "joined"
    """How documents share a block: attention and positions run across them (`joined`), or begin again with each
    document (`apart`), for families that allow it."""
    batch_size: int = Field(8, ge=1)
    """Blocks per optimizer step, over all processes."""
    micro_batch_size: int = Field(1, ge=1)
    """Blocks per forward pass; gradients of a step are accumulated."""
    learning_rate: float = Field(5e-4, gt=0)
    """Peak learning rate; the best of three on SmolLM2 (docs/studies/first-run.md)."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """Learning rate after the warm-up: a cosine, or constant with a linear decay at the end (warm-up, stable,
    decay)."""
    min_learning_rate_ratio: float = Field(0.1, ge=0, le=1)
    """Learning rate at the end, as a share of the peak."""
    decay_ratio: float = Field(0.2, gt=0, le=1)
    """Share of the steps over which `schedule: wsd` decays."""
    warmup_ratio: float | None = Field(None, ge=0, lt=1)
    """Share of the steps over which the learning rate rises to its peak. None takes `warmup_steps`, or without them
    0.05; in `minitron correct` at most 120 steps."""
    warmup_steps: int | None = Field(None, ge=0)
    """Number of steps over which the learning rate rises to its peak, in place of a share of the steps."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """AdamW; or AdamW with moments of 8 bits, a quarter of the memory (needs torchao, in one process)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Norm to which the gradient of a step is clipped."""
    trains: Literal["full", "norms", "lora"] = "full"
    """Which weights are trained: all, those of the norms, or low-rank adapters that are merged into the weights at the
    end (needs peft)."""
    lora_rank: int = Field(16, ge=1)
    """Rank of the adapters, with `trains: lora`."""
    quantize: Literal["fp8", "int8", "int4"] | None = None
    """Train the student for an export in this scheme (quantisation-aware distillation): its matrices compute with the
    values that the export will hold, and are saved as they were before this rounding. None trains the student as it
    is saved."""
    loss: Literal["forward_kl", "reverse_kl", "jsd", "mse", "cosine", "probability_mse", "probability_cosine"] = (
        "forward_kl"
    )
    """Distance between the teacher's and the student's distribution, or between their logits (`mse`, `cosine`); see
    `distillation.losses`."""
    temperature: float = Field(1.0, gt=0)
    """Divisor of both models' logits before the softmax."""
    beta: float = Field(0.5, gt=0, lt=1)
    """Weight of the teacher in the mixture to which `loss: jsd` compares both models."""
    top_k: int | None = Field(None, ge=1)
    """Compare the teacher's `top_k` most likely tokens one by one and all others as one class. None compares all."""
    teacher_states: str | None = None
    """Folder of stored teacher outputs, written if it does not exist, so that later runs on this text need no teacher.
    None runs the teacher during training."""
    stored: Literal["hidden", "top_k"] = "hidden"
    """What `teacher_states` holds: last hidden states, from which exact logits are computed, or the probabilities of
    the `top_k` most likely tokens and of all others together."""
    stored_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Dtype of stored hidden states. bfloat16 takes half the space; the last loss changed by less than 0.1 % on SmolLM2
    (docs/studies/distillation.md)."""
    label_weight: float = Field(0.0, ge=0)
    """Weight of the cross-entropy of the text's own next token, added to the loss of the logits."""
    intermediate: IntermediateRecipe = IntermediateRecipe()
    """Losses inside the layers."""
    correction: CorrectionRecipe = CorrectionRecipe()
    """Training of the teacher while it teaches."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Trackers that receive the curves in addition to `metrics.jsonl`; each has to be installed."""
    activation_checkpointing: bool = False
    """Compute the activations of each layer again in the backward pass: a third more work, and activation memory for
    one layer at a time."""
    compile: bool = False
    """Compile the layers and the comparison of logits with `torch.compile`."""
    checkpoint_seconds: float = Field(60.0, ge=0)
    """Seconds between checkpoints; they change no result."""

    @model_validator(mode="after")
    def _options_fit(self) -> "DistillRecipe":
        if self.warmup_ratio is not None and self.warmup_steps is not None:
            raise ValueError("give warmup_ratio or warmup_steps, not both")
        if self.stored == "top_k" and self.top_k is None:
            raise ValueError("stored: top_k needs top_k, the number of tokens to store")
        if self.top_k is not None and self.loss in {"mse", "cosine"}:
            raise ValueError(f"top_k needs a loss of probabilities, not {self.loss}")
        if self.quantize is not None and self.trains == "lora":
            raise ValueError("quantize rounds the matrices themselves, which trains: lora leaves; give full or norms")
        if self.teacher_states is not None:
            if self.intermediate.of:
                raise ValueError("intermediate needs the teacher in memory; teacher_states holds only its last states")
            if self.correction.trains != "nothing":
                raise ValueError("correction trains the teacher; teacher_states holds the outputs of the untrained one")
        return self

    def num_steps(self, context: int) -> int:
        """Return the number of steps that the tokens make up, in blocks of `context` tokens."""
        return max(1, self.tokens // (self.batch_size * context))

    def stored_bytes(self, hidden_size: int) -> int:
        """Return the bytes of one token's stored teacher outputs, whose hidden states have `hidden_size` channels."""
        if self.stored == "top_k":
            assert self.top_k is not None
            return 4 * self.top_k + 4 * (self.top_k + 1)
        return hidden_size * STATES_BYTES[self.stored_dtype]


class LineageRecipe(_Strict):
    """How the students of a series (several `target_params`) are made, each cut out of the next larger one."""

    taught_by: Literal["teacher", "larger"] = "teacher"
    """Which model teaches: the one teacher of the series, or the larger student that a student was cut from."""
    stores_states: bool = True
    """Run the teacher over the text once for the whole series, and keep its outputs until the last student is done."""


class EvaluationRecipe(_Strict):
    """What the final figures are measured on."""

    tokens: Count = 32_768
    """Tokens of evaluation text, which no other stage sees."""


class Recipe(_Strict):
    """All settings that decide the result of a run, apart from the machine."""

    teacher: str
    """A hub id, a folder, a .gguf file, or the built-in `smollm2`."""
    target_params: Annotated[Target | tuple[Target, ...] | None, BeforeValidator(_shares)] = None
    """Limit on the student's parameters: a share of the teacher's (0.7), a count (94M) or a range (7.8B..8.5B). A
    falling list of targets makes a series of students."""
    budget: BudgetRecipe = BudgetRecipe()
    """Limits on other figures of the student."""
    shape: dict[str, Annotated[int, Field(ge=1)]] = {}
    """Sizes of the student by config name (`hidden_size: 3072`), in place of a budget and a search; sizes that are not
    named stay as they are."""
    family: str | None = None
    """Read the teacher as a model of this `model_type`, whatever its config says. None uses the config's."""
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


_CUT_ONCE: dict[str, Any] = {
    "calibration.batch": "l2",
    "calibration.sequence": "mean",
    "calibration.mamba_scores": "x",
    "depth.score": "block_influence",
    "depth.removal": "one_shot",
    "depth.ranking": "together",
    "prune.rotate": False,
    "prune.rescale_norms": False,
    "prune.refit": False,
    "prune.rounds": 1,
}
BASELINES: dict[str, dict[str, Any]] = {
    "papers": _CUT_ONCE
    | {
        "calibration.ffn_scores": "first_linear",
        "calibration.head_scores": "aggregate_of_norms",
        "prune.merge_heads": True,
    },
    "modelopt": _CUT_ONCE
    | {
        "calibration.ffn_scores": "input_of_second",
        "calibration.head_scores": "norm_of_aggregates",
        "calibration.expert_scores": "norm",
        "prune.merge_heads": False,
    },
}
"""Published methods of pruning by name, as settings by dotted key: `papers` is that of Minitron (arXiv 2407.14679,
sections 2.2 and 2.3; Mamba heads as in arXiv 2504.11409, section 3), `modelopt` that of NVIDIA's Model-Optimizer. The
papers do not score experts. Neither rotates or repairs."""


def baseline(name: str) -> dict[str, Any]:
    """Return the settings of a published method, by dotted key.

    Raises:
        UserError: the name is not one of `BASELINES`.
    """
    if name not in BASELINES:
        raise UserError(f"--plain: unknown value '{name}'; accepted: {', '.join(BASELINES)}")
    return dict(BASELINES[name])


RecipeSource = str | Path | Recipe | Sequence[str | Path] | None
"""A YAML file, the name of a built-in recipe, several of them, each laid over those before, a recipe, or None: the
defaults."""


def load_recipe(path: Path | None, overrides: dict[str, Any]) -> Recipe:
    """Read a recipe from a YAML file and override its values; the key `a.b.c` names an entry of part b of part a.

    `path` may also be the name of a built-in recipe, such as `minitron-8b`.

    Raises:
        UserError: the file is missing or does not hold a mapping, or a key or a value is not accepted.
    """
    return _overlaid(_read_yaml(_resolve(path)) if path else {}, overrides, str(path) if path else "options")


def recipe_from(source: RecipeSource = None, **settings: Any) -> Recipe:
    """Return the recipe of a YAML file, of a built-in name or of another recipe, with settings laid over it.

    A setting is a key (`seed=1`), a part with its keys (`distill={"tokens": "2M"}`), or a dotted key; None is a
    value as in YAML, where it is `null`.

    Raises:
        UserError: a file is missing, or a key or a value is not accepted.
    """
    values: dict[str, Any] = {}
    if isinstance(source, Recipe):
        values, where = source.model_dump(), "recipe"
    else:
        files = [source] if isinstance(source, str | Path) else list(source or ())
        where = " and ".join(map(str, files)) or "options"
        for file in files:
            values = laid_over(values, _read_yaml(_resolve(Path(file))))
    dotted = {key: value for key, value in settings.items() if "." in key}
    plain = {key: str(value) if isinstance(value, Path) else value for key, value in settings.items() if "." not in key}
    return _overlaid(laid_over(values, plain), dotted, where)


def laid_over(values: Mapping[str, Any], changes: Mapping[str, Any], model: type[BaseModel] | None = None) -> Any:
    """Return the values of a recipe with changes laid over them: parts key by key, everything else as a whole."""
    fields, merged = (model or Recipe).model_fields, dict(values)
    for key, change in changes.items():
        part = fields[key].annotation if key in fields else None
        if isinstance(part, type) and issubclass(part, _Strict) and isinstance(change, Mapping):
            before = merged.get(key)
            change = laid_over(before if isinstance(before, Mapping) else {}, change, part)
        merged[key] = change
    return merged


def _overlaid(values: dict[str, Any], overrides: dict[str, Any], where: str) -> Recipe:
    for key, value in overrides.items():
        *parts, name = key.split(".")
        target = values
        for part in parts:
            target = target.setdefault(part, {})
            if not isinstance(target, dict):
                raise UserError(f"{where}: {part} must be a mapping of keys to values")
        target[name] = value
    return validate(Recipe, values, where)


def validate(model: type[Model], values: dict[str, Any], where: str) -> Model:
    """Build a recipe, or a part of one, from plain values.

    Raises:
        UserError: a value is not accepted; the message is the first complaint in one line, prefixed with `where`.
    """
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
    message = complaint["msg"].removeprefix("Value error, ")
    return f"{location}: {message}" if location else message


def built_in_recipes() -> dict[str, Path]:
    """Return the files of the built-in recipes by name, such as `minitron-8b` or `released/minitron-8b`."""
    root = Path(__file__).parent / "recipes"
    return {file.relative_to(root).with_suffix("").as_posix(): file for file in sorted(root.rglob("*.yaml"))}


def _resolve(path: Path) -> Path:
    """Return the file of a built-in recipe by its name, or the path of any other file unchanged."""
    built_in, name = built_in_recipes(), path.as_posix()
    if path.is_file() or path.suffix in {".yaml", ".yml", ".json"}:
        return path
    if name not in built_in:
        raise UserError(f"recipe '{path}' is neither a file nor built in; {nearest(name, list(built_in))}")
    return built_in[name]


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise UserError(f"recipe {path} does not exist")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"recipe {path} must be a mapping of keys to values")
    return values
