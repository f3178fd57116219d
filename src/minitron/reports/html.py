"""Writes `report.html` of a run, finished or not, and the page that compares several runs, from their files alone."""

import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minitron.errors import UserError
from minitron.files import read_jsonl
from minitron.model.anatomy import AXES, SIZE_NAMES
from minitron.recipe import data_in_words
from minitron.reports.candidates import Row, draw_candidates, last_kl, speeds_compare
from minitron.reports.charts import draw_curves, draw_layer_importance, draw_shape, heatmaps
from minitron.reports.figures import (
    bench_by_engine,
    bench_conditions,
    bench_table,
    exports_table,
    figure,
    figures_table,
    format_figure,
    kl_in_words,
    labels_of,
    rounded_conditions,
    rounded_in_words,
    speed_up_conditions,
    speed_up_in_words,
    tasks_conditions,
    tasks_table,
    versions_in_words,
)
from minitron.reports.page import note, panels, stacked, table, write_page
from minitron.reports.run_files import RunFiles
from minitron.reports.steps import in_order, step_table, step_title
from minitron.reports.words import licence_name

NUM_UNTRAINED_SHOWN = 12
PREFERS_WIDTH = 16 * 10**9
"""Parameters up to which the papers prefer cutting width: their "15B" has 15.6 billion (arXiv 2407.14679, table 5)."""


def write_report(folder: Path) -> None:
    """Write `report.html` into a run directory; stages that have not begun have no section.

    Raises:
        UserError: the folder is not a run directory.
    """
    run = RunFiles(folder)
    write_page(folder / "report.html", _title(run), _sections(run))


def write_comparison(folders: list[Path], path: Path) -> None:
    """Write a page that compares several runs.

    Raises:
        UserError: one of the folders is not a run directory, or is given twice.
    """
    runs = {name: RunFiles(folder) for name, folder in _short_names(folders).items()}
    recipes = "".join(f"<h3>{html.escape(name)}</h3>{_provenance(run)}" for name, run in runs.items())
    conditions = "".join(_conditions(run, f"{name}: ") for name, run in runs.items())
    sections = [
        ("Figures", _compared_figures(runs) + conditions),
        ("Shapes", _compared_shapes(runs)),
        ("Distillation", stacked(draw_curves({name: run.metrics for name, run in runs.items()}))),
        ("Recipes", recipes),
    ]
    write_page(path, f"{len(runs)} runs", sections)


def _title(run: RunFiles) -> str:
    teacher = run.record["recipe"]["teacher"]
    if run.made is None:
        return f"{teacher}: under way"
    if "student" not in run.results:
        return f"{teacher}, corrected"
    share = run.results["student"]["num_parameters"] / run.results["teacher"]["num_parameters"]
    if "before" in run.results:
        return f"{teacher}: a student of {share:.1%}, distilled further"
    return f"{teacher}, pruned to {share:.1%} and distilled"


def _sections(run: RunFiles) -> Iterator[tuple[str, str]]:
    yield "Stages", "" if run.made else _stages(run)
    yield "Figures", table(figures_table(run.results)) + _conditions(run) if run.results else ""
    if tasks := run.read("tasks.json"):
        yield "Benchmarks", table(tasks_table(tasks)) + note(tasks_conditions(tasks))
    for engine, speeds in bench_by_engine(run.read("bench.json") or {}).items():
        yield f"Speed in {engine}", table(bench_table(speeds)) + note(bench_conditions(speeds))
    yield "Exports", table(exports_table(run.exports)) if run.exports else ""
    yield "How it was made", _steps(run)
    yield "Shape", _shape(run)
    yield "Importance", _importance(run)
    yield "Search", _search(run)
    heading, learner = ("Correction", "teacher") if "corrected" in run.results else ("Distillation", "student")
    yield heading, stacked(draw_curves({learner: run.metrics}, run.resumed_at))
    yield "Generated text", _samples(run.results)
    yield "Answers", _answers(run.results)
    yield "Recipe", _provenance(run)


def _stages(run: RunFiles) -> str:
    stages = run.record["stages"].items()
    rows = [[name, entry["state"], f"{entry['seconds']:,.0f}"] for name, entry in stages]
    return table([["stage", "state", "seconds"], *rows]) if rows else ""


def _steps(run: RunFiles) -> str:
    """Return what every step did, and the ancestor and licence that the student inherits."""
    history = run.history
    if not history.steps:
        return ""
    parts = [
        f"<h3>{html.escape(step_title(step))}</h3>{table(step_table(step), style='facts')}"
        for step in in_order(history)
    ]
    origin = (
        f"Ancestor on the hub: {history.base_model or 'none known'}. Licence: {licence_name(history) or 'unknown'}."
    )
    return "".join(parts) + note(origin)


def _conditions(run: RunFiles, prefix: str = "") -> str:
    if run.made is None:
        return ""
    measured, record = run.made, run.record
    versions = f", {versions_in_words(record['versions'])}" if "versions" in record else ""
    text = (
        f"{prefix}{measured['num_tokens']:,} tokens of {data_in_words(record['recipe']['data'])} that no other stage "
        f"has seen, context {measured['context']}, seed {record['seed']}{versions}."
    )
    return note(" ".join(filter(None, (text, rounded_conditions(run.results), speed_up_conditions(measured)))))


def _shape(run: RunFiles) -> str:
    """Return the shape, how many layers were kept, and what the papers prefer where a search chose the shape."""
    if not run.archs:
        return ""
    teacher, student = run.archs
    depth, kept = teacher.axis_size("layer"), student.axis_size("layer")
    text = f"{depth - kept} of {depth} layers were removed." if kept < depth else f"All {depth} layers were kept."
    if teacher.num_parameters <= PREFERS_WIDTH and run.read("search.json"):
        text += (
            " The Minitron papers prefer cutting width to cutting depth in models of up to 15 B parameters; the search "
            "compared shapes of both kinds, and decided by what it measured."
        )
    return draw_shape(teacher, student, run.kept_layers).svg() + note(text)


def _importance(run: RunFiles) -> str:
    if not run.importance or not run.archs or run.is_cut_from_larger:
        return ""
    teacher, student = run.archs
    kept = list(range(teacher.axis_size("layer"))) if run.kept_layers is None else run.kept_layers
    pictures = [draw_layer_importance(run.importance["layer"], kept), *heatmaps(run.importance, teacher, student)]
    text = (
        "Layers: one bar per layer; hollow bars are removed layers. Other sizes: one row per "
        "layer, with its entries sorted from the most important (dark) to the least. Entries to the left of the line "
        "were kept."
    )
    if run.record["recipe"]["prune"].get("rotate") is not False:
        text += " Where hidden_size was cut along rotated directions, directions were kept instead of these channels."
    return stacked(pictures) + note(text)


def _search(run: RunFiles) -> str:
    """Return pictures of the candidates, a table of the distilled ones or else the best untrained, and conditions."""
    search, rows = run.read("search.json"), read_jsonl(run.folder / "candidates.jsonl")
    if search is None:
        return ""
    shown = [row for row in rows if row["distilled_kl"]] or sorted(rows, key=last_kl)[:NUM_UNTRAINED_SHOWN]
    # Candidates that were distilled on the most tokens come first, the best of equals before the others.
    shown.sort(key=lambda row: (-max(map(int, row["distilled_kl"]), default=0), last_kl(row)))
    chosen = next((i for i, row in enumerate(shown) if row["chosen"]), None)
    pictures = panels(draw_candidates(rows, search))
    lines = _candidates_table(shown, speeds_compare(search))
    return pictures + table(lines, chosen, "dense") + note(_search_conditions(search))


def _candidates_table(rows: list[Row], with_speeds: bool) -> list[list[str]]:
    names = [name for name in SIZE_NAMES if name in rows[0]["arch"]]
    tokens = sorted({int(tokens) for row in rows for tokens in row["distilled_kl"]})
    trained = [f"{number:,} tokens" for number in tokens]
    lines = [
        ["parameters", *names, "predicted", "untrained", *trained, *(["prefill ms", "token ms"] if with_speeds else [])]
    ]
    for row in rows:
        sizes = [f"{row['arch'][name]:,}" for name in names]
        untrained = [f"{row['predicted_kl']:.3f}", "" if (kl := row["zero_shot_kl"]) is None else f"{kl:.3f}"]
        losses = [f"{kl:.4f}" if (kl := row["distilled_kl"].get(str(number))) else "" for number in tokens]
        speeds = [f"{row[key] * 1e3:.3g}" if row[key] else "" for key in ("prefill_seconds", "decode_seconds")]
        lines.append([f"{row['num_parameters']:,}", *sizes, *untrained, *losses, *(speeds if with_speeds else [])])
    return lines


def _search_conditions(search: dict[str, Any]) -> str:
    speed, compared, distilled = search["speed_of"], search["compared"], search["distilled"]
    seconds = ", ".join(f"{part.replace('_', '-')} {value:,.0f}" for part, value in search["seconds"].items())
    speeds = (
        f"Speeds, in turn with the teacher: prefill of {speed['batch']} × {speed['context']:,} tokens, and one token "
        f"after them, on {speed['device']} in {speed['dtype']}. "
        if speeds_compare(search)
        else ""
    )
    probes = ", ".join(f"{AXES.get(axis, 'nothing cut')} {kl:.3f}" for axis, kl in search["probes"].items())
    return (
        f"KL to the teacher in nats per token: untrained on {compared['tokens_each']:,} held-out tokens, then on "
        f"{search['heldout_tokens']:,}, context {search['context']}, seed {search['seed']}. Of {search['feasible']:,} "
        f"shapes within the budget, {compared['shapes']:,} were compared untrained and {distilled['shapes']:,} "
        f"distilled, on {distilled['tokens']:,} tokens in all. KL after cutting one axis about halfway: {probes}. "
        f"{speeds}Seconds: {seconds}."
    )


def _answers(results: dict[str, Any]) -> str:
    answers = {name: figures["answers"] for name, figures in results.items() if figures.get("answers")}
    if not answers:
        return ""
    asked = [each["asked"] for each in next(iter(answers.values()))]
    rows = [[asked[i], *(each[i]["answer"] for each in answers.values())] for i in range(len(asked))]
    nats = ", ".join(
        f"{name} {figures['answers_teacher_nats']:.3g}"
        for name, figures in results.items()
        if figures.get("answers_teacher_nats") is not None
    )
    return table([["asked", *answers], *rows], style="texts") + note(
        f"Greedy answers of at most 64 tokens to questions that no training has read. The teacher's nats per token of "
        f"them: {nats}."
    )


def _samples(results: dict[str, Any]) -> str:
    samples = {name: figures["samples"] for name, figures in results.items() if "samples" in figures}
    if not samples:
        return ""
    rows = [list(texts) for texts in zip(*samples.values(), strict=True)]
    return table([list(samples), *rows], style="texts") + note(
        "Each model continues the first tokens of some evaluation texts, always with the most likely next token."
    )


def _provenance(run: RunFiles) -> str:
    shown = {key: run.record[key] for key in ("recipe", "versions", "sources", "stages") if key in run.record}
    return f"<pre>{html.escape(json.dumps(shown, indent=2))}</pre>"


def _short_names(folders: list[Path]) -> dict[str, Path]:
    """Return folders by the last parts of their paths, as many as are needed to distinguish them."""
    for count in range(1, 1 + max(len(folder.parts) for folder in folders)):
        names = {"/".join(folder.parts[-count:]): folder for folder in folders}
        if len(names) == len(folders):
            return names
    raise UserError("the same run is given twice")


def _compared_figures(runs: dict[str, RunFiles]) -> str:
    results = {name: run.results for name, run in runs.items() if "student" in run.results}
    if not results:
        return ""
    teacher = next(iter(results.values()))["teacher"]
    rows = [["", "teacher of the first", *results]]
    for key, label in labels_of([figures["student"] for figures in results.values()]).items():
        students = [format_figure(figure(figures["student"], key)) for figures in results.values()]
        rows.append([label, format_figure(figure(teacher, key)), *students])
    rounded = [rounded_in_words(figures) for figures in results.values()]
    if any(rounded):
        rows.append(["perplexity, matrices rounded", "", *rounded])
    distances = [kl_in_words(figures["student"]) for figures in results.values()]
    if any(distances):
        rows.append(["KL to its own teacher (agreement)", "", *distances])
    speed_ups = [speed_up_in_words(figures["student"]) for figures in results.values()]
    if any(speed_ups):
        rows.append(["speed-up over its own teacher", "", *speed_ups])
    return table(rows)


def _compared_shapes(runs: dict[str, RunFiles]) -> str:
    shapes = {name: shape for name, run in runs.items() if (shape := run.read("arch.json"))}
    names = [name for name in SIZE_NAMES if any(name in shape for shape in shapes.values())]
    rows = [[name, *(f"{shape[name]:,}" if name in shape else "" for shape in shapes.values())] for name in names]
    return table([["", *shapes], *rows]) if shapes else ""
