"""The memory of a training step, part by part, at the moments at which most is held: from shapes and settings alone.

Every part is something that `distillation` holds: the student's weights, gradients and moments in float32; the teacher;
what autograd keeps of the student's forward pass; and the buffers of the loss. Over several devices these are sharded
as in `distillation.parallel`. What libraries hold by themselves, and memory that an allocator cannot use again, is not
counted: docs/studies/planning.md compares predictions with measurements.
"""

from dataclasses import dataclass
from math import prod

from minitron.model.anatomy import Row
from minitron.model.arch import Arch
from minitron.model.memory import DTYPE_BYTES, ROWS_BYTES, tokens_at_once
from minitron.planning.work import layers_along, size_of
from minitron.recipe import CorrectionRecipe, DistillRecipe

FLOAT32 = 4
QUANTISED_BLOCK = 256
"""Entries of a moment of eight bits that share a float32 scale, in torchao."""
LAYERS_GATHERED = 3
"""Layers whose gathered weights are held at a time under FSDP2: the one that runs, the next one, and the buffer from
which that is copied."""


@dataclass(frozen=True)
class Place:
    """Where a step runs: tokens of a block, dtype of forward passes, kind of device, and the number of processes."""

    context: int
    dtype: str
    device: str
    num_ranks: int = 1

    @property
    def width(self) -> int:
        """Bytes of a number of the forward pass."""
        return DTYPE_BYTES[self.dtype]

    @property
    def is_mixed(self) -> bool:
        """Whether matrices of float32 are cast to a narrower dtype for the forward pass."""
        return self.width < FLOAT32


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
        "begin of the backward pass": step.backward_begins,
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
        count * recipe.lora_rank * sum(matrix.sides) for count, layer in _layers(arch) for matrix in layer.matrices
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
class _Matrix:
    """A matrix of a layer: the channels that enter and leave it, and how it meets the residual stream."""

    enters: int
    leaves: int
    reads_stream: bool

    @property
    def sides(self) -> tuple[int, int]:
        return self.enters, self.leaves


@dataclass(frozen=True)
class _Layer:
    """What decides the activations of a layer: numbers of channels per token."""

    matrices: tuple[_Matrix, ...]
    num_parameters: int
    norms: int
    """Channels that autograd keeps of norms, in float32."""
    activated: int
    """Channels of a gated MLP's nonlinearity, which is kept in addition to what enters and leaves matrices."""
    query_heads: int
    hidden: int

    @property
    def widest(self) -> int:
        return max((matrix.leaves for matrix in self.matrices if matrix.reads_stream), default=self.hidden)

    def kept_bytes(self, place: Place) -> float:
        """Return the bytes per token that autograd keeps of the layer.

        Kept are the input of a norm and the normalised input, in float32; what enters a matrix; what leaves a matrix
        that reads the stream: queries, keys, values, both factors of a gated MLP; and the logsumexp of attention. The
        readers of a norm share its output in float32, but autocast makes a copy for each.
        """
        readers = [matrix for matrix in self.matrices if matrix.reads_stream]
        others = [matrix.enters for matrix in self.matrices if not matrix.reads_stream]
        left = sum(matrix.leaves for matrix in readers)
        num_inputs = len(readers) if place.is_mixed else self._num_blocks
        channels = num_inputs * self.hidden + left + sum(others) + self.activated
        return place.width * channels + FLOAT32 * (self.norms + self.query_heads)

    @property
    def _num_blocks(self) -> int:
        return len([matrix for matrix in self.matrices if matrix.leaves == self.hidden and not matrix.reads_stream])


def _layers(arch: Arch) -> list[tuple[int, _Layer]]:
    """Return the layers of every kind, each with their number."""
    kinds = arch.layer_counts or {"": arch.axis_size("layer")}
    return [(count, _layer(arch, kind or None)) for kind, count in kinds.items() if count]


def _layer(arch: Arch, kind: str | None) -> _Layer:
    rows = [row for row in arch.rows if row.is_per_layer and row.kind in {None, kind} and not row.is_buffer]
    matrices = [(row, matrix) for row in rows for matrix in _matrices(arch, row)]
    names = {norm.weight_name() for norm in arch.family.layer_norms}
    num_norms = sum(row.name in names for row in rows)
    of_heads = [row for row in rows if row.axes == {"head_dim"}]
    heads = size_of(arch, "query") if any("query" in row.axes for row in rows) else 0
    per_norm = 1 if arch.family.is_centred else 2  # torch's LayerNorm normalises its input again
    normalised_heads = (heads + size_of(arch, "kv")) * size_of(arch, "head_dim") if of_heads else 0
    mixer = size_of(arch, "mhead") * size_of(arch, "mchan") if any("mhead" in row.axes for row in rows) else 0
    gates = [
        matrix.leaves
        for row, matrix in matrices
        if matrix.reads_stream and row.axes & {"ffn", "expert_ffn", "shared_ffn"}
    ]
    return _Layer(
        tuple(matrix for _, matrix in matrices),
        _num_parameters(arch, rows),
        num_norms * per_norm * arch.axis_size("hidden") + 2 * normalised_heads + 3 * mixer,
        sum(gates) // 2 if len(gates) > 1 or any(row.is_stacked for row, _ in matrices) else 0,
        heads,
        arch.axis_size("hidden"),
    )


def _matrices(arch: Arch, row: Row) -> list[_Matrix]:
    """Return the matrices of a row as one token passes them: of experts, those that it is routed to."""
    if len(row.dimensions) < 2 or row.axes & {"conv"}:
        return []
    sizes = row.shape(arch.axis_size)[1 if row.is_stacked else 0 :]
    if len(sizes) != 2:
        return []
    hidden = arch.axis_size("hidden")
    is_of_experts = row.is_per_expert or row.is_stacked
    reads = any(norm.is_read_by(row) for norm in arch.family.layer_norms) or (
        "hidden" in row.axes and sizes[0] != hidden
    )
    others = [size for size, dimension in zip(sizes, row.dimensions[-2:], strict=True) if dimension != (("hidden",),)]
    other = others[0] if others else hidden
    if "hidden" not in row.axes:  # within a latent space
        matrix = _Matrix(sizes[1], sizes[0], reads_stream=False)
    else:
        matrix = _Matrix(hidden, other, True) if reads else _Matrix(other, hidden, False)
    return [matrix] * (arch.axis_size("chosen") if is_of_experts else 1)


def _num_parameters(arch: Arch, rows: list[Row]) -> int:
    experts = size_of(arch, "expert")
    return sum(prod(row.shape(arch.axis_size)) * (experts if row.is_per_expert else 1) for row in rows)


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
        width = max(layer.widest for _, layer in _layers(self.teacher))
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
            "logits of the loss": buffer + operands,
            "gradients of head and states": FLOAT32 * head + states,
        }  # fmt: skip

    @property
    def backward_begins(self) -> Parts:
        """All activations are kept, and the last layer's gradients are formed."""
        head = self._head if self.recipe.trains == "full" else 0
        layer = max((layer for _, layer in _layers(self.student)), key=lambda layer: layer.widest)
        of_layer = (3 * layer.widest * self.place.width + 4 * layer.hidden * FLOAT32) * self.tokens
        largest = max((prod(matrix.sides) for matrix in layer.matrices), default=0)
        of_layer += (FLOAT32 + (self.place.width if self.place.is_mixed else 0)) * largest
        if self.recipe.activation_checkpointing:
            of_layer += max(layer.kept_bytes(self.place) for _, layer in _layers(self.student)) * self.tokens
        if self.place.num_ranks > 1:  # gradients of a gathered layer, before they are summed over the ranks
            of_layer += (self.place.width + FLOAT32) * layer.num_parameters
        return self._earlier | self._forward | {
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
        cast, gathered = 0.0, 0.0
        if place.num_ranks > 1:
            gathered = self._gathered_layer(arch, place.width) + FLOAT32 * _outside_layers(arch)
        elif place.is_mixed:  # autocast keeps its copies of matrices until the backward pass is over
            in_layers = sum(count * prod(matrix.sides) for count, layer in _layers(arch) for matrix in layer.matrices)
            cast = place.width * in_layers
            if self.recipe.activation_checkpointing:
                cast = place.width * max(
                    sum(prod(matrix.sides) for matrix in layer.matrices) for _, layer in _layers(arch)
                )
        return {
            "student activations": self._student_kept,
            "student weights in the forward pass's dtype": cast,
            "gathered layers": gathered,
            "teacher outputs": self._outputs + self._teacher_kept,
            "intermediate states": self._intermediate_states,
        }

    @property
    def _student_kept(self) -> float:
        return _kept(self.student, self.recipe, self.place) * self.tokens + self._mask

    @property
    def _teacher_kept(self) -> float:
        if self.teacher is None or not self._learns:
            return 0
        return _kept(self.teacher, self.recipe, self.place) * self.tokens

    @property
    def _mask(self) -> float:
        """Where documents are kept apart: a mask, and keys and values repeated for every query head."""
        if self.recipe.documents == "joined" or not size_of(self.student, "query"):
            return 0
        missing = self.student.axis_size("query") - size_of(self.student, "kv")
        repeated = 2 * missing * self.student.axis_size("head_dim") * self.place.width
        return self.tokens * (self.place.context + repeated * layers_along(self.student, "query"))

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
        operands = 0.0
        if place.is_mixed:
            teacher_head = self.teacher.axis_size("vocab") * self.teacher.axis_size("hidden")
            # Products of bfloat16 are computed on GPUs as they are, on CPUs with operands in float32.
            operands = place.width * self._head if place.device == "cuda" else FLOAT32 * teacher_head
        return num_buffers * buffer + num_compared * compared, operands

    def _gathered_layer(self, arch: Arch, width: int) -> float:
        return LAYERS_GATHERED * width * max(layer.num_parameters for _, layer in _layers(arch))


def _kept(arch: Arch, recipe: DistillRecipe, place: Place) -> float:
    """Return the bytes per token that autograd keeps of a forward pass."""
    hidden, final = arch.axis_size("hidden"), 3 * FLOAT32 * arch.axis_size("hidden")
    if recipe.activation_checkpointing:
        return arch.axis_size("layer") * FLOAT32 * hidden + final
    return sum(count * layer.kept_bytes(place) for count, layer in _layers(arch)) + final


def _outside_layers(arch: Arch) -> int:
    """Return the number of parameters outside the layers, such as embeddings."""
    return arch.num_parameters - sum(count * layer.num_parameters for count, layer in _layers(arch))


def _is_tied(arch: Arch) -> bool:
    return arch.output is arch.embedding
