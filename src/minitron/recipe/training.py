"""The settings of trainings: distillation, losses inside the layers, and correction of the teacher."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from minitron.recipe.parts import Count, CountOrNone, Part

DEEP_CUT = 0.75
"""The share of the teacher's layers, at most which a student has whose depth was cut a lot."""
ENOUGH_STEPS = 50
"""Steps that a training takes at least where its batch is not given and can be smaller."""
STATES_BYTES = {"bfloat16": 2, "float32": 4}
Documents = Literal["joined", "apart", "whole"]


class IntermediateRecipe(Part):
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


class OriginalTraining(Part):
    """How the teacher itself was trained, as far as it is known; teacher correction follows it (arXiv 2408.11796,
    section 2)."""

    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate, of which correction takes a fifth."""
    min_learning_rate: float | None = Field(None, ge=0)
    """Learning rate at the end, at which `minitron correct` ends as well. None ends at
    `distill.min_learning_rate_ratio` of the peak."""
    schedule: Literal["cosine", "wsd"] | None = None
    """Schedule of `minitron correct`. None takes `distill.schedule`."""


class CorrectionRecipe(Part):
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


class TuneRecipe(Part):
    """Training of a model on the text itself, by `minitron tune`; what is not listed here is as `distill` states it."""

    epochs: float = Field(3.0, gt=0)
    """How often the data is read."""
    learning_rate: float | None = Field(None, gt=0)
    """Peak learning rate. None takes 1e-4, or 5e-4 for adapters (docs/studies/tuning.md)."""
    documents: Documents = "whole"
    """How documents share a block, see `distill.documents`."""
    keeps_adapter: bool = False
    """Keep the adapters of `distill.trains: lora` in the folder `adapter` of the result, besides merging them."""


class PreferRecipe(Part):
    """Training on pairs of answers, by `minitron prefer`, of which people prefer one (DPO, arXiv 2305.18290)."""

    epochs: float = Field(1.0, gt=0)
    """How often the pairs are read."""
    learning_rate: float = Field(5e-6, gt=0)
    """Peak learning rate."""
    batch_size: int = Field(8, ge=1)
    """Pairs per optimizer step."""
    beta: float = Field(0.1, gt=0)
    """Strength with which the model is held to what it was before."""
    loss: Annotated[
        tuple[Literal["sigmoid", "sigmoid_norm", "hinge", "ipo", "robust", "apo_zero", "apo_down", "sft"], ...],
        Field(min_length=1),
    ] = ("sigmoid",)
    """Losses of trl that are added: `sigmoid` is DPO, and `sft` the negative log-likelihood of the preferred answer."""
    reward_scale: float | None = Field(None, gt=0)
    """Factor on the rewards that pairs hold, such as 1: the model learns by how much an answer is better, not only that
    it is (RPO, arXiv 2406.11704, section 3.3.2). None takes no rewards."""

    @model_validator(mode="after")
    def _learns_by_dpo(self) -> "PreferRecipe":
        if self.reward_scale is not None and "sigmoid" not in self.loss:
            raise ValueError("reward_scale turns pairs around for the loss sigmoid, which is not among prefer.loss")
        return self


class OnPolicyRecipe(Part):
    """Steps at the end of a distillation in which the student continues the text itself, and learns from what the
    teacher expects there: a student that is trained on text alone never sees its own mistakes."""

    share: float = Field(0.0, ge=0, le=1)
    """Share of the steps. Half of a step's tokens are the student's own then, and generating them takes time. It pays
    after long trainings alone (docs/studies/tuning.md)."""
    tokens: tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = (32, 256)
    """Tokens that the student continues a beginning of equal length by, in the first and in the last of these steps;
    it doubles in between. At most half of a block."""
    loss: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """Distance between the teacher's and the student's distribution on the continuation."""


class DistillRecipe(Part):
    """How the student is trained on the outputs of the teacher."""

    tokens: Count = 2_000_000
    """Tokens to train on; the text is repeated where it is shorter."""
    skip_tokens: CountOrNone = 0
    """Tokens of the training text to pass over at first; `stages` on one text continue where the one before stopped."""
    documents: Documents = "joined"
    """How documents share a block: attention and positions run across them (`joined`), or begin again with each
    document (`apart`), for families that allow it. `whole` is like `apart`, and cuts only documents that are longer
    than a block: the rest of a block is padding, and families that cannot keep documents apart get one per block."""
    batch_size: int = Field(8, ge=1)
    """Blocks per optimizer step, over all processes. Where it is not given, it is 8, 4, 2 or 1, the largest that
    leaves 50 steps and that processes of torchrun can share: a short training of few large steps learns little
    (docs/studies/token-efficiency.md)."""
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
    eps: float | None = Field(None, gt=0)
    """AdamW's ε: weights whose gradient is smaller take smaller steps. None takes 0.3 of the root mean square of a
    clipped gradient, `max_grad_norm` (at most 1) over the root of the number of weights, so that tokens and directions
    that the text hardly uses stay as they were (docs/studies/token-efficiency.md)."""
    weight_decay: float = Field(0.0, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Norm to which the gradient of a step is clipped."""
    trains: Literal["full", "norms", "lora", "lisa"] = "full"
    """Which weights are trained: all; those of the norms; low-rank adapters that are merged into the weights at the end
    (`lora`, needs peft); or embeddings, output matrix, final norm and a few layers, which are drawn again every few
    steps (`lisa`, arXiv 2403.17919)."""
    lora_rank: int = Field(16, ge=1)
    """Rank of the adapters, with `trains: lora`."""
    lisa_layers: int = Field(2, ge=1)
    """Number of layers that train at a time, with `trains: lisa`."""
    lisa_steps: int = Field(5, ge=1)
    """Number of steps after which other layers are drawn, with `trains: lisa`."""
    neftune_alpha: float | None = Field(None, gt=0)
    """Size of uniform noise on the embeddings in training (NEFTune, arXiv 2310.05914, section 2), such as 5. None adds
    none."""
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
    on_policy: OnPolicyRecipe = OnPolicyRecipe()
    """Continuations by the student at the end."""
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
        if self.on_policy.share and (self.compile or self.correction.trains != "nothing"):
            raise ValueError("on_policy generates with the student: leave out compile and correction.trains")
        if self.on_policy.share and self.documents == "whole":
            raise ValueError(
                "on_policy continues any place of a block, which documents: whole pads; give joined or apart"
            )
        if self.on_policy.tokens[0] > self.on_policy.tokens[1]:
            raise ValueError("on_policy.tokens: continuations grow, so the first number is the smaller one")
        if self.teacher_states is not None:
            if self.on_policy.share:
                raise ValueError("on_policy needs the teacher in memory; teacher_states holds its outputs on the text")
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
