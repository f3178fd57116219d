"""What autograd keeps of a layer's forward pass, and how many parameters a layer has, from a family's table alone."""

from dataclasses import dataclass
from math import prod

from minitron.model.anatomy import Row
from minitron.model.arch import Arch
from minitron.model.memory import DTYPE_BYTES
from minitron.model.work import size_of

FLOAT32 = 4
MIXER_COPIES = 3
"""Copies of a Mamba mixer's channels that fused kernels keep in addition to what enters and leaves its matrices: of the
convolution, of its output, and of the gated norm. This is an estimate, in float32; it was not measured."""


@dataclass(frozen=True)
class Place:
    """Where a step runs: tokens of a block, dtype of forward passes, kind of device, and the number of processes."""

    context: int
    dtype: str
    device: str
    num_ranks: int = 1
    masked: float = 0.0
    """The share of the attention layers that need a mask, for windows or documents: keys and values are repeated."""
    attention: str | None = None
    """The recipe's `attn_implementation`; None: as a training that rounds products chooses, see
    `memory.writes_out_attention`."""

    @property
    def width(self) -> int:
        """Bytes of a number of the forward pass."""
        return DTYPE_BYTES[self.dtype]

    @property
    def is_mixed(self) -> bool:
        """Whether matrices of float32 are cast to a narrower dtype for the forward pass."""
        return self.width < FLOAT32


@dataclass(frozen=True)
class Matrix:
    """A matrix of a layer: the channels that enter and leave it, and how it meets the residual stream."""

    enters: int
    leaves: int
    reads_stream: bool

    @property
    def sides(self) -> tuple[int, int]:
        """The sizes of its two dimensions."""
        return self.enters, self.leaves


@dataclass(frozen=True)
class Layer:
    """What decides the activations of a layer: numbers of channels per token."""

    matrices: tuple[Matrix, ...]
    num_parameters: int
    norms: int
    """Channels that autograd keeps of norms, in float32."""
    activated: int
    """Channels of a gated MLP's nonlinearity, which is kept in addition to what enters and leaves matrices."""
    query_heads: int
    repeated: int
    """Channels of keys and values, where they are repeated for every query head, in addition to their own."""
    bytes_per_pair: int
    """See `Family.bytes_per_pair`."""
    hidden: int

    @property
    def widest(self) -> int:
        """The most channels that leave a matrix which reads the stream."""
        return max((matrix.leaves for matrix in self.matrices if matrix.reads_stream), default=self.hidden)

    def kept_bytes(self, place: Place, *, rounds_inputs: bool = False, writes_out: bool = False) -> float:
        """Return the bytes per token that autograd keeps of the layer; `writes_out`: attention is written out in torch.

        Kept are the input of a norm and the normalised input, in float32; what enters a matrix; what leaves a matrix
        that reads the stream: queries, keys, values, both factors of a gated MLP; and the logsumexp of attention. The
        readers of a norm share its output in float32, but autocast makes a copy for each, and so does rounding.
        """
        readers = [matrix for matrix in self.matrices if matrix.reads_stream]
        others = [matrix.enters for matrix in self.matrices if not matrix.reads_stream]
        left = sum(matrix.leaves for matrix in readers)
        num_inputs = len(readers) if place.is_mixed or rounds_inputs else self._num_blocks
        repeated = self.repeated * (1 if writes_out else place.masked)
        channels = num_inputs * self.hidden + left + sum(others) + self.activated + repeated
        # The softmax is kept in float32, and as what it multiplies the values by.
        per_pair = self.bytes_per_pair or writes_out * (FLOAT32 + (place.width if place.is_mixed else 0))
        pairs = place.context * self.query_heads * per_pair
        return place.width * channels + FLOAT32 * (self.norms + self.query_heads) + pairs

    @property
    def _num_blocks(self) -> int:
        return len([matrix for matrix in self.matrices if matrix.leaves == self.hidden and not matrix.reads_stream])


def layers_of(arch: Arch) -> list[tuple[int, Layer]]:
    """Return the layers of every kind, each with their number."""
    kinds = arch.layer_counts or {"": arch.axis_size("layer")}
    return [(count, _layer(arch, kind or None)) for kind, count in kinds.items() if count]


def _layer(arch: Arch, kind: str | None) -> Layer:
    rows = [row for row in arch.rows if row.is_per_layer and row.kind in {None, kind} and not row.is_buffer]
    matrices = [(row, matrix) for row in rows for matrix in _matrices(arch, row)]
    names = {norm.weight_name() for norm in arch.family.layer_norms}
    num_norms = sum(row.name in names for row in rows)
    # Norms of queries and keys, head by head or over all heads of a token.
    of_heads = [row for row in rows if len(row.dimensions) == 1 and row.name.endswith("_norm.weight")]
    of_heads = [row for row in of_heads if row.name not in names]
    heads = size_of(arch, "query") if any("query" in row.axes for row in rows) else 0
    per_norm = 1 if arch.family.is_centred else 2  # torch's LayerNorm normalises its input again
    normalised_heads = (heads + size_of(arch, "kv")) * size_of(arch, "head_dim") if heads and of_heads else 0
    mixer = size_of(arch, "mhead") * size_of(arch, "mchan") if any("mhead" in row.axes for row in rows) else 0
    return Layer(
        tuple(matrix for _, matrix in matrices),
        _num_parameters(arch, rows),
        num_norms * per_norm * arch.axis_size("hidden") + 2 * normalised_heads + MIXER_COPIES * mixer,
        _activated(arch, matrices),
        heads,
        2 * (heads - size_of(arch, "kv")) * size_of(arch, "head_dim") if heads and "kv" in arch.axes else 0,
        arch.family.bytes_per_pair,
        arch.axis_size("hidden"),
    )


def _activated(arch: Arch, matrices: list[tuple[Row, Matrix]]) -> int:
    """Return the neurons of gated MLPs and experts: those into which the stream is multiplied twice."""
    total = 0
    for axis in ("ffn", "expert_ffn", "shared_ffn"):
        readers = [(row, matrix) for row, matrix in matrices if matrix.reads_stream and axis in row.axes]
        copies = {arch.axis_size("chosen") if row.is_per_expert or row.is_stacked else 1 for row, _ in readers}
        neurons = size_of(arch, axis) * max(copies, default=0)
        total += neurons if sum(matrix.leaves for _, matrix in readers) > neurons else 0
    return total


def _matrices(arch: Arch, row: Row) -> list[Matrix]:
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
        matrix = Matrix(sizes[1], sizes[0], reads_stream=False)
    else:
        matrix = Matrix(hidden, other, True) if reads else Matrix(other, hidden, False)
    return [matrix] * (arch.axis_size("chosen") if is_of_experts else 1)


def _num_parameters(arch: Arch, rows: list[Row]) -> int:
    experts = size_of(arch, "expert")
    return sum(prod(row.shape(arch.axis_size)) * (experts if row.is_per_expert else 1) for row in rows)
