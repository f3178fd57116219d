"""Rank shapes by the loss of the pruned, untrained model on held-out blocks."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from minitron.data.blocks import Blocks
from minitron.files import read_jsonl, write_jsonl
from minitron.measure.perplexity import measure_perplexity
from minitron.model.anatomy import AXES
from minitron.model.arch import Arch
from minitron.model.causal import build_model
from minitron.model.checkpoint import Checkpoint, student_config
from minitron.progress import Progress
from minitron.prune.importance import Importance, kept_share
from minitron.prune.trim import cut_to
from minitron.recipe import PLAIN, SearchRecipe
from minitron.search.candidates import grid, shortlist


def search(
    teacher: Checkpoint,
    model: nn.Module,
    importance: Importance,
    heldout: Blocks,
    candidates: list[Arch],
    recipe: SearchRecipe,
    log: Path,
) -> Arch:
    """The best of the candidates: all are predicted, a diverse short list is measured.

    `log` is `candidates.jsonl`: the short list with its predicted losses, then one measured loss after the
    other, so that an interrupted search measures only what is missing.
    """
    rows = read_jsonl(log)
    measure = _Measurer(teacher, model, importance, heldout)
    if not rows:
        rows = _short_list(teacher.arch, importance, candidates, recipe.shortlist, measure)
        write_jsonl(log, rows)
    done = sum(row["zero_shot_loss"] is not None for row in rows)
    with Progress("search", len(rows), "candidates", done=done) as progress:
        for row in rows[done:]:
            row["zero_shot_loss"] = measure(_arch(teacher.arch, row))
            write_jsonl(log, rows)
            progress.advance(1)
            progress.note(f"best loss {min(r['zero_shot_loss'] for r in rows if r['zero_shot_loss']):.3f}")
    best = min(rows, key=lambda row: row["zero_shot_loss"])
    return _arch(teacher.arch, best)


@dataclass(frozen=True)
class _Measurer:
    """Cuts the teacher in memory to a shape and gives its loss on the held-out blocks, in nats a token.

    Plainly: what repairs regain before training they do not regain after it, and then mostly where hidden is cut, so
    that the losses of mended shapes mislead (docs/studies/pruning.md).
    """

    teacher: Checkpoint
    model: nn.Module
    importance: Importance
    heldout: Blocks

    def whole(self) -> float:
        """The teacher's own loss."""
        return math.log(measure_perplexity(self.model, self.heldout).perplexity)

    def __call__(self, arch: Arch) -> float:
        cut = cut_to(arch, self.teacher, self.importance, PLAIN)
        config = student_config(self.teacher, arch, cut.layers)
        parameter = next(self.model.parameters())
        student = build_model(config, cut, parameter.device, parameter.dtype)
        return math.log(measure_perplexity(student, self.heldout).perplexity)


def _short_list(
    teacher: Arch,
    importance: Importance,
    candidates: list[Arch],
    count: int,
    measure: _Measurer,
) -> list[dict[str, Any]]:
    """The candidates of the lowest predicted loss that differ enough, as rows to be measured.

    Scores of different axes do not compare. So each axis is cut alone once, half way down its grid, and the
    rise in loss is measured; a candidate's rise is predicted as the sum over its axes of that rise, in
    proportion to the share of squared importance that it loses there.
    """

    shares: dict[tuple[str, int], float] = {}

    def lost(axis: str, arch: Arch) -> float:
        key = axis, arch.entries(axis)
        if key not in shares:
            shares[key] = kept_share(importance, teacher, arch, axis)
        return 1 - shares[key]

    rises = {}
    probes = _probes(teacher)
    with Progress("probe", len(probes) + 1, "axes") as progress:
        whole = measure.whole()
        progress.advance(1)
        for axis, probe in probes.items():
            rises[axis] = max(0.0, measure(probe) - whole) / max(lost(axis, probe), 1e-9)
            progress.advance(1)
    predicted = [whole + sum(rise * lost(axis, arch) for axis, rise in rises.items()) for arch in candidates]
    best_first = sorted(range(len(candidates)), key=lambda i: predicted[i])
    return [
        {
            "arch": candidates[i].to_dict(),
            "num_parameters": candidates[i].num_parameters,
            "predicted_loss": predicted[i],
            "zero_shot_loss": None,
        }
        for i in shortlist(candidates, best_first, count)
    ]


def _probes(teacher: Arch) -> dict[str, Arch]:
    """For each axis that can be cut, the teacher with that axis alone half way down its grid, or near it."""
    probes = {}
    for name, options in grid(teacher).items():
        axis = next(axis for axis, size_name in AXES.items() if size_name == name)
        for option in sorted(options[:-1], key=lambda size: abs(size - options[(len(options) - 1) // 2])):
            group, product = teacher.grouped.get(axis), teacher.family.product
            sizes = {name: option * (teacher.axis_size(group) if group else 1)}
            if product and not product.ratio and axis == product.of:
                sizes[AXES[product.axes[0]]] = option // teacher.axis_size(product.axes[1])
            for inner, outer in teacher.grouped.items():
                if outer == axis:
                    sizes[AXES[inner]] = option * teacher.entries(inner)
            if teacher.expressible(sizes):
                probes[axis] = teacher.resized(**sizes)
                break
    return probes


def _arch(teacher: Arch, row: dict[str, Any]) -> Arch:
    return teacher.resized(**{name: row["arch"][name] for name in teacher.sizes})
