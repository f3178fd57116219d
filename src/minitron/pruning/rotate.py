"""Turning the residual stream: into another basis of the same size, or into fewer dimensions that hold most of it.

Norm weights move into the tensors that read the norm's output; after that every tensor along hidden is turned
by the same matrix, whether it writes the stream or reads it (SliceGPT, arXiv 2401.15024, section 3; here the
result stays a stock checkpoint, since no layer gets a matrix of its own).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minitron.errors import UserError
from minitron.model.anatomy import Norm, Place, Row
from minitron.model.arch import TIED, Arch
from minitron.recipe import PruneRecipe

ROWS_AT_ONCE = 16_384
"""Rows of a matrix that are turned at once, in a wider dtype than they are stored in."""


def untied(arch: Arch) -> Arch:
    """The shape with an output matrix of its own, into which the final norm's weight can move."""
    return replace(arch, flags={**arch.flags, TIED: False})


def obstacle(arch: Arch) -> str | None:
    """Why the stream of a model of this shape cannot be turned, in words that end a sentence; None if it can."""
    if behind := [norm for norm in arch.family.norms if not norm.is_in_front(arch.flags)]:
        return (
            f"{arch.model_type} has norms behind its blocks ({behind[0].name}), whose weights nothing else can take: "
            "its channels can be permuted but not rotated"
        )
    if arch.family.is_centred and arch.flags.get(TIED, False):
        return (
            f"{arch.model_type} with tied embeddings has norms that subtract the mean, and no basis keeps both the "
            "vector of ones and the final norm's weight between its ends"
        )
    return None


def turns(arch: Arch, recipe: PruneRecipe) -> bool:
    """Whether hidden is cut along directions instead of channels.

    Raises:
        UserError: the recipe demands it of a model that cannot be turned.
    """
    reason = obstacle(arch)
    if recipe.rotate and reason:
        raise UserError(f"prune.rotate: {reason}")
    return reason is None and recipe.rotate is not False


def principal_basis(arch: Arch, size: int, moment: Tensor, tensor: Callable[[str], Tensor]) -> Tensor:
    """The directions of the stream that norms see most of, (hidden, size), its columns orthonormal, in float64.

    `moment` (hidden, hidden) is the second moment of what norms make of the stream before they weight it, summed over
    them; `tensor` reads the model's own. What a norm adds counts as if it were part of the stream.

    Within the space that the directions span, the basis is free. A tied model's embedding is read at both ends,
    so that the weight g of the final norm cannot be folded into either; there the basis is taken in which
    Qᵀ diag(g) Q is diagonal, which is the weight of the student's final norm. What is lost is only the part of
    diag(g) Q that leaves the space. Where norms subtract the mean, the vector of ones is kept, as the vector of ones.

    Raises:
        UserError: the family cannot be turned.
    """
    if reason := obstacle(arch):
        raise UserError(reason)
    moment, cut_off = moment.double(), len(moment) - size
    for norm in arch.family.norms:
        for layer in arch.layer_numbers() if "{i}" in norm.name else [None]:
            name = f"{norm.name}.bias".replace("{i}", str(layer))
            if arch.match(name) is not None:
                added = tensor(name).double() / norm_weight(arch, norm, layer, tensor)
                moment = moment + added[:, None] * added
    if arch.family.is_centred:
        ones = torch.full((len(moment), 1), len(moment) ** -0.5, dtype=moment.dtype)
        centred = moment - ones @ (ones.T @ moment)
        directions = _principal(centred - (centred @ ones) @ ones.T)[:, cut_off + 1 :]
        basis: Tensor = torch.cat([ones, directions], dim=1) @ _first_to_ones(size)
        return basis
    directions = _principal(moment)[:, cut_off:]
    if arch.flags.get(TIED, False):
        gain = norm_weight(arch, arch.family.norms[-1], None, tensor)
        directions = directions @ _principal(directions.T @ (gain[:, None] * directions))
    return directions


def norm_weight(arch: Arch, norm: Norm, layer: int | None, tensor: Callable[[str], Tensor]) -> Tensor:
    """What a norm multiplies by, (hidden,), in float64.

    Raises:
        UserError: by zero somewhere, which cannot be moved past the bias that the norm adds.
    """
    name = f"{norm.name}.weight".replace("{i}", str(layer))
    if arch.match(name) is None:
        return torch.ones(arch.axis_size("hidden"), dtype=torch.float64)
    weight = tensor(name).double() + arch.family.norm_offset
    if arch.family.is_centred and (weight == 0).any():
        raise UserError(f"{name} holds a zero, which cannot be moved past the bias of its norm")
    return weight


def _principal(matrix: Tensor) -> Tensor:
    """The eigenvectors of a symmetric matrix as columns, the largest eigenvalue's last."""
    vectors: Tensor = torch.linalg.eigh(matrix).eigenvectors
    return vectors


def _first_to_ones(size: int) -> Tensor:
    """The reflection (size, size) that maps the first unit vector to the normalised vector of ones."""
    mirror = torch.full((size,), -(size**-0.5), dtype=torch.float64)
    mirror[0] += 1.0
    if not mirror.any():
        return torch.eye(size, dtype=torch.float64)
    mirror = mirror / mirror.norm()
    reflection: Tensor = torch.eye(size, dtype=torch.float64) - 2 * mirror[:, None] * mirror
    return reflection


@dataclass(frozen=True)
class Rotated:
    """Reads tensors as they are after the rotation; `tensor` reads those before it.

    With x the stream, W a reader behind a norm n(x) ⊙ w + b and Q the `rotation` (hidden, size):
    W (n(x) ⊙ w + b) = [W diag(w) Q] (n(Qᵀx) + Qᵀ(b / w)), and writers give Qᵀx where they gave x; exact where Q is
    square, and but for the scale of n where Q spans the stream. Computed in float32, or in float64 where that is
    stored; given back in the dtype that the tensor is stored in.

    The model is `untied(arch)`, or with `is_tied` stays tied: then Qᵀ diag(w) Q of the final norm must be diagonal.

    Raises:
        ValueError: the columns are not orthonormal, or of a tied model that product is not diagonal.
        UserError: the model cannot be turned this way and stay of its family. Norms that subtract the mean
            commute with Q only if Q keeps the vector of ones; norms behind a block keep their weights, so that Q
            can only permute and flip channels.
    """

    arch: Arch
    rotation: Tensor
    tensor: Callable[[str], Tensor]
    is_tied: bool = False

    def __post_init__(self) -> None:
        turn = self.rotation.double()
        identity = torch.eye(turn.shape[1], dtype=turn.dtype, device=turn.device)
        if not torch.allclose(turn.T @ turn, identity, atol=1e-6):
            raise ValueError("the matrix is not orthogonal")
        if (reason := obstacle(untied(self.arch))) and not _is_signed_permutation(self.rotation):
            raise UserError(reason)
        ones = torch.full((len(turn),), len(turn) ** -0.5, dtype=turn.dtype, device=turn.device) @ turn
        if self.arch.family.is_centred and not torch.allclose(ones, ones.new_full(ones.shape, len(ones) ** -0.5)):
            raise UserError(f"the norms of {self.arch.model_type} subtract the mean, which this rotation moves")
        if self.is_tied:
            turned = self._turned_gain()
            if (turned - torch.diag(turned.diagonal())).abs().max() > 1e-6 * turned.diagonal().abs().max():
                raise ValueError("of a tied model, the basis must make the final norm's weight diagonal")

    def __call__(self, name: str) -> Tensor:
        """The rotated tensor of that name."""
        place = (self.arch if self.is_tied else untied(self.arch)).match(name)
        assert place is not None, name
        stored = self.tensor(self.arch.embedding.name if self._is_output(place.row) else name)
        if "hidden" not in place.row.axes:
            return stored
        norm = next((norm for norm in self.arch.family.norms if place.row.name.startswith(f"{norm.name}.")), None)
        return self._norm(stored, norm, place) if norm else self._matrix(stored, place)

    def _norm(self, stored: Tensor, norm: Norm, place: Place) -> Tensor:
        value, turn = stored.double(), self.rotation.double().cpu()
        offset = self.arch.family.norm_offset
        if place.row.name == f"{norm.name}.bias":
            moved = (value / self._weight(norm, place.layer)) @ turn * self._left_over(norm, place.layer).cpu()
        elif self.is_tied and norm == self.arch.family.norms[-1]:
            moved = self._turned_gain().diagonal().cpu() - offset
        elif norm.is_in_front(self.arch.flags):
            moved = self._left_over(norm, place.layer).cpu() - offset
        else:
            moved = (value + offset) @ turn.abs() - offset
        return moved.to(stored.dtype)

    def _matrix(self, stored: Tensor, place: Place) -> Tensor:
        dtype = torch.promote_types(stored.dtype, torch.float32)
        turn = self.rotation.to(dtype)
        for norm in self.arch.family.norms:
            if norm.is_read_by(place.row):
                turn = (
                    self._weight(norm, place.layer).to(turn)[:, None]
                    * turn
                    / self._left_over(norm, place.layer).to(turn)
                )
        dim = place.row.dimensions.index((("hidden",),))
        value = stored.movedim(dim, -1)
        rows = value.reshape(-1, value.shape[-1])
        turned = torch.empty(len(rows), turn.shape[1], dtype=stored.dtype)
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            turned[part] = (rows[part].to(turn) @ turn).to("cpu", stored.dtype)
        return turned.view(*value.shape[:-1], -1).movedim(-1, dim)

    def _weight(self, norm: Norm, layer: int | None) -> Tensor:
        return norm_weight(self.arch, norm, layer, self.tensor)

    def _left_over(self, norm: Norm, layer: int | None) -> Tensor:
        """What the norm itself still multiplies by, (size,): the root mean square weight of what each channel is of."""
        turn = self.rotation.double()
        return (self._weight(norm, layer).to(turn).square() @ turn.square()).sqrt()

    def _turned_gain(self) -> Tensor:
        """Qᵀ diag(w) Q of the final norm's weight w."""
        turn = self.rotation.double()
        return turn.T @ (self._weight(self.arch.family.norms[-1], None).to(turn)[:, None] * turn)

    def _is_output(self, row: Row) -> bool:
        return self.arch.flags.get(TIED, False) and row.condition == f"not {TIED}"


def _is_signed_permutation(rotation: Tensor) -> bool:
    rounded = (rotation - rotation.round()).abs() < 1e-9  # of an orthogonal matrix
    return rotation.shape[0] == rotation.shape[1] and bool(rounded.all())
