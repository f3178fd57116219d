"""Pictures as SVG: what of a model is kept, what was important in it, and how its training went."""

import html
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitron.model.anatomy import AXES
from minitron.model.arch import Arch
from minitron.reports.page import BLUE, GREY, ORANGE

MOST_COLUMNS = 64
BLOCKS = {"query": "attention heads", "mhead": "Mamba heads", "expert": "experts", "ffn": "MLP neurons"}
"""What a layer is drawn by: the axes that give its blocks their width."""


def shape_bars(teacher: dict[str, int], student: dict[str, int]) -> str:
    """A bar for each size, the student's part of it filled."""
    bars = []
    for i, (name, size) in enumerate(teacher.items()):
        y = 34 * i
        kept = 330 * student[name] / size
        bars.append(
            f'<text x="0" y="{y + 17}" font-size="14">{html.escape(name)}</text>'
            f'<rect x="240" y="{y + 4}" width="330" height="18" fill="none" stroke="{GREY}"/>'
            f'<rect x="240" y="{y + 4}" width="{kept:.1f}" height="18" fill="{BLUE}"/>'
            f'<text x="580" y="{y + 17}" font-size="14">{student[name]:,} of {size:,}</text>'
        )
    return f'<svg viewBox="0 0 720 {34 * len(teacher)}" role="img" aria-label="sizes kept">{"".join(bars)}</svg>'


def layer_stack(teacher: Arch, student: Arch, kept: list[int]) -> str:
    """The teacher's layers from the first to the last: the blocks of each, and what of them the student has."""
    columns = {axis: 60 + 210 * i for i, axis in enumerate(axis for axis in BLOCKS if axis in teacher.axes)}
    row_height, top = 15, 24
    parts = [f'<text x="{x}" y="14" font-size="13">{BLOCKS[axis]}</text>' for axis, x in columns.items()]
    for layer in range(teacher.axis_size("layer")):
        y, is_kept = top + row_height * layer, layer in kept
        parts.append(
            f'<text x="48" y="{y + 10}" font-size="11" text-anchor="end" fill="{"#1a1a1a" if is_kept else GREY}">'
            f"{layer}</text>"
        )
        for axis in _blocks_of(teacher, layer, columns):
            share = student.axis_size(axis) / teacher.axis_size(axis) if is_kept else 0.0
            dashes = "" if is_kept else ' stroke-dasharray="3 3"'
            parts.append(
                f'<rect x="{columns[axis]}" y="{y}" width="190" height="11" fill="none" stroke="{GREY}"{dashes}/>'
                f'<rect x="{columns[axis]}" y="{y}" width="{190 * share:.1f}" height="11" fill="{BLUE}"/>'
            )
    width, height = max(columns.values(), default=0) + 200, top + row_height * teacher.axis_size("layer")
    label = "layers of teacher and student"
    svg = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
    return f'<div class="narrow">{svg}</div>'


def _blocks_of(arch: Arch, layer: int, axes: dict[str, int]) -> list[str]:
    kind = arch.layers[layer] if arch.layers else None
    rows = [row for row in arch.rows if row.is_per_layer and row.kind in {None, kind}]
    return [axis for axis in axes if any(axis in row.axes for row in rows)]


def layer_scores(scores: NDArray[Any], kept: list[int]) -> str:
    """A bar for the importance of each layer; those that went are hollow."""
    height, width, left = 120, 640, 60
    step = width / len(scores)
    high = float(scores.max()) or 1.0
    bars = []
    for i, score in enumerate(scores.tolist()):
        h = height * max(0.0, score) / high
        fill = BLUE if i in kept else "none"
        bars.append(
            f'<rect x="{left + i * step + 1:.1f}" y="{20 + height - h:.1f}" width="{max(1.0, step - 2):.1f}" '
            f'height="{h:.1f}" fill="{fill}" stroke="{BLUE if i in kept else ORANGE}">'
            f"<title>layer {i}: {score:.4g}, {'kept' if i in kept else 'removed'}</title></rect>"
        )
    labels = "".join(
        f'<text x="{left + (i + 0.5) * step:.1f}" y="{height + 36}" font-size="11" text-anchor="middle">{i}</text>'
        for i in range(0, len(scores), max(1, len(scores) // 16))
    )
    return (
        f'<svg viewBox="0 0 720 {height + 44}" role="img" aria-label="importance of layers">'
        f'<text x="{left - 6}" y="26" font-size="12" text-anchor="end">{high:.3g}</text>{"".join(bars)}{labels}</svg>'
    )


def heatmap(scores: NDArray[Any], kept_share: float, label: str) -> str:
    """Importance (rows, entries) as colours, each row's entries sorted and set against its largest.

    The line marks what is kept: where colour runs far beyond it, much was cut.
    """
    ordered = -np.sort(-np.abs(scores.astype(np.float64)), axis=1)
    columns = min(MOST_COLUMNS, ordered.shape[1])
    edges = np.linspace(0, ordered.shape[1], columns + 1).round().astype(int)
    cells = np.stack([ordered[:, a:b].mean(axis=1) for a, b in pairwise(edges)], axis=1)
    cells = cells / np.maximum(ordered[:, :1], 1e-30)
    left, width, height = 60, 640, 6 if len(cells) > 24 else 12
    step = width / columns
    parts = []
    for i, row in enumerate(cells.tolist()):
        for j, value in enumerate(row):
            parts.append(
                f'<rect x="{left + j * step:.1f}" y="{i * height}" width="{step + 0.3:.1f}" height="{height}" '
                f'fill="{_shade(value)}"/>'
            )
    mark = left + width * kept_share
    total = height * len(cells)
    parts.append(f'<line x1="{mark:.1f}" x2="{mark:.1f}" y1="0" y2="{total}" stroke="{ORANGE}" stroke-width="2.5"/>')
    if len(cells) > 1:
        for y, text in ((10, "layer 0"), (total, str(len(cells) - 1))):
            parts.append(f'<text x="{left - 6}" y="{y}" font-size="11" text-anchor="end">{text}</text>')
    return (
        f'<h3>{html.escape(label)}</h3><svg viewBox="0 0 720 {total + 2}" role="img" '
        f'aria-label="importance of {html.escape(label)}">{"".join(parts)}</svg>'
    )


def _shade(value: float) -> str:
    """From white to a dark blue, in even steps of lightness."""
    low, high = (247, 251, 255), (8, 48, 107)
    share = min(1.0, max(0.0, value))
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(low, high, strict=True))


def per_layer(importance: dict[str, NDArray[Any]], arch: Arch) -> dict[str, NDArray[Any]]:
    """By axis, scores as (layers or 1, entries): experts by their mean, Mamba heads over all their channels.

    Layers that do not have the axis are left out.
    """
    found = {}
    for axis in AXES:
        if axis == "layer" or axis not in importance or axis not in arch.prunable_axes:
            continue
        scores = importance[axis]
        if axis in arch.family.per_expert_axes:
            scores = scores.mean(axis=1)
        elif scores.ndim == 3:
            scores = np.linalg.norm(scores, axis=2)
        scores = scores[None] if scores.ndim == 1 else scores
        found[axis] = scores[np.abs(scores).sum(axis=1) > 0]
    return found


Curve = list[tuple[float, float]]


def plot(
    lines: dict[str, Curve], colours: list[str], label: str, dots: bool = False, marks: list[float] | None = None
) -> str:
    """Curves over tokens; `marks` are the tokens at which a run was taken up again."""
    every = [point for points in lines.values() for point in points]
    if not every:
        return ""
    left, top, width, height = 60, 28, 600, 180
    last_x, high = max(x for x, _ in every) or 1, max(y for _, y in every) * 1.05
    parts = [
        f'<line x1="{left + width * x / last_x:.1f}" x2="{left + width * x / last_x:.1f}" y1="{top}" '
        f'y2="{top + height}" stroke="{ORANGE}" stroke-dasharray="2 3"><title>taken up again</title></line>'
        for x in marks or []
    ]
    for (name, points), colour in zip(lines.items(), colours, strict=False):
        place = [(left + width * x / last_x, top + height * (1 - y / high)) for x, y in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in place)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for (x, y), (_, value) in zip(place, points, strict=True) if dots else ():
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"><title>{value:.4g}</title></circle>')
            if len(lines) == 1:  # of several, numbers would stand on each other
                anchor = "start" if x == left else "middle"
                parts.append(
                    f'<text x="{x:.1f}" y="{y - 8:.1f}" font-size="12" text-anchor="{anchor}">{value:.1f}</text>'
                )
        if len(lines) > 1 and place:
            x, y = place[-1]
            parts.append(
                f'<text x="{x + 6:.1f}" y="{y + 4:.1f}" font-size="12" fill="{colour}">{html.escape(name)}</text>'
            )
    ticks = "".join(
        f'<text x="{left - 6}" y="{top + height * (1 - share) + 4:.0f}" font-size="12" text-anchor="end">'
        f'{high * share:.3g}</text><line x1="{left}" x2="{left + width}" y1="{top + height * (1 - share):.0f}" '
        f'y2="{top + height * (1 - share):.0f}" stroke="#ddd"/>'
        for share in (0, 0.5, 1)
    )
    return (
        f'<svg viewBox="0 0 760 {top + height + 34}" role="img" aria-label="{html.escape(label)}">'
        f'<text x="{left}" y="14" font-size="14">{html.escape(label)}</text>{ticks}{"".join(parts)}'
        f'<text x="{left + width}" y="{top + height + 18}" font-size="12" text-anchor="end">{last_x:,} tokens</text>'
        "</svg>"
    )


def curves(runs: dict[str, list[dict[str, Any]]], colours: list[str], marks: list[float] | None = None) -> str:
    """Loss and held-out perplexity of one run or several, from the rows of their `metrics.jsonl`."""
    losses: dict[str, Curve] = {}
    heldout: dict[str, Curve] = {}
    for name, rows in runs.items():
        losses[name] = [(row["tokens"], row["loss"]) for row in rows if "loss" in row]
        points = [(row["tokens"], row["heldout_perplexity"]) for row in rows if "heldout_perplexity" in row]
        # What stands there before training is far above all the rest, and in the table.
        heldout[name] = points[1:] if len(points) > 2 else points
    return plot(losses, colours, "loss, nats a token", marks=marks) + plot(
        heldout, colours, "perplexity on held-out text, since training began", dots=True, marks=marks
    )
