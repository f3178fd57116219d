"""Draws the pictures of concepts.md: `python docs/pictures.py` writes them to docs/pictures/."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np

from minitron.reports.svg import BLUE, GREY, INK, ORANGE, PALE, Picture, Point

WIDTH = 760


def box(picture: Picture, x: float, y: float, size: Point, words: str, colour: str = BLUE) -> None:
    """Draw a box whose upper left corner is (x, y), with words in its middle."""
    picture.rectangle(x, y, size, fill="#ffffff", stroke=colour, stroke_width=1.5, rx=5)
    picture.text(x + size[0] / 2, y + size[1] / 2 + 4, words, text_anchor="middle", font_weight=600)


def arrow(picture: Picture, start: Point, end: Point, colour: str = GREY) -> None:
    """Draw an arrow between two points."""
    angle = math.atan2(end[1] - start[1], end[0] - start[0])
    sides = [(end[0] - 9 * math.cos(angle + turn), end[1] - 9 * math.sin(angle + turn)) for turn in (0.4, -0.4)]
    picture.line([start, end], stroke=colour, stroke_width=1.5)
    picture.line([sides[0], end, sides[1]], stroke=colour, stroke_width=1.5)


def words(picture: Picture, x: float, y: float, *lines: str) -> None:
    """Write lines in grey, centred on x, the first one's baseline at y."""
    for i, line in enumerate(lines):
        picture.text(x, y + 15 * i, line, text_anchor="middle", fill=GREY, font_size=11)


def stages() -> Picture:
    """Draw the way from the teacher to the figures, with the verb and the file of each step."""
    picture = Picture(WIDTH, 190, "from a teacher to a student: the stages and their files")
    names = ("teacher", "statistics", "shape", "pruned model", "student", "figures")
    files = ("a checkpoint", "importance.safetensors", "arch.json", "pruned/", "student/", "eval.json")
    verbs = ("calibrate", "search", "prune", "distill", "evaluate")
    step, size = 128, (100, 40)
    for i, (name, file) in enumerate(zip(names, files, strict=True)):
        x = 12 + step * i
        box(picture, x, 60, size, name, ORANGE if name in {"teacher", "student"} else BLUE)
        words(picture, x + size[0] / 2, 118, file)
        if i:
            arrow(picture, (x - step + size[0] + 3, 80), (x - 3, 80))
            words(picture, x - (step - size[0]) / 2, 48, verbs[i - 1])
    picture.line([(60, 128), (60, 160), (508, 160)], stroke=ORANGE, stroke_width=1.5, stroke_dasharray="5 4")
    arrow(picture, (508, 160), (508, 86), ORANGE)
    words(picture, 284, 178, "the teacher's outputs on the text are what the student is trained on")
    return picture


def axes() -> Picture:
    """Draw what can be cut in a transformer: hidden, heads with their groups, neurons, layers."""
    picture = Picture(WIDTH, 310, "the axes along which a transformer is cut")
    for i in range(4, 0, -1):
        picture.rectangle(40 + 12 * i, 66 - 12 * i, (430, 200), fill="#ffffff", stroke=PALE)
    picture.rectangle(40, 66, (430, 200), fill="#ffffff", stroke=GREY)
    words(picture, 255, 284, "a layer: num_hidden_layers is cut by dropping whole layers")
    for i in range(12):
        picture.rectangle(60, 82 + 14 * i, (18, 12), fill=PALE if i > 8 else BLUE)
    picture.text(90, 96, "hidden_size", font_weight=600)
    words(picture, 137, 112, "channels of the", "residual stream")
    for group in range(3):
        picture.rectangle(206 + 78 * group, 88, (70, 44), fill="none", stroke=GREY, stroke_dasharray="3 3", rx=4)
        for head in range(3):
            dropped = group == 2 or head == 2
            picture.rectangle(212 + 78 * group + 20 * head, 94, (16, 32), fill=PALE if dropped else BLUE)
    picture.text(206, 150, "num_attention_heads", font_weight=600)
    picture.text(206, 165, "within KV groups,", fill=GREY, font_size=11)
    picture.text(206, 179, "or whole groups: num_key_value_heads", fill=GREY, font_size=11)
    for i in range(18):
        picture.rectangle(206 + 13 * i, 192, (10, 30), fill=BLUE if i % 3 else PALE)
    picture.text(206, 240, "intermediate_size", font_weight=600)
    picture.text(336, 240, "neurons of the MLP", fill=GREY, font_size=11)
    for i, line in enumerate((
        "Width: hidden, heads, neurons", "Depth: layers", "",
        "Models with experts: experts, their", "neurons, shared and latent sizes", "",
        "Models with Mamba: heads, their", "channels, layers of each kind", "",
    )):  # fmt: skip
        picture.text(545, 92 + 18 * i, line)
    picture.rectangle(545, 250, (12, 10), fill=BLUE)
    picture.text(563, 259, "kept")
    picture.rectangle(605, 250, (12, 10), fill=PALE)
    picture.text(623, 259, "dropped")
    return picture


def importance() -> Picture:
    """Draw the scores of the neurons of two layers, each of which keeps its own best entries."""
    picture = Picture(WIDTH, 220, "importance of the neurons of two layers, and those that are kept")
    draws = np.random.default_rng(3)
    for layer in range(2):
        left, scores = 20 + 375 * layer, draws.gamma(2.0, 1.0, 24)
        best = set(np.argsort(scores)[-16:].tolist())
        for i, height in enumerate(scores / scores.max() * 120):
            picture.rectangle(left + 14 * i, 165 - height, (10, height), fill=BLUE if i in best else PALE)
        picture.line([(left - 4, 166), (left + 336, 166)], stroke=GREY)
        words(picture, left + 168, 185, f"layer {layer}: 16 of 24 neurons are kept, each layer its own")
    picture.text(20, 24, "score: how strongly an entry is active on the calibration text", fill=GREY)
    return picture


def rotation() -> Picture:
    """Draw a cut of a channel beside a cut along a principal direction, for points in two dimensions."""
    picture = Picture(WIDTH, 270, "cutting a channel, and cutting along a principal direction")
    points = np.random.default_rng(0).normal(size=(70, 2)) * [1.0, 0.22] @ [[0.8, 0.6], [-0.6, 0.8]]
    for side, (direction, title) in enumerate((
        ([1.0, 0.0], "a channel is dropped"), ([0.8, 0.6], "the last principal direction is dropped"),
    )):  # fmt: skip
        x0, y0, scale = 190 + 380 * side, 150, 48
        along = np.array(direction)
        ends = [(x0 + s * along[0] * 150, y0 - s * along[1] * 150) for s in (-1, 1)]
        picture.line(ends, stroke=INK, stroke_width=1)
        for point in points:
            cut = along * (point @ along)
            start, end = ((x0 + p[0] * scale, y0 - p[1] * scale) for p in (point, cut))
            picture.line([start, end], stroke=ORANGE, stroke_width=0.8)
            picture.circle(start[0], start[1], 2.2, fill=BLUE)
        picture.text(x0, 24, title, text_anchor="middle", font_weight=600)
    words(picture, WIDTH / 2, 258, "blue: residual streams of tokens; orange: what the cut loses of each")
    return picture


def search() -> Picture:
    """Draw how many shapes are left after each step of a search, by its defaults."""
    picture = Picture(WIDTH, 250, "the steps of a search")
    rows = (
        ("all shapes of the grid, counted exactly", 510, "arithmetic"),
        ("shapes within the budget", 430, "up to 5 % below the limit"),
        ("best by the probes: compared with the teacher, untrained", 390, "up to 256 shapes"),
        ("short list: pruned, repaired, distilled", 250, "8 shapes, a quarter of the tokens"),
        ("the better half", 150, "4 shapes, half of the tokens"),
        ("again the better half", 150, "2 shapes, all tokens"),
        ("arch.json", 90, "the least loss"),
    )
    for i, (name, width, count) in enumerate(rows):
        y, shade = 14 + 33 * i, ORANGE if i == len(rows) - 1 else BLUE
        picture.rectangle(265 - width / 2, y, (width, 24), fill="#ffffff", stroke=shade, stroke_width=1.5, rx=4)
        picture.text(265, y + 16, name, text_anchor="middle")
        picture.text(548, y + 16, count, fill=GREY)
    return picture


def distillation() -> Picture:
    """Draw teacher and student reading one text, and the distance between their distributions."""
    picture = Picture(WIDTH, 270, "distillation: teacher and student predict the next token of one text")
    box(picture, 20, 105, (120, 40), "block of text", GREY)
    sizes: dict[str, tuple[float, list[float]]] = {
        "teacher": (30, [0.1, 0.6, 0.2, 0.06, 0.04]), "student": (160, [0.2, 0.35, 0.15, 0.2, 0.1]),
    }  # fmt: skip
    for name, (y, shares) in sizes.items():
        box(picture, 215, y, (110, 56), name, ORANGE)
        arrow(picture, (143, 125), (211, y + 28))
        arrow(picture, (328, y + 28), (386, y + 28))
        for i, share in enumerate(shares):
            picture.rectangle(395 + 20 * i, y + 52 - 70 * share, (14, 70 * share), fill=BLUE)
        picture.line([(390, y + 53), (496, y + 53)], stroke=GREY)
        words(picture, 443, y + 69, "next-token probabilities")
        arrow(picture, (505, y + 32), (556, 115 if name == "teacher" else 140))
    box(picture, 560, 105, (180, 44), "loss: KL(teacher, student)", BLUE)
    picture.line([(650, 152), (650, 252), (270, 252)], stroke=BLUE, stroke_dasharray="5 4", stroke_width=1.5)
    arrow(picture, (270, 252), (270, 220), BLUE)
    words(picture, 540, 246, "gradient: only the student is trained")
    return picture


def splits() -> Picture:
    """Draw how the text is divided among evaluation, held-out text and training."""
    picture = Picture(WIDTH, 130, "how the text is divided")
    left = 12.0
    for name, width, lines, colour in (
        ("evaluation", 150, ("the final figures,", "and nothing else"), ORANGE),
        ("held-out", 150, ("ranks candidates,", "follows the training"), "#e69f00"),
        ("training", 436, ("calibration, trials and distillation;", "repeated where it is shorter than distill.tokens"),
         BLUE),
    ):  # fmt: skip
        picture.rectangle(left, 30, (width - 4, 34), fill=colour)
        picture.text(left + width / 2, 52, name, text_anchor="middle", fill="#ffffff", font_weight=600)
        words(picture, left + width / 2, 84, *lines)
        left += width
    picture.text(12, 18, "documents, shuffled by the seed and packed into blocks", fill=GREY, font_size=11)
    return picture


PICTURES: tuple[Callable[[], Picture], ...] = (
    stages, axes, importance, rotation, search, distillation, splits,
)  # fmt: skip


if __name__ == "__main__":
    for draw in PICTURES:
        Path(__file__).with_suffix("").joinpath(f"{draw.__name__}.svg").write_text(draw().svg() + "\n")
