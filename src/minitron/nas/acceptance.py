"""Which shapes the config class of a teacher accepts, decided before any work.

The table of a family states the conditions that its config class sets on every model (`Arch.expressible`). Some follow
from a config's values instead: Phi-3 with longrope holds a factor for every pair of channels that it rotates, and takes
their number from hidden and heads. So the student's config itself is made for the shapes that a search may offer.
"""

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from minitron.errors import UserError
from minitron.model.anatomy import AXES
from minitron.model.arch import Arch
from minitron.model.checkpoint import Checkpoint
from minitron.model.config import quiet_transformers, student_config
from minitron.nas.shapes import Shapes

RELATED = (("hidden", "query", "kv", "head_dim"), ("hidden", "mhead", "mchan"))
"""Axes whose sizes a config class compares with each other; the sizes of all other axes are tried one by one."""


@dataclass
class Acceptance:
    """Whether transformers accepts a shape of a teacher as a config; every answer is kept."""

    source: Checkpoint
    _refusals: dict[tuple[int, ...], str | None] = field(default_factory=dict, init=False, repr=False)

    def refusal(self, arch: Arch) -> str | None:
        """Return why the config class refuses a shape, or None."""
        key = tuple(arch.sizes.values())
        if key not in self._refusals:
            try:
                student_config(self.source, arch, self.source.arch.first_layers(arch))
                self._refusals[key] = None
            except UserError as error:
                self._refusals[key] = str(error)
        return self._refusals[key]

    def accepts(self, arch: Arch) -> bool:
        """Return whether the config class accepts a shape."""
        return self.refusal(arch) is None

    def require(self, arch: Arch) -> None:
        """Raise `UserError` where the config class refuses a shape."""
        if (refusal := self.refusal(arch)) is not None:
            raise UserError(refusal)

    def of(self, shapes: Shapes) -> Shapes:
        """Return the shapes whose sizes are accepted; one config is made for each combination of related sizes.

        Raises:
            UserError: no shape is accepted.
        """
        if not len(shapes):
            return shapes
        related = [[name for axis in axes if (name := AXES[axis]) in shapes.sizes] for axes in RELATED]
        groups = [names for names in related if not any(set(names) < set(other) for other in related)]
        groups += [[name] for name in shapes.sizes if not any(name in group for group in groups)]
        reason = None
        for names in filter(None, groups):
            numbers = combinations(shapes, names)
            _, firsts, positions = np.unique(numbers, return_index=True, return_inverse=True)
            lasts = len(numbers) - 1 - np.unique(numbers[::-1], return_index=True)[1]
            pairs = zip(firsts.tolist(), lasts.tolist(), strict=True)
            with quiet_transformers():
                refusals = [self._refusal_of_all(shapes, names, pair) for pair in pairs]
            reason = reason or next(filter(None, refusals), None)
            shapes = shapes.at(np.array([refusal is None for refusal in refusals])[positions])
            if not len(shapes):
                raise UserError(f"search: transformers accepts no shape of the grid: {reason}")
        return shapes

    def _refusal_of_all(self, shapes: Shapes, names: list[str], examples: tuple[int, int]) -> str | None:
        """Return why some sizes are refused, alone and in examples: in one shape, another size may be the reason."""
        reason, first = None, shapes[examples[0]]
        for arch in (self._alone(first, names), first, shapes[examples[1]]):
            if (refusal := self.refusal(arch)) is None:
                return None
            reason = reason or refusal
        return reason

    def _alone(self, shape: Arch, names: list[str]) -> Arch:
        """Return the teacher cut in some sizes alone, or the shape itself where that cannot be."""
        try:
            return self.source.arch.resized(**{name: shape.sizes[name] for name in names})
        except UserError:
            return shape


def combinations(shapes: Shapes, names: list[str]) -> NDArray[np.int64]:
    """Return a number for every shape, (n,), equal where the sizes of these names are."""
    numbers = np.zeros(len(shapes), dtype=np.int64)
    for name in names:
        sizes, positions = np.unique(shapes.sizes[name], return_inverse=True)
        numbers = numbers * len(sizes) + positions
    return numbers
