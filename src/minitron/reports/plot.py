"""`candidates.svg`: how far the candidates of a search are from the teacher, against their size and their speed."""

import html
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from minitron.files import read_json, read_jsonl, whole_file
from minitron.reports.page import BLUE, GREY, ORANGE

WIDTH, HEIGHT, LEFT, TOP = 300, 220, 62, 50
PANEL_WIDTH = LEFT + WIDTH + 30

Row = dict[str, Any]


def write_plot(folder: Path) -> None:
    """Write `candidates.svg` from the `candidates.jsonl` and `search.json` in a folder."""
    svg = plot(read_jsonl(folder / "candidates.jsonl"), read_json(folder / "search.json"))
    with whole_file(folder / "candidates.svg") as staging:
        staging.write_text(svg, encoding="utf-8")


def plot(rows: list[Row], search: dict[str, Any]) -> str:
    """The panels side by side, as one picture."""
    shown = panels(rows, search)
    nested = [f'<g transform="translate({i * PANEL_WIDTH} 0)">{content}</g>' for i, content in enumerate(shown)]
    return _svg(len(shown) * PANEL_WIDTH, "".join(nested))


def panels_apart(rows: list[Row], search: dict[str, Any]) -> str:
    """The panels as pictures of their own, which stand under each other where there is no room beside."""
    return f'<div class="panels">{"".join(_svg(PANEL_WIDTH, content) for content in panels(rows, search))}</div>'


def _svg(width: int, content: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {TOP + HEIGHT + 70}" role="img" '
        f'font-family="system-ui, sans-serif" aria-label="candidates of the search">{content}</svg>'
    )


def panels(rows: list[Row], search: dict[str, Any]) -> list[str]:
    """Untrained candidates by their size; those distilled, as far as all of them were, by size and by speed.

    With the front of each: what no other beats in both.
    """
    distilled, timed = [row for row in rows if row["distilled_kl"]], [row for row in rows if row["prefill_seconds"]]
    speed = search["speed_of"]
    tokens = speed["batch"] * speed["context"]
    by_size = partial(_panel, x_label="parameters, millions", x_of=lambda row: row["num_parameters"] / 1e6)
    by_speed = partial(
        _panel, x_label=f"tokens/s of prefill, {speed['batch']} × {speed['context']:,}", more_is_better=True,
        x_of=lambda row: tokens / row["prefill_seconds"],
    )  # fmt: skip
    found = [by_size(title="untrained", rows=rows, y_of=lambda row: row["zero_shot_kl"])]
    if distilled:
        least = min(min(map(int, row["distilled_kl"])) for row in distilled)
        trained: dict[str, Any] = {"title": f"after {least:,} tokens of distillation", "rows": distilled,
                   "y_of": lambda row: row["distilled_kl"][str(least)]}  # fmt: skip
        found += [by_size(**trained), by_speed(**trained)]
    elif timed:
        found.append(by_speed(title="untrained", rows=timed, y_of=lambda row: row["zero_shot_kl"]))
    return [panel + _legend(TOP + HEIGHT + 56) for panel in found]


def last_loss(row: Row) -> float:
    """The KL of a candidate where it was last measured."""
    distilled = row["distilled_kl"]
    return float(distilled[max(distilled, key=int)] if distilled else row["zero_shot_kl"])


def _panel(title: str, rows: list[Row], x_of: Any, y_of: Any, x_label: str, more_is_better: bool = False) -> str:
    left = LEFT
    points = [(float(x_of(row)), float(y_of(row)), row) for row in rows]
    x_low, x_high = _range([x for x, _, _ in points])
    y_low, y_high = _range([y for _, y, _ in points])

    def place(x: float, y: float) -> tuple[float, float]:
        return (left + WIDTH * (x - x_low) / (x_high - x_low), TOP + HEIGHT * (1 - (y - y_low) / (y_high - y_low)))

    parts = [f'<text x="{left}" y="{TOP - 26}" font-size="14" font-weight="600">{title}</text>'
             f'<text x="{left}" y="{TOP - 9}" font-size="12" fill="#555">KL to the teacher, nats a token</text>'
             f'<rect x="{left}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" fill="none" stroke="#ccc"/>']  # fmt: skip
    for value in _ticks(y_low, y_high):
        y = place(x_low, value)[1]
        parts.append(
            f'<line x1="{left}" x2="{left + WIDTH}" y1="{y:.1f}" y2="{y:.1f}" stroke="#eee"/>'
            f'<text x="{left - 6}" y="{y + 4:.1f}" font-size="12" text-anchor="end">{_number(value)}</text>'
        )
    for value in _ticks(x_low, x_high):
        x = place(value, y_low)[0]
        parts.append(
            f'<text x="{x:.1f}" y="{TOP + HEIGHT + 16}" font-size="12" text-anchor="middle">{_number(value)}</text>'
        )
    parts.append(
        f'<text x="{left + WIDTH / 2}" y="{TOP + HEIGHT + 34}" font-size="12" fill="#555" text-anchor="middle">'
        f"{html.escape(x_label)}</text>"
    )
    front = [place(x, y) for x, y, _ in _front(points, more_is_better)]
    parts.append(
        f'<polyline points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in front)}" fill="none" stroke="{ORANGE}" '
        'stroke-width="1.5" stroke-dasharray="4 3"/>'
    )
    for x, y, row in sorted(points, key=lambda point: point[2]["chosen"]):
        cx, cy = place(x, y)
        radius, colour = (6, BLUE) if row["chosen"] else (3, GREY)
        parts.append(
            f'<circle cx="{cx:.1f}" cy="{cy:.1f}" r="{radius}" fill="{colour}" fill-opacity="0.8">'
            f"<title>{html.escape(in_words(row))}</title></circle>"
        )
    return "".join(parts)


def in_words(row: Row) -> str:
    """A candidate's sizes and losses in a line."""
    sizes = ", ".join(
        f"{name} {value}"
        for name, value in row["arch"].items()
        if name.startswith(("num_", "hidden", "inter", "moe", "mamba"))
    )
    return f"{row['num_parameters']:,} parameters; KL {last_loss(row):.4g}; {sizes}"


def _front(points: Sequence[tuple[float, float, Row]], more_is_better: bool) -> list[tuple[float, float, Row]]:
    """The points that no other beats in both, by x."""
    sign = -1 if more_is_better else 1
    found: list[tuple[float, float, Row]] = []
    for point in sorted(points, key=lambda point: (sign * point[0], point[1])):
        if not found or point[1] < found[-1][1]:
            found.append(point)
    return found


def _range(values: list[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    margin = (high - low) * 0.06 or abs(high) * 0.05 or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float) -> list[float]:
    """Four or so round numbers within a range."""
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:,.4g}"


def _legend(y: float) -> str:
    words = ((18, "chosen"), (86, "others"), (164, "front: unbeaten in both"))
    texts = [f'<text x="{LEFT + x}" y="{y}" font-size="12">{text}</text>' for x, text in words]
    return "".join(texts) + (
        f'<circle cx="{LEFT + 6}" cy="{y - 4}" r="6" fill="{BLUE}"/>'
        f'<circle cx="{LEFT + 76}" cy="{y - 4}" r="3" fill="{GREY}"/>'
        f'<line x1="{LEFT + 136}" x2="{LEFT + 160}" y1="{y - 4}" y2="{y - 4}" stroke="{ORANGE}" stroke-width="1.5" '
        f'stroke-dasharray="4 3"/>'
    )
