"""The memory of a training step, part by part, at the moments at which most is held: from shapes and settings alone.

Every part is something that `distillation` holds: the student's weights, gradients and moments in float32; the teacher;
what autograd keeps of the student's forward pass; and the buffers of the loss. Over several devices these are sharded
as in `distillation.parallel`. What libraries hold by themselves, and memory that an allocator cannot use again, is not
counted: docs/studies/planning.md compares predictions with measurements.
"""

from dataclasses import dataclass
from math import prod

from minitron.model.arch import Arch
from minitron.model.memory import ROWS_BYTES, tokens_at_once, writes_out_attention
from minitron.planning.layers import FLOAT32, Place, layers_of
from minitron.recipe import CorrectionRecipe, DistillRecipe

QUANTISED_BLOCK = 256
"""Entries of a moment of eight bits that share a float32 scale, in torchao."""
LAYERS_GATHERED = 3
"""Layers whose gathered weights are held at a time under FSDP2: the one that runs, the next one, and the buffer from
which that is copied."""


Parts = dict[str, float]
"""Bytes by their use."""


@dataclass(frozen=True)
class Peak:
    """The moment of a step at which one device holds most, and what it holds then."""

    moment: str
    parts: Parts

    @property
    def total(self) -> float:
        """The bytes of all parts."""
        return sum(self.parts.values())


def training_memory(student: Arch, teacher: Arch | None, recipe: DistillRecipe, place: Place) -> Peak:
    """Return what one device holds at the moment of a training step that takes most.

    Without a `teacher` the student learns from the text alone, as in `correct`. The moments are the teacher's forward
    pass, the loss at the end of the student's, the beginning and the end of its backward pass, and the optimizer's
    step. Gradients of earlier micro-batches are held during later ones.
    """
    step = _Step(student, teacher, recipe, place)
    moments = {
        "teacher's forward pass": step.teacher_forward,
        "loss": step.loss,
        "start of the backward pass": step.backward_begins,
        "end of the backward pass": step.backward_ends,
        "optimizer step": step.optimizer_step,
    }
    peaks = [
        Peak(name, {part: size for part, size in {**step.always, **parts}.items() if size})
        for name, parts in moments.items()
    ]
    return max(peaks, key=lambda peak: peak.total)


def trained_parameters(arch: Arch, recipe: DistillRecipe | CorrectionRecipe) -> int:
    """Return the number of parameters that are trained: all, those of the norms, or of the adapters."""
    if recipe.trains == "full":
        return arch.num_parameters
    if recipe.trains == "norms":
        names = {name for norm in arch.family.norms for name in (norm.weight_name(), norm.bias_name())}
        rows = [row for row in arch.rows if row.name in names]
        return sum(arch.axis_size("hidden") * (arch.axis_size("layer") if row.is_per_layer else 1) for row in rows)
    if recipe.trains == "nothing":
        return 0
    return sum(
        count * recipe.lora_rank * sum(matrix.sides) for count, layer in layers_of(arch) for matrix in layer.matrices
    )


def moment_bytes(num_trained: int, recipe: DistillRecipe) -> float:
    """Return the bytes of the optimizer's two moments."""
    each = FLOAT32 if recipe.optimizer == "adamw" else 1 + FLOAT32 / QUANTISED_BLOCK
    return 2 * each * num_trained


def loading_memory(student: Arch, teacher: Arch | None, recipe: DistillRecipe, place: Place) -> float:
    """Return the bytes of the CPU's memory that each of several processes takes before its models are sharded.

    A single process loads onto its device."""
    if place.num_ranks == 1:
        return 0
    in_memory = teacher is not None and recipe.teacher_states is None
    learns = recipe.correction.trains != "nothing"
    of_teacher = teacher.num_parameters * (FLOAT32 if learns else place.width) if teacher and in_memory else 0
    return FLOAT32 * student.num_parameters + of_teacher


@dataclass(frozen=True)
class _Step:
    """The parts of one step, moment by moment, in bytes on one device."""

    student: Arch
    teacher: Arch | None
    recipe: DistillRecipe
    place: Place

    @property
    def tokens(self) -> int:
        """Tokens of a forward pass."""
        return min(self.recipe.micro_batch_size, self._blocks_per_rank) * self.place.context

    @property
    def _blocks_per_rank(self) -> int:
        return max(1, self.recipe.batch_size // self.place.num_ranks)

    @property
    def _accumulates(self) -> bool:
        return self._blocks_per_rank > self.recipe.micro_batch_size

    @property
    def _runs_teacher(self) -> bool:
        return self.teacher is not None and self.recipe.teacher_states is None

    @property
    def _learns(self) -> bool:
        return self.recipe.correction.trains != "nothing" and self._runs_teacher

    @property
    def always(self) -> Parts:
        """What is held throughout."""
        ranks, trained = self.place.num_ranks, trained_parameters(self.student, self.recipe) + self._projection
        adapters = trained if self.recipe.trains == "lora" else self._projection
        parts: Parts = {
            "student weights": FLOAT32 * (self.student.num_parameters + adapters) / ranks,
            "optimizer moments": moment_bytes(trained, self.recipe) / ranks,
        }
        if self.teacher is not None:
            parts["teacher weights"] = self._teacher_weights
        if self.teacher is not None and self._learns:
            learning = trained_parameters(self.teacher, self.recipe.correction)
            parts["teacher gradients and moments"] = (FLOAT32 * learning + moment_bytes(learning, self.recipe)) / ranks
        return parts

    @property
    def _teacher_weights(self) -> float:
        assert self.teacher is not None
        head = self.teacher.axis_size("vocab") * self.teacher.axis_size("hidden")
        if not self._runs_teacher:
            return self.place.width * head if self.recipe.stored == "hidden" else 0
        width, ranks = FLOAT32 if self._learns else self.place.width, self.place.num_ranks
        gathered = width * _outside_layers(self.teacher) if ranks > 1 else 0  # stays so for the student's loss
        return width * self.teacher.num_parameters / ranks + gathered

    @property
    def gradients(self) -> float:
        """The gradients of all parameters that are trained."""
        trained = trained_parameters(self.student, self.recipe) + self._projection
        return FLOAT32 * trained / self.place.num_ranks

    @property
    def teacher_forward(self) -> Parts:
        """The teacher runs, one layer's activations at a time; of a teacher that learns, all are kept."""
        if self.teacher is None or not self._runs_teacher:
            return {}
        width = max(layer.widest for _, layer in layers_of(self.teacher))
        working = (3 * width + 4 * self.teacher.axis_size("hidden")) * self.place.width * self.tokens
        gathered = self._gathered_layer(self.teacher, self.place.width) if self.place.num_ranks > 1 else 0
        return self._earlier | {"teacher activations": working + self._teacher_kept, "gathered layers": gathered}

    @property
    def loss(self) -> Parts:
        """All activations of the student are kept, and the buffers of the loss are full."""
        buffer, operands = self._logits
        head = self._head if self.recipe.trains == "full" else 0
        states = FLOAT32 * self.tokens * self.student.axis_size("hidden")
        return self._earlier | self._forward | {
            "weights cast to bfloat16": self._cast(is_backward=False),
            "logits of the loss": buffer + operands,
            "gradients of head and states": FLOAT32 * head + states,
        }  # fmt: skip

    @property
    def backward_begins(self) -> Parts:
        """All activations are kept, and the last layer's gradients are formed."""
        head = self._head if self.recipe.trains == "full" else 0
        layer = max((layer for _, layer in layers_of(self.student)), key=lambda layer: layer.widest)
        of_layer: float = (3 * layer.widest * self.place.width + 4 * layer.hidden * FLOAT32) * self.tokens
        largest = max((prod(matrix.sides) for matrix in layer.matrices), default=0)
        of_layer += (FLOAT32 + (self.place.width if self.place.is_mixed else 0)) * largest
        if self.recipe.activation_checkpointing:
            rounds = self._rounds_inputs
            keeps = {"rounds_inputs": rounds, "writes_out": _writes_out(self.student, self.recipe, self.place)}
            kept = (layer.kept_bytes(self.place, **keeps) for _, layer in layers_of(self.student))
            of_layer += max(kept) * self.tokens
        if self.place.num_ranks > 1:  # gradients of a gathered layer, before they are summed over the ranks
            of_layer += (self.place.width + FLOAT32) * layer.num_parameters
        return self._earlier | self._forward | {
            "weights cast to bfloat16": self._cast(is_backward=True),
            "gradients of head and states": FLOAT32 * head,
            "gradients of one layer": of_layer,
        }  # fmt: skip

    @property
    def backward_ends(self) -> Parts:
        """All gradients are there; that of the embeddings is formed whole, and added to that of the head if tied."""
        is_full = self.recipe.trains == "full"
        embeddings = FLOAT32 * self._head * (2 if _is_tied(self.student) else 1) if is_full else 0
        gathered = FLOAT32 * _outside_layers(self.student) if self.place.num_ranks > 1 else 0
        return {
            "gradients": self.gradients,
            "gradients of embeddings": embeddings,
            "gathered layers": gathered,
        }

    @property
    def optimizer_step(self) -> Parts:
        """All gradients are there, and nothing else."""
        return {"gradients": self.gradients}

    @property
    def _earlier(self) -> Parts:
        return {"gradients": self.gradients} if self._accumulates else {}

    @property
    def _forward(self) -> Parts:
        """What the student's forward pass leaves for the backward pass, with the teacher's outputs."""
        place, arch = self.place, self.student
        gathered = 0.0
        if place.num_ranks > 1:
            gathered = self._gathered_layer(arch, place.width) + FLOAT32 * _outside_layers(arch)
        return {
            "student activations": self._student_kept,
            "rounded weights": self._rounded_weights,
            "gathered layers": gathered,
            "teacher outputs": self._outputs + self._teacher_kept,
            "intermediate states": self._intermediate_states,
        }

    @property
    def _rounds_inputs(self) -> bool:
        return self.recipe.quantize in {"fp8", "int8"}

    @property
    def _rounded_weights(self) -> float:
        """The values that matrices compute with, which autograd keeps, of all layers or of the one that runs.

        Where autocast casts them in a single process, they are counted as weights in bfloat16.
        """
        if self.recipe.quantize is None or (self.place.is_mixed and self.place.num_ranks == 1):
            return 0
        sizes = [(count, sum(prod(m.sides) for m in layer.matrices)) for count, layer in layers_of(self.student)]
        if self.recipe.activation_checkpointing:
            return self.place.width * max(size for _, size in sizes)
        return self.place.width * sum(count * size for count, size in sizes)

    def _cast(self, *, is_backward: bool) -> float:
        """Weights in the dtype of the forward pass: autocast keeps all until that is over, autograd those it needs."""
        if self.place.num_ranks > 1 or not self.place.is_mixed:
            return 0
        layers = layers_of(self.student)
        if is_backward and self.recipe.activation_checkpointing:
            return self.place.width * max(layer.num_parameters for _, layer in layers)
        return self.place.width * sum(count * layer.num_parameters for count, layer in layers)

    @property
    def _student_kept(self) -> float:
        return _kept(self.student, self.recipe, self.place, rounds_inputs=self._rounds_inputs) * self.tokens

    @property
    def _teacher_kept(self) -> float:
        if self.teacher is None or not self._learns:
            return 0
        return _kept(self.teacher, self.recipe, self.place) * self.tokens

    @property
    def _outputs(self) -> float:
        if self.teacher is None:
            return 0
        return self.tokens * (
            self.place.width * self.teacher.axis_size("hidden")
            if self._runs_teacher
            else self.recipe.stored_bytes(self.teacher.axis_size("hidden"))
        )

    @property
    def _kinds(self) -> tuple[str, ...]:
        if self.teacher is None or not self._runs_teacher:
            return ()
        return self.recipe.intermediate.compared(self.teacher.axis_size("layer"), self.student.axis_size("layer"))

    @property
    def _projection(self) -> int:
        widths = (self.student.axis_size("hidden"), self.teacher.axis_size("hidden")) if self.teacher else (0, 0)
        return prod(widths) if set(self._kinds) - {"attention"} and widths[0] != widths[1] else 0

    @property
    def _intermediate_states(self) -> float:
        """Of each place: the teacher's states, the student's after the projection, and their normalised copies."""
        if self.teacher is None or not self._kinds:
            return 0
        num_pairs = len(self.recipe.intermediate.layers or ((0, 0),))
        places = sum(1 if kind == "embedding" else num_pairs for kind in self._kinds)
        return places * self.tokens * 4 * FLOAT32 * self.teacher.axis_size("hidden")

    @property
    def _head(self) -> int:
        return self.student.axis_size("vocab") * self.student.axis_size("hidden")

    @property
    def _logits(self) -> tuple[float, float]:
        """The buffers of logits, with what a comparison needs in addition, and the heads in the dtype of products."""
        place, vocab = self.place, self.student.axis_size("vocab")
        if self.teacher is None:
            return 3.0 * FLOAT32 * 256 * vocab, 0.0  # see `evaluation.perplexity.next_token_nll`
        buffer = FLOAT32 * vocab * tokens_at_once(self.tokens, vocab, place.device)
        compared = min(buffer, ROWS_BYTES[place.device])
        num_buffers = 1 if self.recipe.stored == "top_k" and not self._runs_teacher else 2
        num_compared = 1 + (self.recipe.loss == "jsd") + bool(self.recipe.label_weight)
        operands: float = 0
        if place.is_mixed:
            teacher_head = self.teacher.axis_size("vocab") * self.teacher.axis_size("hidden")
            # Products of bfloat16 are computed on GPUs as they are, on CPUs with operands in float32.
            operands = place.width * self._head if place.device == "cuda" else FLOAT32 * teacher_head
        return num_buffers * buffer + num_compared * compared, operands

    def _gathered_layer(self, arch: Arch, width: int) -> float:
        return LAYERS_GATHERED * width * max(layer.num_parameters for _, layer in layers_of(arch))


def _kept(arch: Arch, recipe: DistillRecipe, place: Place, *, rounds_inputs: bool = False) -> float:
    """Return the bytes per token that autograd keeps of a forward pass."""
    hidden, final = arch.axis_size("hidden"), 3 * FLOAT32 * arch.axis_size("hidden")
    if recipe.activation_checkpointing:
        return arch.axis_size("layer") * FLOAT32 * hidden + final
    keeps = {"rounds_inputs": rounds_inputs, "writes_out": _writes_out(arch, recipe, place)}
    layers = ((count, layer.kept_bytes(place, **keeps)) for count, layer in layers_of(arch))
    return sum(count * kept for count, kept in layers) + final


def _writes_out(arch: Arch, recipe: DistillRecipe, place: Place) -> bool:
    """Return whether attention is written out in a training."""
    if place.attention is not None:
        return place.attention == "eager"
    return writes_out_attention(arch, recipe.micro_batch_size, place.context, place.device)


def _outside_layers(arch: Arch) -> int:
    """Return the number of parameters outside the layers, such as embeddings."""
    return arch.num_parameters - sum(count * layer.num_parameters for count, layer in layers_of(arch))


def _is_tied(arch: Arch) -> bool:
    return arch.output is arch.embedding
