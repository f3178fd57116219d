"""`report.html`: one self-contained page on a run, made from its files alone."""

import html
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from minitron.files import read_json, read_jsonl, whole_file
from minitron.model.arch import Arch
from minitron.model.checkpoint import read_config
from minitron.present.card import figures_table
from minitron.present.plot import last_loss, plot
from minitron.recipe import data_in_words

STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: 2rem auto; padding: 0 1rem; color: #1a1a1a; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .5rem; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; } tr.chosen td { font-weight: 600; background: #eef5fb; }
.wide { overflow-x: auto; } p.note { color: #555; font-size: .9rem; }
svg { width: 100%; height: auto; } pre { background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: .8rem; }
@media print { body { margin: 0; max-width: none; } pre { white-space: pre-wrap; } }
"""
NUM_UNTRAINED_SHOWN = 12
TEACHER, STUDENT = "#999999", "#0072b2"
"""Grey and blue: told apart by every kind of sight, and in print."""
BLUES = [STUDENT, "#56b4e9", "#013a63", "#7f7f7f", "#009e73", "#d55e00"]
"""Of several runs."""


def write_report(run: Path) -> None:
    """Write `report.html` into a finished run directory."""
    record, results = read_json(run / "run.json"), read_json(run / "eval.json")
    candidates, metrics = read_jsonl(run / "candidates.jsonl"), read_jsonl(run / "metrics.jsonl")
    read_as = {"teacher": record["recipe"].get("family"), "student": None}
    teacher, student = (
        _sizes(Arch.from_config(read_config(run / name, family).to_dict()).sizes) for name, family in read_as.items()
    )
    chosen = read_json(run / "arch.json")
    recipe, measured = record["recipe"], results["student"]
    share = measured["num_parameters"] / results["teacher"]["num_parameters"]
    title = f"{recipe['teacher']}, pruned to {share:.1%} and distilled"
    provenance = {key: record[key] for key in ("recipe", "versions", "sources", "stages")}
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<h2>Figures</h2>
{table(figures_table(results))}
<p class="note">{measured["num_tokens"]:,} tokens of {html.escape(data_in_words(recipe["data"]))} that no other
stage has seen, context {measured["context"]}, seed {record["seed"]}.</p>
<h2>Shape</h2>
{_shape_bars(teacher, student)}
<h2>Distillation</h2>
{curves({"student": metrics}, BLUES)}
<h2>Search</h2>
{_search(run, candidates, chosen)}
<h2>Recipe</h2>
<pre>{html.escape(json.dumps(provenance, indent=2))}</pre>
</body></html>
"""
    with whole_file(run / "report.html") as staging:
        staging.write_text(page, encoding="utf-8")


def _sizes(sizes: Mapping[str, int]) -> dict[str, int]:
    fixed = {"model_type", "vocab_size", "head_dim", "max_position_embeddings"}
    return {name: size for name, size in sizes.items() if name not in fixed and not isinstance(size, bool)}


def table(rows: list[list[str]], marked: int | None = None) -> str:
    """An HTML table of text, its head first."""
    head, *body = [[html.escape(cell) for cell in row] for row in rows]
    names = "".join("<th>" + cell.replace("_", "_<wbr>") + "</th>" for cell in head)  # long names may wrap
    lines = [f"<tr>{names}</tr>"]
    for i, row in enumerate(body):
        kind = ' class="chosen"' if i == marked else ""
        lines.append(f"<tr{kind}>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>")
    return f'<div class="wide"><table>{"".join(lines)}</table></div>'


def _shape_bars(teacher: dict[str, int], student: dict[str, int]) -> str:
    bars = []
    for i, (name, size) in enumerate(teacher.items()):
        y = 34 * i
        kept = 380 * student[name] / size
        bars.append(
            f'<text x="0" y="{y + 17}" font-size="14">{name}</text>'
            f'<rect x="190" y="{y + 4}" width="380" height="18" fill="none" stroke="{TEACHER}"/>'
            f'<rect x="190" y="{y + 4}" width="{kept:.1f}" height="18" fill="{STUDENT}"/>'
            f'<text x="580" y="{y + 17}" font-size="14">{student[name]:,} of {size:,}</text>'
        )
    return f'<svg viewBox="0 0 720 {34 * len(teacher)}" role="img" aria-label="sizes kept">{"".join(bars)}</svg>'


def curves(runs: dict[str, list[dict[str, Any]]], colours: list[str]) -> str:
    """Loss and held-out perplexity of one run or several, from the rows of their `metrics.jsonl`."""
    losses = {name: [(row["tokens"], row["loss"]) for row in rows if "loss" in row] for name, rows in runs.items()}
    heldout = {
        name: [(row["tokens"], row["heldout_perplexity"]) for row in rows if "heldout_perplexity" in row]
        for name, rows in runs.items()
    }
    trained = {name: points[1:] if len(points) > 2 else points for name, points in heldout.items()}
    return _plot(losses, colours, "KL to the teacher, nats a token") + _plot(
        trained, colours, "perplexity on held-out text, from the first measurement after training began", True
    )


def _plot(lines: dict[str, list[tuple[float, float]]], colours: list[str], label: str, dots: bool = False) -> str:
    every = [point for points in lines.values() for point in points]
    if not every:
        return ""
    left, top, width, height = 60, 24, 640, 180
    last_x, high = max(x for x, _ in every) or 1, max(y for _, y in every) * 1.05
    parts = []
    for (name, points), colour in zip(lines.items(), colours, strict=False):
        place = [(left + width * x / last_x, top + height * (1 - y / high)) for x, y in points]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in place)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for (x, y), (_, value) in zip(place, points, strict=True) if dots else ():
            anchor = "start" if x == left else "middle"
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"/>'
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
        f'<svg viewBox="0 0 760 {top + height + 34}" role="img" aria-label="{label}">'
        f'<text x="{left}" y="14" font-size="14">{label}</text>{ticks}{"".join(parts)}'
        f'<text x="{left + width}" y="{top + height + 18}" font-size="12" text-anchor="end">{last_x:,} tokens</text>'
        "</svg>"
    )


def _search(run: Path, rows: list[dict[str, Any]], chosen: dict[str, Any]) -> str:
    """The plot, what was done, and a table of the candidates that were distilled, or else of the best untrained."""
    search, names = read_json(run / "search.json"), list(_sizes(chosen))
    shown = [row for row in rows if row["distilled_kl"]] or sorted(rows, key=last_loss)[:NUM_UNTRAINED_SHOWN]
    heights = sorted({int(tokens) for row in shown for tokens in row["distilled_kl"]})
    lines = [
        ["parameters", *names, "untrained", *(f"{tokens:,} tokens" for tokens in heights), "prefill ms", "token ms"]
    ]
    # Those that went furthest first, and of these the best.
    ordered = sorted(shown, key=lambda row: (-max(map(int, row["distilled_kl"]), default=0), last_loss(row)))
    for row in ordered:
        speeds = [f"{row[key] * 1e3:.3g}" if row[key] else "" for key in ("prefill_seconds", "decode_seconds")]
        losses = [f"{kl:.4f}" if (kl := row["distilled_kl"].get(str(tokens))) else "" for tokens in heights]
        sizes = [f"{row['arch'][name]:,}" for name in names]
        lines.append([f"{row['num_parameters']:,}", *sizes, f"{row['zero_shot_kl']:.3f}", *losses, *speeds])
    speed, compared, distilled = search["speed_of"], search["compared"], search["distilled"]
    seconds = ", ".join(f"{part.replace('_', '-')} {value:,.0f}" for part, value in search["seconds"].items())
    return f"""{plot(rows, search)}
{table(lines, marked=next((i for i, row in enumerate(ordered) if row["chosen"]), None))}
<p class="note">KL to the teacher in nats a token: untrained on {compared["tokens_each"]:,} held-out tokens, then on
{search["heldout_tokens"]:,}, context {search["context"]}, seed {search["seed"]}. Of {search["feasible"]:,} shapes
within the budget {compared["shapes"]:,} were compared untrained and {distilled["shapes"]:,} distilled, on
{distilled["tokens"]:,} tokens in all. Speeds: prefill of {speed["batch"]} × {speed["context"]:,} tokens and one token
behind them, {html.escape(speed["device"])}, {html.escape(speed["dtype"])}. Seconds: {html.escape(seconds)}.</p>"""
