"""Draws the candidates of a search: their KL to the teacher against their size and their speed."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minitron.files import read_json, read_jsonl, whole_file
from minitron.model.anatomy import SIZE_NAMES
from minitron.reports.svg import BLUE, GREY, ORANGE, Key, Picture, Plot, Point, add_legend, range_of, side_by_side

Row = dict[str, Any]
"""A candidate: a line of `candidates.jsonl`."""


def write_candidates_picture(folder: Path) -> None:
    """Write `candidates.svg` from the `candidates.jsonl` and `search.json` in a folder."""
    pictures = draw_candidates(read_jsonl(folder / "candidates.jsonl"), read_json(folder / "search.json"))
    with whole_file(folder / "candidates.svg") as staging:
        staging.write_text(side_by_side(pictures).svg(), encoding="utf-8")


class _Axis(NamedTuple):
    """A quantity of candidates along the x axis."""

    label: str
    value: Callable[[Row], float]
    more_is_better: bool = False


def draw_candidates(rows: list[Row], search: dict[str, Any]) -> list[Picture]:
    """Draw candidates by size before training, and distilled ones by size and by speed after equally many tokens.

    Before training they have the KL of the untrained models, or the predicted one where these were not compared. Where
    no candidate was distilled, candidates are drawn by that KL and by speed, if any was timed. Speeds are left out
    where they do not compare (`speeds_compare`). Every picture shows the
    Pareto front: the candidates that no other one beats in both quantities.
    """
    distilled, timed = [row for row in rows if row["distilled_kl"]], [row for row in rows if row["prefill_seconds"]]
    speed = search["speed_of"]
    num_tokens = speed["batch"] * speed["context"]
    by_size = _Axis("parameters, millions", lambda row: row["num_parameters"] / 1e6)
    by_speed = _Axis(
        f"tokens/s of prefill, {speed['batch']} × {speed['context']:,}",
        lambda row: num_tokens / row["prefill_seconds"],
        more_is_better=True,
    )
    before = "predicted" if any(row["zero_shot_kl"] is None for row in rows) else "untrained"
    pictures = [_draw_panel(before, rows, by_size, _kl_before_training)]
    if distilled:
        tokens = min(min(map(int, row["distilled_kl"])) for row in distilled)
        title = f"after {tokens:,} tokens of distillation"
        for axis in (by_size, by_speed) if speeds_compare(search) else (by_size,):
            pictures.append(_draw_panel(title, distilled, axis, lambda row: float(row["distilled_kl"][str(tokens)])))
    elif timed and speeds_compare(search):
        pictures.append(_draw_panel(before, timed, by_speed, _kl_before_training))
    return pictures


def speeds_compare(search: dict[str, Any]) -> bool:
    """Return whether the speeds of a search compare: whether each shape was timed in turn with the teacher."""
    return search.get("teacher_speed") is not None


def last_kl(row: Row) -> float:
    """Return the KL of a candidate to the teacher as it is best known, in nats per token."""
    distilled = row["distilled_kl"]
    return float(distilled[max(distilled, key=int)]) if distilled else _kl_before_training(row)


def _kl_before_training(row: Row) -> float:
    return float(row["predicted_kl"] if row["zero_shot_kl"] is None else row["zero_shot_kl"])


def _draw_panel(title: str, rows: list[Row], x_axis: _Axis, kl: Callable[[Row], float]) -> Picture:
    points = [(float(x_axis.value(row)), kl(row)) for row in rows]
    plot = Plot(range_of([x for x, _ in points]), range_of([y for _, y in points]))
    picture = plot.picture(title, x_axis.label, "KL to the teacher, nats per token")
    front = [plot.place(*point) for point in _front(points, x_axis.more_is_better)]
    picture.line(front, stroke=ORANGE, stroke_width=1.5, stroke_dasharray="4 3")
    for point, row in sorted(zip(points, rows, strict=True), key=lambda pair: bool(pair[1]["chosen"])):
        radius, colour = (6, BLUE) if row["chosen"] else (3, GREY)
        picture.circle(*plot.place(*point), radius, _summary(row), fill=colour, fill_opacity=0.8)
    keys = [Key("chosen", "dot", BLUE), Key("others", "small dot", GREY), Key("Pareto front", "dashed line", ORANGE)]
    add_legend(picture, plot.left, keys)
    return picture


def _summary(row: Row) -> str:
    sizes = ", ".join(f"{name} {row['arch'][name]}" for name in SIZE_NAMES if name in row["arch"])
    return f"{row['num_parameters']:,} parameters; KL {last_kl(row):.4g}; {sizes}"


def _front(points: Sequence[Point], more_is_better: bool) -> list[Point]:
    """Return the points that no other one beats in both coordinates, by x."""
    sign = -1 if more_is_better else 1
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (sign * point[0], point[1])):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    return front
