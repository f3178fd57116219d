"""Writes pages of tables, notes and pictures: each is one HTML file that opens without a network."""

import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from minitron.files import whole_file
from minitron.reports.svg import Picture

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a;
  background: #fff; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .2rem; font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .5rem; border-bottom: 1px solid #ddd; vertical-align: top; }
th:first-child, td:first-child { text-align: left; } tr.chosen td { font-weight: 600; background: #eef5fb; }
.wide { overflow-x: auto; } .dense { font-size: .75rem; } .dense th, .dense td { padding: .3rem .25rem; }
p.note { color: #555; font-size: .9rem; overflow-wrap: anywhere; }
svg { width: 100%; height: auto; }
pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: .8rem; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: .5rem; }
.texts td { text-align: left; white-space: pre-wrap; overflow-wrap: anywhere; min-width: 11rem; font-size: .9rem; }
.texts th { text-align: left; }
.facts td { text-align: left; overflow-wrap: anywhere; } .facts td:first-child { width: 11rem; color: #555; }
@media print { body { margin: 0; max-width: none; } pre { white-space: pre-wrap; } h2 { break-after: avoid; }
  svg, tr { break-inside: avoid; } }
"""


def write_page(path: Path, title: str, sections: Iterable[tuple[str, str]]) -> None:
    """Write a page of sections, each a heading and HTML; sections without content are left out."""
    parts = [f"<h2>{html.escape(heading)}</h2>\n{content}" for heading, content in sections if content]
    text = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="data:,"><title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
{"".join(parts)}
</body></html>
"""
    with whole_file(path) as staging:
        staging.write_text(text, encoding="utf-8", errors="replace")


def table(rows: Sequence[Sequence[str]], marked: int | None = None, style: str = "") -> str:
    """Return an HTML table of text.

    The first row is the head, which is left out when all its cells are empty. `marked` is the number of the row
    below the head that stands out; `style` a class of `STYLE`.
    """
    head, *body = [[html.escape(cell) for cell in row] for row in rows]
    names = "".join("<th>" + cell.replace("_", "_<wbr>") + "</th>" for cell in head)  # long names may wrap
    lines = [f"<tr>{names}</tr>"] if any(head) else []
    for i, row in enumerate(body):
        mark = ' class="chosen"' if i == marked else ""
        lines.append(f"<tr{mark}>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>")
    return f'<div class="wide {style}"><table>{"".join(lines)}</table></div>'


def note(text: str) -> str:
    """Return a small paragraph of text."""
    return f'<p class="note">{html.escape(text)}</p>'


def stacked(pictures: Iterable[Picture]) -> str:
    """Return pictures one below the other, each as wide as the page."""
    return "".join(picture.svg() for picture in pictures)


def panels(pictures: Iterable[Picture]) -> str:
    """Return pictures side by side where the page is wide enough, and one below the other elsewhere."""
    return f'<div class="panels">{stacked(pictures)}</div>'
