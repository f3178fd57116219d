"""Sorts a teacher by importance, so that every candidate is the beginning of it along every axis.

Hundreds of shapes are tried this way without a copy of each: the tensors of a candidate are views into the tensors of
the sorted teacher. Where the choice of kept entries depends on the size of another axis, there is one sorted teacher
per size: the basis that hidden is rotated into depends on its size, and Mamba heads are ranked by the kept channels.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from minitron.data.blocks import Blocks
from minitron.model.anatomy import AXES
from minitron.model.arch import Arch
from minitron.model.beginning import Beginning
from minitron.model.checkpoint import Checkpoint
from minitron.model.config import student_config
from minitron.model.language_model import build_model
from minitron.pruning.cut import cut_to
from minitron.pruning.repair import repaired
from minitron.pruning.rotate import rotates
from minitron.pruning.scores import Importance
from minitron.pruning.selection import kept_layers, select
from minitron.recipe import PruneRecipe
from minitron.runtime import Runtime


@dataclass(frozen=True)
class SortedTeacher:
    """A teacher cut to the sizes of `whole` and sorted by falling importance along every other axis."""

    teacher: Checkpoint
    importance: Importance
    whole: Arch
    tensors: dict[str, Tensor]

    def model(self, arch: Arch, runtime: Runtime) -> Any:
        """Return the transformers model of a candidate: the function of the pruned model, entries in sorted order."""
        config = student_config(self.teacher, arch, self._layers(arch))
        return build_model(config, self.views(arch), runtime.device, runtime.dtype, runtime.attention)

    def _layers(self, arch: Arch) -> list[int]:
        numbers: list[int] = kept_layers(self.importance, self.teacher.arch, arch).tolist()
        return numbers

    def views(self, arch: Arch) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of a candidate by name; see `Beginning.of`."""
        return Beginning(self.whole, arch, self._layers(arch)).of(self.tensors)


def deciding_sizes(teacher: Arch, recipe: PruneRecipe) -> tuple[str, ...]:
    """Return the config names of the sizes that need a sorted teacher for each combination of their values."""
    axes = {tap.axes[1] for tap in teacher.taps if len(tap.axes) > 1}
    if recipe.rescale_norms or rotates(teacher, recipe):
        axes.add("hidden")
    return tuple(AXES[axis] for axis in teacher.prunable_axes if axis in axes)


def sort_teacher(
    teacher: Checkpoint,
    importance: Importance,
    sizes: dict[str, int],
    *,
    recipe: PruneRecipe,
    blocks: Blocks,
    runtime: Runtime,
) -> SortedTeacher:
    """Cut a teacher to `sizes`, those of `deciding_sizes`, rescale its norms, and sort it along every other axis.

    Norms are rescaled on `blocks`. Repairs that depend on all sizes of a shape are left out: the refit and the merge of
    heads.
    """
    # The shape may be one that no config can express: it is never written.
    whole = replace(teacher.arch, sizes={**teacher.arch.sizes, **sizes})
    kept = select(importance, teacher.arch, whole, ranked=True)
    cut = cut_to(whole, teacher, importance, recipe.model_copy(update={"merge_heads": False}), kept=kept)
    recipe = recipe.model_copy(update={"refit": False})
    tensors = {}
    for name, value in repaired(teacher, cut, blocks=blocks, recipe=recipe, runtime=runtime):
        # Tensors of one dimension are small, and some stay in the file's dtype when a model runs in another dtype.
        tensors[name] = value.to(runtime.device, runtime.dtype if value.ndim > 1 else None)
    return SortedTeacher(teacher, importance, whole, tensors)
