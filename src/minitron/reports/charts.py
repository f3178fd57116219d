"""Draws what pruning kept of a model, how important its parts were, and how the distillation went."""

from itertools import cycle, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from minitron.model.anatomy import AXES, PRUNABLE, SIZE_NAMES
from minitron.model.arch import Arch
from minitron.reports.svg import BLUE, GREY, ORANGE, SERIES, Key, Picture, Plot, Point, add_legend, range_of

MAX_HEATMAP_COLUMNS = 64
MIN_FILL, MAX_FILL = (247, 251, 255), (8, 48, 107)
"""Colours of a heatmap from unimportant (white) to important (dark blue)."""
TOP, STACKS_LEFT, STACK_WIDTH, BARS_LEFT, BARS_WIDTH = 44, 40, 200, 480, 300
"""Pixels of the picture of a shape: two stacks of layers, and bars to the right of them."""


def draw_shape(teacher: Arch, student: Arch, kept: list[int] | None) -> Picture:
    """Draw the layers of the teacher beside those of the student, and a bar for every size that can be pruned.

    `kept` holds the numbers of the teacher's layers that the student has; None, while they are unknown, leaves out
    the layers.
    """
    names = [name for name in SIZE_NAMES if name in teacher.sizes]
    left = 0 if kept is None else BARS_LEFT
    picture = Picture(left + BARS_WIDTH + 10, TOP + 40 * len(names), "the shape of teacher and student")
    for i, name in enumerate(names):
        _draw_size_bar(picture, (left, TOP + 40 * i), name, teacher.sizes[name], student.sizes[name])
    if kept is not None:
        _draw_layers(picture, teacher, student, kept)
    return picture


def _draw_layers(picture: Picture, teacher: Arch, student: Arch, kept: list[int]) -> None:
    """Draw the teacher's layers from the first to the last, and beside each what the student has of its blocks."""
    depth, colours = teacher.axis_size("layer"), dict(zip(_block_axes(teacher), cycle(SERIES), strict=False))
    distance = STACK_WIDTH + 20
    row_height = 13 if depth <= 40 else 10
    picture.height = max(picture.height, TOP + row_height * depth)
    for i, (name, arch, layers) in enumerate((("teacher", teacher, depth), ("student", student, len(kept)))):
        x = STACKS_LEFT + i * distance
        picture.text(x, 18, name, font_size=14, font_weight=600)
        picture.text(x, 35, f"{arch.num_parameters / 1e6:,.1f} M parameters, {layers} layers", fill=GREY)
    for layer in range(depth):
        y, axes = TOP + row_height * layer, [axis for axis in colours if _layer_has(teacher, layer, axis)]
        picture.text(STACKS_LEFT - 6, y + row_height - 4, str(layer), font_size=10, text_anchor="end", fill=GREY)
        width, height = (STACK_WIDTH + 4) / max(1, len(axes)) - 4, row_height - 4
        for i, axis in enumerate(axes):
            left, share = STACKS_LEFT + i * (width + 4), student.axis_size(axis) / teacher.axis_size(axis)
            picture.rectangle(left, y, (width, height), fill=colours[axis])
            if layer in kept:
                picture.rectangle(left + distance, y, (width * share, height), fill=colours[axis])
            outline = {"stroke": GREY, "stroke_dasharray": "none" if layer in kept else "3 3"}
            picture.rectangle(left + distance, y, (width, height), fill="none", stroke_width=0.5, **outline)
    add_legend(picture, STACKS_LEFT, [Key(PRUNABLE[axis], "square", colour) for axis, colour in colours.items()])


def _draw_size_bar(picture: Picture, corner: Point, name: str, size: int, kept: int) -> None:
    x, y = corner
    picture.text(x, y + 10, name, font_size=11)
    picture.text(x + BARS_WIDTH, y + 10, f"{kept:,} of {size:,}", text_anchor="end", font_size=11)
    picture.rectangle(x, y + 16, (BARS_WIDTH * kept / size, 10), fill=BLUE)
    picture.rectangle(x, y + 16, (BARS_WIDTH, 10), fill="none", stroke=GREY, stroke_width=0.5)


def _block_axes(arch: Arch) -> list[str]:
    """Return the axes that a layer's blocks are drawn by.

    These are the prunable axes of which every layer has entries of its own, except for groups of another axis and for
    axes within the entries of another one, such as the channels of a Mamba head.
    """
    inner = {axis for tap in arch.taps for axis in tap.axes[1:]}
    own = arch.family.per_layer_axes - inner - set(arch.grouped.values())
    prunable = [axis for axis in PRUNABLE if axis in own]
    return list(dict.fromkeys(axis for row in arch.rows for axis in prunable if axis in row.axes))


def _layer_has(arch: Arch, layer: int, axis: str) -> bool:
    return any(axis in row.axes for row in arch.layer_rows(layer))


def draw_layer_importance(scores: NDArray[Any], kept: list[int]) -> Picture:
    """Draw a bar for the importance of each layer; bars of removed layers are hollow."""
    left, top, width, height = 60, 34, 640, 120
    picture = Picture(720, top + height + 24, "importance of layers")
    step, high = width / len(scores), float(scores.max()) or 1.0
    picture.text(left, 16, "layers", font_size=14, font_weight=600)
    picture.text(left - 6, top + 8, f"{high:.3g}", text_anchor="end")
    for i, score in enumerate(scores.tolist()):
        bar = height * max(0.0, score) / high
        is_kept = i in kept
        picture.rectangle(
            left + i * step + 1,
            top + height - bar,
            (max(1.0, step - 2), bar),
            f"layer {i}: {score:.4g}, {'kept' if is_kept else 'removed'}",
            fill=BLUE if is_kept else "none",
            stroke=BLUE if is_kept else ORANGE,
        )
        if i % max(1, len(scores) // 16) == 0:
            middle = left + (i + 0.5) * step
            picture.text(middle, top + height + 16, str(i), font_size=11, text_anchor="middle")
    return picture


def draw_heatmap(scores: NDArray[Any], kept_share: float, label: str) -> Picture:
    """Draw importance (rows, entries) as colours: each row sorted, and divided by its largest entry.

    A line marks the share that is kept. Where dark colours continue beyond it, important entries were removed.
    """
    ordered = -np.sort(-np.abs(scores.astype(np.float64)), axis=1)
    columns = min(MAX_HEATMAP_COLUMNS, ordered.shape[1])
    edges = np.linspace(0, ordered.shape[1], columns + 1).round().astype(int)
    cells = np.stack([ordered[:, a:b].mean(axis=1) for a, b in pairwise(edges)], axis=1)  # (rows, columns)
    cells = cells / np.maximum(ordered[:, :1], 1e-30)
    left, top, width, row_height = 60, 24, 640, 6 if len(cells) > 24 else 12
    bottom, step = top + row_height * len(cells), width / columns
    picture = Picture(720, bottom + 8, f"importance of {label}")
    picture.text(left, 14, label, font_size=14, font_weight=600)
    for i, row in enumerate(cells.tolist()):
        for j, value in enumerate(row):
            size = (step + 0.3, row_height + 0.3)  # they overlap, so that no seams show
            picture.rectangle(left + j * step, top + i * row_height, size, fill=_shade(value))
    mark = left + width * kept_share
    picture.line([(mark, top), (mark, bottom)], stroke=ORANGE, stroke_width=2.5)
    if len(cells) > 1:
        picture.text(left - 6, top + 10, "layer 0", font_size=11, text_anchor="end")
        picture.text(left - 6, bottom, str(len(cells) - 1), font_size=11, text_anchor="end")
    return picture


def _shade(value: float) -> str:
    """Return a colour between `MIN_FILL` for 0 and `MAX_FILL` for 1."""
    share = min(1.0, max(0.0, value))
    return "#" + "".join(f"{round(a + (b - a) * share):02x}" for a, b in zip(MIN_FILL, MAX_FILL, strict=True))


def importance_rows(importance: dict[str, NDArray[Any]], arch: Arch) -> dict[str, NDArray[Any]]:
    """Return scores (layers that have the axis, or 1 where all share them; entries) by axis.

    Scores of several experts are averaged, and those of a Mamba head are the L2 norm over its channels.
    """
    rows = {}
    for axis in arch.prunable_axes:
        if axis == "layer" or axis not in importance:
            continue
        scores = importance[axis]
        if axis in arch.family.per_expert_axes:
            scores = scores.mean(axis=1)
        elif scores.ndim == 3:
            scores = np.linalg.norm(scores, axis=2)
        scores = scores[None] if scores.ndim == 1 else scores
        rows[axis] = scores[np.abs(scores).sum(axis=1) > 0]
    return rows


def heatmaps(importance: dict[str, NDArray[Any]], teacher: Arch, student: Arch) -> list[Picture]:
    """Draw the importance along every axis of a teacher that can be pruned, except for its layers."""
    return [
        draw_heatmap(scores, student.axis_size(axis) / teacher.axis_size(axis), AXES[axis])
        for axis, scores in importance_rows(importance, teacher).items()
    ]


Metrics = list[dict[str, Any]]
"""The rows of a `metrics.jsonl`."""


def draw_curves(runs: dict[str, Metrics], resumed_at: list[float] | None = None, width: float = 640) -> list[Picture]:
    """Draw the loss and the held-out perplexity of runs over the tokens that they were distilled on.

    `resumed_at` holds the tokens at which an interrupted run continued. Quantities without data have no picture.
    """
    pictures = []
    for key, title, y_label in (
        ("loss", "Distillation loss", "nats per token"),
        ("heldout_perplexity", "Perplexity on held-out text", "logarithmic scale"),
    ):
        lines = {name: [(row["tokens"], row[key]) for row in rows if key in row] for name, rows in runs.items()}
        if key == "heldout_perplexity":
            lines = {name: _without_far_start(line) for name, line in lines.items()}
        if any(lines.values()):
            pictures.append(_draw_lines(lines, (title, y_label), key == "heldout_perplexity", resumed_at or [], width))
    return pictures


def _without_far_start(line: list[Point]) -> list[Point]:
    """Leave out the perplexity before training where it would flatten the rest: above ten times the last one."""
    return line[1:] if len(line) > 2 and line[0][1] > 10 * line[-1][1] else line


def _draw_lines(
    lines: dict[str, list[Point]], titles: tuple[str, str], is_log: bool, resumed_at: list[float], width: float
) -> Picture:
    points = [point for line in lines.values() for point in line]
    last = max(x for x, _ in points) or 1.0
    plot = Plot((0.0, last), range_of([y for _, y in points], is_log), width, has_log_y=is_log)
    picture = plot.picture(titles[0], f"tokens, up to {last:,.0f}", titles[1])
    bottom, top = plot.y_range
    for tokens in resumed_at:
        places = [plot.place(tokens, bottom), plot.place(tokens, top)]
        picture.line(places, "continued after an interruption", stroke=ORANGE, stroke_dasharray="2 3")
    colours = dict(zip(lines, cycle(SERIES), strict=False))
    for name, line in lines.items():
        places = [plot.place(*point) for point in line]
        picture.line(places, stroke=colours[name], stroke_width=2)
        if not is_log:
            continue
        for (x, y), (_, value) in zip(places, line, strict=True):
            picture.circle(x, y, 4, f"{value:.4g}", fill=colours[name])
            if len(lines) == 1:  # values of several lines would overlap
                picture.text(x + 4, y - 7, f"{value:.1f}")
    keys = [Key(name, "line", colour) for name, colour in colours.items()] if len(lines) > 1 else []
    if resumed_at:
        keys.append(Key("continued after an interruption", "dashed line", ORANGE))
    if keys:
        add_legend(picture, plot.left, keys)
    return picture
