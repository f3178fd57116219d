"""Writes the tables as Markdown, with a verdict on every claim, and their plots as SVG."""

import math
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from textwrap import fill

from benchmarks.papers.runner import Row
from benchmarks.papers.tables import TABLES, Line, Table
from benchmarks.papers.teachers import TEACHERS
from benchmarks.papers.verdicts import Verdict, differences, figure_of, noise_of, rank_correlation
from minitron.files import read_jsonl
from minitron.reports.charts import draw_curves
from minitron.reports.svg import SERIES

MARK = "<!-- Below this line: python -m benchmarks.papers page -->"
"""Everything after this line of a document is replaced."""


def write_page(results: Path, document: Path) -> None:
    """Replace the end of a Markdown document by all tables that have rows; write plots beside it.

    `results` holds a file of rows for every teacher. What stands before the mark is kept; without a mark, the tables
    are added at the end.
    """
    rows = {name: read_jsonl(results / f"{name}.jsonl") for name in TEACHERS}
    kept = document.read_text(encoding="utf-8").split(MARK)[0].rstrip()
    parts = [MARK, *(_conditions(name, found) for name, found in rows.items() if found)]
    verdicts = {name: _verdicts(table, rows[table.teacher]) for name, table in TABLES.items()}
    parts.append(_summary(verdicts))
    for name, table in TABLES.items():
        found = [row for row in rows[table.teacher] if row["arm"] in table.arms]
        if found:
            parts += [f"### {table.title}", _table(table, found), *_claims(verdicts[name])]
            if table.note:
                parts.append(fill(table.note, width=120))
            if name in PLOTS:
                parts += PLOTS[name](table, found, document.parent / f"papers-{name}.svg")
    document.write_text("\n\n".join([kept, *parts]) + "\n", encoding="utf-8")


def _conditions(name: str, rows: Sequence[Row]) -> str:
    """State what all rows of a teacher share."""
    first, training = rows[0], TEACHERS[name]
    seeds = sorted({row["seed"] for row in rows})
    of_seeds = f"{'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}"
    releases = ", ".join(f"{package} {number}" for package, number in first["versions"].items())
    machines = " or ".join(sorted({row["machine"] for row in rows}))
    return fill(
        f"Teacher `{name}` ({training.model_type}, trained on {training.tokens} tokens of wiki with seed "
        f"{training.seed}, vocabulary {training.vocab_size}): {len(rows)} students of {of_seeds}; "
        f"a unit of training is {first['unit']:,} tokens, context {first['context']}; "
        f"losses in nats per token on {first['evaluation_tokens']:,} tokens of documents that nothing was trained on. "
        f"{releases}; {machines}.",
        width=120,
        break_on_hyphens=False,
    )


def _verdicts(table: Table, rows: Sequence[Row]) -> list[Verdict]:
    claims = [claim for other in TABLES.values() if other.teacher == table.teacher for claim in other.claims]
    return [
        Verdict(
            claim,
            differences(claim, rows),
            noise_of([other for other in claims if other.figure == claim.figure], rows),
        )
        for claim in table.claims
    ]


def _summary(verdicts: dict[str, list[Verdict]]) -> str:
    lines = []
    for name, found in verdicts.items():
        words = [verdict.in_words for verdict in found]
        counts = [words.count(word) for word in ("holds", "does not hold", "not beyond noise", "not measured")]
        if found:
            lines.append([TABLES[name].title, f"`{name}`", *map(str, counts)])
    return _markdown(["", "command", "holds", "does not hold", "not beyond noise", "not measured"], lines, numbers=2)


def _table(table: Table, rows: Sequence[Row]) -> str:
    head = ["", "parameters", "units", "loss before", "loss after", "KL before", "KL after", "seeds"]
    head += [f"papers: {column}" for column in table.paper_columns]
    lines = [_line(line, found, len(table.paper_columns)) for line in table.lines if (found := _of(line.arm, rows))]
    return f"Papers: {table.source}.\n\n" + _markdown(head, lines, numbers=1)


def _line(line: Line, rows: Sequence[Row], num_columns: int) -> list[str]:
    unit = rows[0]["tokens"] / rows[0]["unit"]
    cells = [line.words, f"{rows[0]['num_parameters']:,}", f"{unit:g}"]
    for name, digits in (("loss", 3), ("kl", 3)):
        for stage in ("before", "after"):
            cells.append(_spread([row[stage][name] for row in rows if stage in row], digits))
    cells.append(str(len(rows)))
    return [*cells, *(line.paper or ("",) * num_columns)]


def _spread(values: Sequence[float], digits: int) -> str:
    """Write the mean of values, and half of the distance between the least and the greatest."""
    if not values:
        return ""
    mean = f"{sum(values) / len(values):.{digits}f}"
    return f"{mean} ± {(max(values) - min(values)) / 2:.{digits}f}" if len(values) > 1 else mean


def _claims(verdicts: Sequence[Verdict]) -> list[str]:
    lines = []
    for verdict in verdicts:
        values = " / ".join(f"{value:+.3f}" for value in verdict.differences)
        error = "" if math.isnan(verdict.noise) or not verdict.differences else f"± {verdict.error:.3f}"
        lines.append([verdict.claim.words, values, error, f"**{verdict.in_words}**"])
    return [_markdown(["the papers claim", "difference by seed", "standard error", "here"], lines)] if lines else []


def _markdown(head: Sequence[str], lines: Sequence[Sequence[str]], numbers: int | None = None) -> str:
    """Write a table; columns from `numbers` on are set to the right."""
    marks = ["---:" if numbers is not None and i >= numbers else "---" for i in range(len(head))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, marks, *lines))


def _of(arm: str, rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if row["arm"] == arm]


def _plot_tokens(table: Table, rows: Sequence[Row], path: Path) -> list[str]:
    """Draw the perplexity of students over the tokens of their training, a line for each way of training."""
    curves: dict[str, list[dict[str, float]]] = {}
    for line in table.lines:
        values = [value for row in _of(line.arm, rows) if (value := figure_of(row, "after")) is not None]
        if values:
            mean, tokens = sum(values) / len(values), _of(line.arm, rows)[0]["tokens"]
            point = {"tokens": tokens, "heldout_perplexity": math.exp(mean)}
            curves.setdefault(line.words.rpartition(", ")[0], []).append(point)
    path.write_text(draw_curves(curves)[0].svg(), encoding="utf-8")
    return [f"![Perplexity over tokens]({path.name})"]


def _plot_ranks(table: Table, rows: Sequence[Row], path: Path) -> list[str]:
    """Draw the curves of candidates with the first seed; compare their ranks on the way with the last ones."""
    curves = {line.words: _of(line.arm, rows)[0]["curve"] for line in table.lines if _of(line.arm, rows)}
    points = {
        name: [{"tokens": tokens, "heldout_perplexity": math.exp(loss)} for tokens, loss in curve[1:]]
        for name, curve in islice(curves.items(), len(SERIES))  # each line needs a colour of its own
    }
    path.write_text(draw_curves(points)[0].svg(), encoding="utf-8")
    lines = []
    for seed in sorted({row["seed"] for row in rows}):
        of_seed = [row["curve"] for row in rows if row["seed"] == seed]
        if len(of_seed) > 2:
            losses = [[curve[i][1] for curve in of_seed] for i in range(len(of_seed[0]))]
            correlations = [f"{rank_correlation(at, losses[-1]):.2f}" for at in losses]
            lines.append([str(seed), str(len(of_seed)), *correlations])
    head = ["seed", "candidates", *(f"{tokens:,} tokens" for tokens, _ in next(iter(curves.values())))]
    words = (
        f"{len(points)} shapes are drawn, with seed {rows[0]['seed']}. Rank correlation of the losses on held-out text "
        "with those at the end of the training:"
    )
    return [f"![Perplexity of candidates]({path.name})", fill(words, width=120), _markdown(head, lines, numbers=1)]


PLOTS = {"figure1": _plot_tokens, "figure9": _plot_ranks}
"""What is drawn in addition to a table, by its name: Markdown and an SVG file."""
