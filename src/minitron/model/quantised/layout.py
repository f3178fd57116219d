"""The tensors that hold a quantised matrix: how a method names them, and those of one matrix of a folder."""

from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

from torch import Tensor

from minitron.errors import UserError
from minitron.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class Quantisation:
    """How the weights of a folder are quantised, as its config states it."""

    method: str
    layouts: tuple["Layout", ...]
    """The layouts that a matrix may have; the first one that fits holds."""
    bits: tuple[int, ...]
    """The bits of a weight; several where matrices differ."""
    packed_bits: int | None = None
    """The bits of a weight where several are packed in one integer of 32 bits."""
    block: tuple[int, int] | None = None
    """Rows (outputs) and columns of a matrix that share a scale; None: all of a matrix, or all of a row."""
    stores_zeros_less_one: bool = False
    """Whether the zero points of GPTQ are stored less one."""


@dataclass(frozen=True)
class Layout:
    """How a method stores a matrix, by the endings that follow one beginning in the names of its tensors."""

    values: str
    """The ending of the numbers of few bits; such a tensor and all that are needed make a matrix of this layout."""
    weight: str
    """The ending of the matrix in a model that is not quantised."""
    needs: tuple[str, ...]
    may_have: tuple[str, ...]
    shape: Callable[["Stored"], tuple[int, ...]]
    """The shape of the matrix, from the headers of files alone; a `UserError` if its tensors do not fit each other."""
    read: Callable[["Stored"], Tensor]
    """The matrix, computed in float32, or exact in another dtype of floating point."""


@dataclass(frozen=True)
class Stored:
    """One quantised matrix: the names of its tensors, by their endings; each is read when it is asked for."""

    checkpoint: Checkpoint
    quantisation: Quantisation
    layout: Layout
    beginning: str

    @property
    def name(self) -> str:
        """The name of the matrix in a model that is not quantised."""
        return self.beginning + self.layout.weight

    @property
    def names(self) -> Iterator[str]:
        """The names of its tensors."""
        endings = (self.layout.values, *self.layout.needs, *self.layout.may_have)
        return (self.beginning + ending for ending in endings if ending in self)

    def __contains__(self, ending: str) -> bool:
        """Return whether a tensor with this ending is stored."""
        return self.beginning + ending in self.checkpoint.tensors

    def __getitem__(self, ending: str) -> Tensor:
        """Read the tensor with an ending."""
        return self.checkpoint.tensor(self.beginning + ending)

    def optional(self, ending: str) -> Tensor | None:
        """Read the tensor with an ending; None where it is not stored."""
        if ending not in self:
            return None
        return self[ending]

    def header(self, ending: str) -> tuple[str, list[int]]:
        """Return the dtype, as headers of safetensors files name it, and the shape of the tensor with an ending."""
        name = self.beginning + ending
        return self.checkpoint.stored_dtype(name), list(self.checkpoint.shape(name))

    def refusal(self, why: str) -> UserError:
        """Return the error that these tensors cannot be read: `tensor NAME (DTYPE, SHAPE) why`."""
        dtype, shape = self.header(self.layout.values)
        name = self.beginning + self.layout.values
        return UserError(f"{self.checkpoint.folder}: tensor {name} ({dtype}, {shape}) {why}")


def find_matrices(checkpoint: Checkpoint, quantisation: Quantisation) -> Iterator[Stored]:
    """Yield the quantised matrices of a folder, found by the names of its tensors."""
    names = checkpoint.tensors
    for name in names:
        for layout in quantisation.layouts:
            beginning = name.removesuffix(layout.values)
            if name.endswith(layout.values) and _has_all(names, beginning, layout.needs):
                yield Stored(checkpoint, quantisation, layout, beginning)
                break


def _has_all(names: Container[str], beginning: str, endings: tuple[str, ...]) -> bool:
    return all(beginning + ending in names for ending in endings)
