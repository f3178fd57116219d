"""Draws SVG pictures: shapes and text, and plots with axes, ticks and a legend. Each is one file without a network."""

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

INK, GREY, PALE, BLUE, ORANGE = "#1a1a1a", "#767676", "#dddddd", "#0072b2", "#d55e00"
SERIES = [BLUE, "#e69f00", "#009e73", "#cc79a7", "#56b4e9", ORANGE]
"""Colours of several lines or kinds of blocks (Okabe and Ito): distinct for colour-blind readers and in print."""
CHARACTER_WIDTH = 7
"""Pixels of an average character of 12 pixels, from which a legend estimates the length of its words."""

Point = tuple[float, float]
Attribute = str | float


@dataclass
class Picture:
    """An SVG picture to draw on, in pixels from its upper left corner.

    Keyword arguments of its methods are SVG attributes, with underscores for hyphens (`text_anchor="end"`).
    """

    width: float
    height: float
    label: str
    """What the picture shows, for screen readers."""
    parts: list[str] = field(default_factory=list)

    def svg(self) -> str:
        """Return the picture as an SVG document, which may also stand inside an HTML page."""
        ground = _element("rect", width=self.width, height=self.height, fill="#ffffff")
        attributes: dict[str, Attribute] = {
            "xmlns": "http://www.w3.org/2000/svg",
            "width": self.width,
            "height": self.height,
            "viewBox": f"0 0 {self.width:g} {self.height:g}",
            "role": "img",
            "aria_label": self.label,
            "font_family": "system-ui, sans-serif",
            "font_size": 12,
            "fill": INK,
        }
        return _element("svg", ground + "".join(self.parts), **attributes)

    def text(self, x: float, y: float, words: str, **attributes: Attribute) -> None:
        """Write `words` from (x, y), the left end of their baseline unless `text_anchor` is given."""
        self.parts.append(_element("text", html.escape(words), x=x, y=y, **attributes))

    def rectangle(self, x: float, y: float, size: Point, title: str = "", **attributes: Attribute) -> None:
        """Draw a rectangle of `size` (width, height); `title` appears under the pointer."""
        self.parts.append(_element("rect", _title(title), x=x, y=y, width=size[0], height=size[1], **attributes))

    def circle(self, x: float, y: float, radius: float, title: str = "", **attributes: Attribute) -> None:
        """Draw a circle around (x, y); `title` appears under the pointer."""
        self.parts.append(_element("circle", _title(title), cx=x, cy=y, r=radius, **attributes))

    def line(self, points: Iterable[Point], title: str = "", **attributes: Attribute) -> None:
        """Draw a line through points; `title` appears under the pointer."""
        places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
        self.parts.append(_element("polyline", _title(title), points=places, **{"fill": "none", **attributes}))


class Key(NamedTuple):
    """An entry of a legend: a mark and its meaning."""

    words: str
    mark: Literal["dot", "small dot", "line", "dashed line", "square"]
    colour: str


def add_legend(picture: Picture, x: float, keys: Sequence[Key]) -> None:
    """Write a legend from `x` at the bottom of a picture, which grows by as many rows as the legend needs."""
    left = x
    picture.height += 22
    for key in keys:
        length = 36 + CHARACTER_WIDTH * len(key.words)
        if x > left and x + length > picture.width:
            x, picture.height = left, picture.height + 18
        y = picture.height - 12
        if key.mark == "square":
            picture.rectangle(x, y - 5, (12, 10), fill=key.colour)
        elif key.mark in {"dot", "small dot"}:
            picture.circle(x + 6, y, 6 if key.mark == "dot" else 3, fill=key.colour)
        else:
            dashes = "4 3" if key.mark == "dashed line" else "none"
            picture.line([(x, y), (x + 14, y)], stroke=key.colour, stroke_width=2, stroke_dasharray=dashes)
        picture.text(x + 19, y + 4, key.words)
        x += length


def side_by_side(pictures: Sequence[Picture]) -> Picture:
    """Return one picture that shows several from left to right."""
    label = ", ".join(dict.fromkeys(picture.label for picture in pictures))
    joined = Picture(0, max(picture.height for picture in pictures), label)
    for picture in pictures:
        joined.parts.append(_element("g", "".join(picture.parts), transform=f"translate({joined.width:g} 0)"))
        joined.width += picture.width
    return joined


@dataclass(frozen=True)
class Plot:
    """An area with two axes, on which data are placed."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    width: float = 300
    height: float = 220
    has_log_y: bool = False
    left: float = 62
    top: float = 50

    def picture(self, title: str, x_label: str, y_label: str) -> Picture:
        """Return a picture with a title, the labelled axes, their ticks, and no data yet."""
        right, bottom = self.left + self.width, self.top + self.height
        picture = Picture(right + 44, bottom + 42, title)
        picture.text(self.left, self.top - 26, title, font_size=14, font_weight=600)
        picture.text(self.left, self.top - 9, y_label, fill=GREY)
        for value in _log_ticks(*self.y_range) if self.has_log_y else _ticks(*self.y_range, at_most=7):
            y = self.place(self.x_range[0], value)[1]
            picture.line([(self.left, y), (right, y)], stroke=PALE)
            picture.text(self.left - 6, y + 4, _number(value), text_anchor="end")
        for value in _ticks(*self.x_range):
            x = self.place(value, self.y_range[0])[0]
            picture.line([(x, bottom), (x, bottom + 4)], stroke=GREY)
            picture.text(x, bottom + 17, _number(value), text_anchor="middle")
        picture.rectangle(self.left, self.top, (self.width, self.height), fill="none", stroke=GREY)
        picture.text(self.left + self.width / 2, bottom + 35, x_label, fill=GREY, text_anchor="middle")
        return picture

    def place(self, x: float, y: float) -> Point:
        """Return where the data point (x, y) is in the picture."""
        low, high = self.y_range
        share = math.log(y / low) / math.log(high / low) if self.has_log_y else (y - low) / (high - low)
        across = (x - self.x_range[0]) / (self.x_range[1] - self.x_range[0])
        return self.left + self.width * across, self.top + self.height * (1 - share)


def range_of(values: Sequence[float], is_log: bool = False) -> tuple[float, float]:
    """Return the least and the greatest of some values, with a margin of 8 % of their distance on each side."""
    low, high = min(values), max(values)
    if is_log:
        factor = (high / low) ** 0.08 if high > low else 1.05
        return low / factor, high * factor
    margin = (high - low) * 0.08 or abs(high) * 0.05 or 1.0
    return low - margin, high + margin


def _ticks(low: float, high: float, at_most: int = 5) -> list[float]:
    """Return the multiples within a range of the smallest round step that makes no more than `at_most` steps of it."""
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= at_most)
    return [step * i for i in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return round numbers within a range above 0, dense enough for a logarithmic axis; few where it is wide."""
    digits = [1, 2, 3, 5, 7] if high < 10 * low else [1, 3] if high < 1000 * low else [1]
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    within = [value for power in powers for digit in digits if low <= (value := digit * 10.0**power) <= high]
    return within if len(within) > 1 else _ticks(low, high, at_most=7)


def _number(value: float) -> str:
    return f"{value:,.0f}" if value == round(value) else f"{value:,.4g}"


def _title(text: str) -> str:
    return f"<title>{html.escape(text)}</title>" if text else ""


def _element(name: str, content: str = "", **attributes: Attribute) -> str:
    pairs = "".join(f' {key.replace("_", "-")}="{_value(value)}"' for key, value in attributes.items())
    return f"<{name}{pairs}>{content}</{name}>" if content else f"<{name}{pairs}/>"


def _value(value: Attribute) -> str:
    """Return a number with at most one decimal, or a string with its special characters escaped."""
    return html.escape(value) if isinstance(value, str) else f"{value:.1f}".removesuffix(".0")
