"""A rotation of the residual stream that leaves the function of the model unchanged.

Norm weights move into the tensors that read the norm's output; after that every tensor along hidden is turned
by the same orthogonal matrix, whether it writes the stream or reads it (SliceGPT, arXiv 2401.15024, section 3;
here the result stays a stock checkpoint, since no layer gets a matrix of its own).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from minitron.errors import UserError
from minitron.model.anatomy import Norm, Place, Row
from minitron.model.arch import TIED, Arch


def untied(arch: Arch) -> Arch:
    """The shape with an output matrix of its own, which a rotation needs: the final norm moves into it alone."""
    return replace(arch, flags={**arch.flags, TIED: False})


@dataclass(frozen=True)
class Rotated:
    """Reads tensors of `untied(arch)` as they are after the rotation; `tensor` reads those before it.

    With x the stream, W a reader behind a norm n(x) ⊙ w + b and Q the `rotation` (hidden, hidden):
    W (n(x) ⊙ w + b) = [W diag(w) Q] (n(Qᵀx) + Qᵀ(b / w)), and writers give Qᵀx where they gave x. In float64, then
    back in the dtype that the tensor is stored in.

    Raises:
        ValueError: the matrix is not orthogonal.
        UserError: the model cannot be turned this way and stay of its family. Norms that subtract the mean
            commute with Q only if Q keeps the vector of ones; norms behind a block keep their weights, so that Q
            can only permute and flip channels.
    """

    arch: Arch
    rotation: Tensor
    tensor: Callable[[str], Tensor]

    def __post_init__(self) -> None:
        turn = self.rotation.double()
        if not torch.allclose(turn.T @ turn, torch.eye(len(turn), dtype=turn.dtype), atol=1e-6):
            raise ValueError("the matrix is not orthogonal")
        behind = [norm for norm in self.arch.family.norms if not self._is_read(norm)]
        if behind and not _is_signed_permutation(self.rotation):
            raise UserError(
                f"{self.arch.model_type} has norms behind its blocks ({behind[0].name}), whose weights nothing "
                "else can take: its channels can be permuted but not rotated"
            )
        sums = turn.sum(dim=0)
        if self.arch.family.is_centred and not torch.allclose(sums, torch.ones_like(sums), atol=1e-6):
            raise UserError(f"the norms of {self.arch.model_type} subtract the mean, which this rotation moves")

    def __call__(self, name: str) -> Tensor:
        """The rotated tensor of that name."""
        place = untied(self.arch).match(name)
        assert place is not None, name
        stored = self.tensor(self.arch.embedding.name if self._is_output(place.row) else name)
        return self._turned(stored.double(), place).to(stored.dtype) if "hidden" in place.row.axes else stored

    def _turned(self, value: Tensor, place: Place) -> Tensor:
        row, layer, _ = place
        for norm in self.arch.family.norms:
            if row.name == f"{norm.name}.weight":
                offset = self.arch.family.norm_offset
                moved = (
                    torch.ones_like(value) if self._is_read(norm) else (value + offset) @ self.rotation.double().abs()
                )
                return moved - offset
            if row.name == f"{norm.name}.bias":
                return (value / self._weight(norm, layer)) @ self.rotation.double()
        dim = row.dimensions.index((("hidden",),))
        value = value.movedim(dim, -1)
        for norm in self.arch.family.norms:
            if norm.is_read_by(row):
                value = value * self._weight(norm, layer)
        return (value @ self.rotation.double()).movedim(-1, dim)

    def _is_read(self, norm: Norm) -> bool:
        return bool(norm.readers) and (norm.condition is None or self.arch.flags[norm.condition])

    def _weight(self, norm: Norm, layer: int | None) -> Tensor:
        """What a norm multiplies by, (hidden,).

        Raises:
            UserError: by zero somewhere, which cannot be moved past the bias that the norm adds.
        """
        name = f"{norm.name}.weight".replace("{i}", str(layer))
        if self.arch.match(name) is None:
            return torch.ones(self.arch.axis_size("hidden"), dtype=torch.float64)
        weight = self.tensor(name).double() + self.arch.family.norm_offset
        if self.arch.family.is_centred and (weight == 0).any():
            raise UserError(f"{name} holds a zero, which cannot be moved past the bias of its norm")
        return weight

    def _is_output(self, row: Row) -> bool:
        return self.arch.flags.get(TIED, False) and row.condition == f"not {TIED}"


def _is_signed_permutation(rotation: Tensor) -> bool:
    return bool(((rotation - rotation.round()).abs() < 1e-9).all())  # of an orthogonal matrix
