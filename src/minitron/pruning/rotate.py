"""Rotates the residual stream, into another basis of equal size or into fewer directions that hold most of it.

Norm weights move into the tensors that read the norm's output; after that every tensor along hidden is multiplied by
one matrix, whether it writes the stream or reads it (SliceGPT, arXiv 2401.15024, section 3; here the result stays a
stock checkpoint, since no layer gets a matrix of its own).
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
"""Rows of a matrix that are rotated at once, in a wider dtype than the stored one."""


def untied(arch: Arch) -> Arch:
    """Return the shape with an output matrix of its own, into which the final norm's weight can move."""
    return replace(arch, flags={**arch.flags, TIED: False})


def obstacle(arch: Arch) -> str | None:
    """Return the reason why the stream of a model of this shape cannot be rotated, a clause; None if it can."""
    if arch.family.fixed_basis:
        return f"{arch.model_type}: {arch.family.fixed_basis}"
    if after := arch.norms_after_blocks:
        return (
            f"{arch.model_type} has norms after its blocks ({after[0].name}), whose weights cannot move into another "
            "tensor: its channels can be permuted but not rotated"
        )
    if arch.family.is_centred and arch.flags.get(TIED, False):
        return (
            f"{arch.model_type} with tied embeddings has norms that subtract the mean, and no basis keeps both the "
            "vector of ones and the weight of the final norm, which is between the two uses of the embedding"
        )
    return None


def rotates(arch: Arch, recipe: PruneRecipe) -> bool:
    """Return whether hidden is cut along directions instead of channels.

    Raises:
        UserError: the recipe asks for it, and the model cannot be rotated.
    """
    reason = obstacle(arch)
    if recipe.rotate and reason:
        raise UserError(f"prune.rotate: {reason}")
    return reason is None and recipe.rotate is not False


def principal_basis(arch: Arch, size: int, moment: Tensor, tensor: Callable[[str], Tensor]) -> Tensor:
    """Return the directions that hold most of the stream that norms read: Q (hidden, size), orthonormal, in float64.

    `moment` (hidden, hidden) is the second moment of the normalised stream before the norms' weights, summed over
    norms (`stream_moment` of `calibrate`); `tensor` reads the model's tensors. A norm's bias counts as part of the
    stream.

    Within the space that the directions span, the basis is free. A tied model reads its embedding at both ends, so
    that the weight g of the final norm cannot be folded into either; there the basis is the one in which Qᵀ diag(g) Q
    is diagonal, and the diagonal is the weight of the student's final norm. Only the part of diag(g) Q outside the
    space is lost. Where norms subtract the mean, the vector of ones is kept, as the vector of ones.

    Raises:
        UserError: the family cannot be rotated.
    """
    if reason := obstacle(arch):
        raise UserError(reason)
    moment, cut_off = moment.double(), len(moment) - size
    for norm in arch.family.norms:
        for layer in arch.layer_numbers() if norm.is_per_layer else [None]:
            name = norm.bias_name(layer)
            if arch.match(name) is not None:
                added = tensor(name).double() / norm_weight(arch, norm, layer, tensor)
                moment = moment + added[:, None] * added
    if arch.family.is_centred:
        ones = torch.full((len(moment), 1), len(moment) ** -0.5, dtype=moment.dtype)
        centred = moment - ones @ (ones.T @ moment)
        directions = _principal(centred - (centred @ ones) @ ones.T)[:, cut_off + 1 :]
        basis: Tensor = torch.cat([ones, directions], dim=1) @ _first_to_ones(size)
        return basis
    return _with_diagonal_gain(_principal(moment)[:, cut_off:], arch, tensor)


def nested_basis(arch: Arch, sizes: list[int], moment: Tensor, tensor: Callable[[str], Tensor]) -> Tensor | None:
    """Return directions (hidden, the largest size) of which the first ones, for each of `sizes`, are principal.

    So one basis serves students of several hidden sizes, each of which has the first channels of the next larger one.
    Of a tied model the weight of the final norm is diagonal among the directions that one size adds to the next
    smaller one; what couples them with the others is lost, which a basis for one size keeps. None where no basis serves
    several sizes: norms that subtract the mean need the vector of ones in each.

    Raises:
        UserError: the family cannot be rotated.
    """
    if reason := obstacle(arch):
        raise UserError(reason)
    if arch.family.is_centred:
        return None
    best_first, start, parts = _principal(moment.double()).flip(1), 0, []
    for size in sorted(set(sizes)):
        parts.append(_with_diagonal_gain(best_first[:, start:size], arch, tensor))
        start = size
    return torch.cat(parts, dim=1)


def _with_diagonal_gain(directions: Tensor, arch: Arch, tensor: Callable[[str], Tensor]) -> Tensor:
    """Return a basis of the space of some directions; of a tied model that in which Qᵀ diag(g) Q is diagonal."""
    if not arch.flags.get(TIED, False):
        return directions
    gain = norm_weight(arch, arch.family.final_norm, None, tensor)
    return directions @ _principal(directions.T @ (gain[:, None] * directions))


def norm_weight(arch: Arch, norm: Norm, layer: int | None, tensor: Callable[[str], Tensor]) -> Tensor:
    """Return the factors that a norm multiplies by, (hidden,), in float64.

    Raises:
        UserError: a factor is zero, so that it cannot be moved past the norm's bias.
    """
    name = norm.weight_name(layer)
    if arch.match(name) is None:
        return torch.ones(arch.axis_size("hidden"), dtype=torch.float64)
    weight = tensor(name).double() + arch.family.norm_offset
    if arch.family.is_centred and (weight == 0).any():
        raise UserError(f"{name} holds a zero, which cannot be moved past the bias of its norm")
    return weight


def _principal(matrix: Tensor) -> Tensor:
    """Return the eigenvectors of a symmetric matrix as columns, that of the largest eigenvalue last."""
    vectors: Tensor = torch.linalg.eigh(matrix).eigenvectors
    return vectors


def _first_to_ones(size: int) -> Tensor:
    """Return the reflection (size, size) that maps the first unit vector to the normalised vector of ones."""
    mirror = torch.full((size,), -(size**-0.5), dtype=torch.float64)
    mirror[0] += 1.0
    if not mirror.any():
        return torch.eye(size, dtype=torch.float64)
    mirror = mirror / mirror.norm()
    reflection: Tensor = torch.eye(size, dtype=torch.float64) - 2 * mirror[:, None] * mirror
    return reflection


@dataclass(frozen=True)
class Rotated:
    """Reads a model's tensors rotated; `tensor` reads them before the rotation.

    With x the stream, W a tensor that reads a norm n(x) ⊙ w + b, and Q the `rotation` (hidden, size):
    W (n(x) ⊙ w + b) = [W diag(w) Q] (n(Qᵀx) + Qᵀ(b / w)), and tensors that wrote x write Qᵀx. This is exact where Q is
    square, and exact but for the scale of n where Q spans the stream. It is computed in float32, or in float64 where
    that is the stored dtype; tensors are returned in their stored dtype.

    The rotated model is `untied(arch)`, or with `is_tied` stays tied: then Qᵀ diag(w) Q of the final norm must be
    diagonal, unless `is_nested`.

    Raises:
        ValueError: the columns are not orthonormal, or with `is_tied` that product is not diagonal.
        UserError: the rotated model would not be of its family. Norms that subtract the mean commute with Q only if Q
            keeps the vector of ones; norms after a block keep their weights, so that Q can only permute and flip
            channels.
    """

    arch: Arch
    rotation: Tensor
    tensor: Callable[[str], Tensor]
    is_tied: bool = False
    is_nested: bool = False
    """Whether what is not diagonal in that product is left out; see `nested_basis`."""

    def __post_init__(self) -> None:
        rotation = self.rotation.double()
        identity = torch.eye(rotation.shape[1], dtype=rotation.dtype, device=rotation.device)
        if not torch.allclose(rotation.T @ rotation, identity, atol=1e-6):
            raise ValueError("the matrix is not orthogonal")
        if (reason := obstacle(untied(self.arch))) and not _is_signed_permutation(self.rotation):
            raise UserError(reason)
        ones = rotation.new_full((len(rotation),), len(rotation) ** -0.5) @ rotation
        if self.arch.family.is_centred and not torch.allclose(ones, ones.new_full(ones.shape, len(ones) ** -0.5)):
            raise UserError(f"the norms of {self.arch.model_type} subtract the mean, which this rotation moves")
        if self.is_tied and not self.is_nested:
            gain = self._rotated_gain()
            if (gain - torch.diag(gain.diagonal())).abs().max() > 1e-6 * gain.diagonal().abs().max():
                raise ValueError("the basis of a tied model must make the final norm's weight diagonal")

    def __call__(self, name: str) -> Tensor:
        """Return the rotated tensor of a name."""
        place = (self.arch if self.is_tied else untied(self.arch)).match(name)
        assert place is not None, name
        stored = self.tensor(self.arch.embedding.name if self._is_output(place.row) else name)
        if "hidden" not in place.row.axes:
            return stored
        norm = next((norm for norm in self.arch.family.norms if place.row.owner == norm.name), None)
        return self._norm(stored, norm, place) if norm else self._matrix(stored, place)

    def _norm(self, stored: Tensor, norm: Norm, place: Place) -> Tensor:
        value, rotation = stored.double(), self.rotation.double().cpu()
        offset = self.arch.family.norm_offset
        if place.row.name == norm.bias_name():
            moved = (value / self._weight(norm, place.layer)) @ rotation * self._kept_weight(norm, place.layer).cpu()
        elif self.is_tied and norm == self.arch.family.final_norm:
            moved = self._rotated_gain().diagonal().cpu() - offset
        elif norm.is_before_block(self.arch.flags):
            moved = self._kept_weight(norm, place.layer).cpu() - offset
        else:
            moved = (value + offset) @ rotation.abs() - offset
        return moved.to(stored.dtype)

    def _matrix(self, stored: Tensor, place: Place) -> Tensor:
        dtype = torch.promote_types(stored.dtype, torch.float32)
        rotation = self.rotation.to(dtype)
        for norm in self.arch.family.norms:
            if norm.is_read_by(place.row):
                moved, kept = (weight(norm, place.layer).to(rotation) for weight in (self._weight, self._kept_weight))
                rotation = moved[:, None] * rotation / kept
        dim = place.row.dimensions.index((("hidden",),))
        value = stored.movedim(dim, -1)
        rows = value.reshape(-1, value.shape[-1])
        rotated = torch.empty(len(rows), rotation.shape[1], dtype=stored.dtype)
        for start in range(0, len(rows), ROWS_AT_ONCE):
            part = slice(start, start + ROWS_AT_ONCE)
            rotated[part] = (rows[part].to(rotation) @ rotation).to("cpu", stored.dtype)
        return rotated.view(*value.shape[:-1], -1).movedim(-1, dim)

    def _weight(self, norm: Norm, layer: int | None) -> Tensor:
        return norm_weight(self.arch, norm, layer, self.tensor)

    def _kept_weight(self, norm: Norm, layer: int | None) -> Tensor:
        """Return the weight that the rotated norm keeps, (size,): the root mean square over each new channel's parts.

        Folded away entirely, tensors that read norms of small weight would become small, and a fixed step of Adam
        destroys these (docs/studies/pruning.md).
        """
        rotation = self.rotation.double()
        return (self._weight(norm, layer).to(rotation).square() @ rotation.square()).sqrt()

    def _rotated_gain(self) -> Tensor:
        """Return Qᵀ diag(w) Q of the final norm's weight w."""
        rotation = self.rotation.double()
        return rotation.T @ (self._weight(self.arch.family.final_norm, None).to(rotation)[:, None] * rotation)

    def _is_output(self, row: Row) -> bool:
        return self.arch.flags.get(TIED, False) and row.condition == f"not {TIED}"


def _is_signed_permutation(rotation: Tensor) -> bool:
    is_whole = (rotation - rotation.round()).abs() < 1e-9
    return rotation.shape[0] == rotation.shape[1] and bool(is_whole.all())
