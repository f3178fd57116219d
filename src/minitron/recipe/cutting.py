"""The settings of everything before training: importance, the vocabulary, depth, repairs, budget and search."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from minitron.quantities import parse_context
from minitron.recipe.parts import Count, Derived, DerivedCount, Part, Share, Sizes


class CalibrationRecipe(Part):
    """How the importance of heads, neurons, channels, experts and layers is measured.

    Names of scores and aggregates are those of the tables in `pruning.scores` and `pruning.statistics`, which
    `pruning.require_scores` checks.
    """

    tokens: Count = 32_768
    """Tokens of training text on which importance is measured."""
    other_text: Literal["written", "random"] = "written"
    """What keeps directions for text unlike the calibration text, where hidden is cut along principal directions: text
    that the model writes itself and random tokens, each a quarter as much as `tokens`; or random tokens alone, which
    need only one layer of the model in memory at a time."""
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


class VocabularyRecipe(Part):
    """Which tokens a student keeps, where its vocabulary is cut; docs/studies/vocabulary.md has the measurements."""

    trim: bool = False
    """Let the search choose the size of the vocabulary too, among those that cover 95 to 99.5 % of the training text's
    tokens, or those of `search.space.vocab_size`. Off by default: what leaves is rare words and other languages."""
    tokens: Count = 1_000_000
    """Tokens of text by whose counts tokens are chosen: the training text, and what follows it in the data. Counting is
    cheap, and a short training text lacks words that the student will read."""
    merge_rows: bool = True
    """Give a piece, in embeddings and output matrix, the mean by occurrences of its own row and of those of the tokens
    that leave and begin with it. Without, its row stays as it is."""
    least_coverage: float = Field(0.95, ge=0, le=1)
    """The share of the tokens of held-out text that have to stay. Fewer are an error: the text of the training is then
    too short or too unlike what the student will read, or the vocabulary too small."""


class DepthRecipe(Part):
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


class PruneRecipe(Part):
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


class BudgetRecipe(Part):
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


class Span(Part):
    """Sizes from `first` to `last`, both included, in steps."""

    first: int = Field(ge=1)
    """The smallest size."""
    last: int = Field(ge=1)
    """The largest size."""
    step: int = Field(1, ge=1)
    """Difference between neighbouring sizes."""


class Factors(Part):
    """Sizes that are multiples of another size of one shape, such as an MLP of 2.5, 3 or 4 times hidden."""

    times: Annotated[tuple[Annotated[float, Field(gt=0)], ...], Field(min_length=1)]
    """The factors."""
    of: str = "hidden_size"
    """The config name of the size that is multiplied."""


class SearchRecipe(Part):
    """How the search finds a shape within the budget; docs/studies/search.md has the measurements."""

    tolerance: float = Field(0.05, gt=0, lt=1)
    """How far a shape may stay below the limit that binds, as a share of that limit."""
    space: dict[str, Sizes | Span | Factors] = Field({})
    """Sizes that the search may choose from, by config name (`hidden_size: [448, 512]`), in place of sizes derived from
    the teacher: a list, a span (`first`, `last`, `step`), or factors of another size (`times`, `of`). Numbers of layers
    of a kind (`num_attention_layers: [4]`) are sizes as well; kinds that are not named share the other layers."""
    multiple_of: dict[str, Annotated[int, Field(ge=1)]] = Field({})
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
