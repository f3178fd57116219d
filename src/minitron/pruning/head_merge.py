"""Merges dropped query heads into kept ones (Minitron, arXiv 2407.14679, section 2.3)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minitron.model.anatomy import Row
from minitron.model.arch import Arch
from minitron.model.maps import apply_maps
from minitron.pruning.scores import Importance
from minitron.pruning.selection import Kept


def merge_partners(importance: Importance, teacher: Arch, kept: Kept) -> Tensor:
    """Return, for each of the teacher's query heads, the dropped head to merge into it, or its own number.

    Rank the L heads of a group by falling importance, and keep K. Kept head i is paired with head 2K − i + 1: its
    mirror image at the cut (Minitron, arXiv 2407.14679, section 2.3). That head exists for i from 2K − L + 1 on; the
    range printed in the paper begins one earlier. The result is (num_layers, num_heads).
    """
    scores, num_heads = importance["query"], teacher.axis_size("query")
    partners = torch.arange(num_heads).repeat(len(scores), 1)
    per_group = teacher.entries("query")
    for layer, heads in enumerate(kept["query"].tolist()):
        for group in {head // per_group for head in heads}:
            members = range(group * per_group, (group + 1) * per_group)
            ranked = sorted(members, key=lambda head: -float(scores[layer, head]))
            count = sum(head in members for head in heads)
            for i in range(max(0, 2 * count - per_group), count):
                partners[layer, ranked[i]] = ranked[2 * count - 1 - i]
    return partners


@dataclass(frozen=True)
class MergedHeads:
    """Reads a teacher's tensors with query heads merged: whatever makes the queries of a head becomes twice itself
    less that of its partner.

    `partners` (num_layers, num_heads) is from `merge_partners`; `tensor` reads the tensors before the merge.
    """

    arch: Arch
    partners: Tensor
    tensor: Callable[[str], Tensor]

    def __call__(self, name: str) -> Tensor:
        """Read the tensor of a name, with heads merged."""
        value, place = self.tensor(name), self.arch.family.match(name)
        if place is None or not self._makes_queries(place.row):
            return value
        other = apply_maps(value, place.row, {"query": self.partners[place.layer]}, self.arch.axis_size)
        return (2 * value.float() - other.float()).to(value.dtype)

    def _makes_queries(self, row: Row) -> bool:
        is_reader = any(norm.is_read_by(row) for norm in self.arch.family.norms)
        return "query" in row.axes and ("hidden" not in row.axes or is_reader)
