"""Writes `report.html` of a series: its students side by side, and the time that making them together saved."""

import html
from pathlib import Path

from minitron.files import read_json
from minitron.recipe import Recipe, data_in_words, validate
from minitron.reports.charts import draw_curves
from minitron.reports.figures import (
    figure,
    format_figure,
    kl_in_words,
    labels_of,
    rounded_in_words,
    speed_up_in_words,
)
from minitron.reports.page import note, stacked, table, write_page
from minitron.reports.run_files import RunFiles
from minitron.stages import stages_of

SHARED = ("calibrate", "distill")
"""Steps that a nested series takes once, for all of its students."""


def write_series_report(folder: Path) -> None:
    """Write `report.html` into the folder of a finished series, or of finished stages."""
    record = RunFiles(folder).record
    recipe, stages = record["recipe"], stages_of(validate(Recipe, record["recipe"], str(folder)))
    runs = {stage.name: RunFiles(folder / stage.name) for stage in stages}
    teacher = "the corrected teacher" if any(stage.kind == "correct" for stage in stages) else "the teacher"
    taught_by = teacher if recipe["lineage"]["taught_by"] == "teacher" else "that model"
    num_students = sum("student" in run.results for run in runs.values())
    links = ", ".join(f'<a href="{html.escape(name)}/report.html">{html.escape(name)}</a>' for name in runs)
    is_nested = recipe["lineage"]["nested"]
    how = (
        "The students were made in one training: each is the beginning of the one to its left and shares its weights, "
        "and every step trained one of them."
        if is_nested
        else f"Each student is made from the model to its left and learns from {taught_by}."
    )
    lines = f"{how} {_conditions(runs)}"
    sections = [
        (
            "Stages" if recipe["stages"] else "Students",
            table(_figures_table(runs)) + note(lines) + f"<p>Their reports: {links}.</p>",
        ),
        ("Distillation", stacked(draw_curves({name: run.metrics for name, run in runs.items()}))),
        (
            "Time",
            table(_seconds_table(runs, {"all together": RunFiles(folder)} if is_nested else {}))
            + note("" if is_nested else _saving(folder, num_students)),
        ),
    ]
    made = f"{len(stages)} stages" if recipe["stages"] else f"a series of {num_students} students"
    write_page(folder / "report.html", f"{recipe['teacher']}: {made}", sections)


def _conditions(runs: dict[str, RunFiles]) -> str:
    """Return what the figures were measured on, once for all stages, or for each where they differ."""
    of_stages = {}
    for name, run in runs.items():
        figures, recipe = run.made or {}, run.record["recipe"]
        of_stages[name] = (
            f"on {figures['num_tokens']:,} tokens of {data_in_words(recipe['data'])} that no other stage has seen, "
            f"context {figures['context']}, seed {recipe['seed']}"
        )
    if len(set(of_stages.values())) == 1:
        return f"Measured {next(iter(of_stages.values()))}."
    lines = "; ".join(f"{name} {conditions}" for name, conditions in of_stages.items())
    return f"Measured differently, so that columns do not all compare: {lines}. The teacher was measured as the first."


def _figures_table(runs: dict[str, RunFiles]) -> list[list[str]]:
    teacher = next(iter(runs.values())).results["teacher"]
    models = [teacher, *(run.made or {} for run in runs.values())]
    starts = ("pruned", "before", "teacher")
    before = [next(run.results[name] for name in starts if name in run.results) for run in runs.values()]
    rows = [["", "teacher", *runs]]
    for key, label in labels_of([*before, *models]).items():
        if key == "perplexity":
            rows.append(["perplexity before training", "", *(format_figure(figures[key]) for figures in before)])
        rows.append([label, *(format_figure(figure(figures, key)) for figures in models)])
        if key == "num_parameters":
            shares = [f"{figures[key] / teacher[key]:.1%}" for figures in models]
            rows.append(["share of the teacher", *shares])
    rounded = [rounded_in_words(run.results) for run in runs.values()]
    if any(rounded):
        rows.append(["perplexity, matrices rounded", "", *rounded])
    for when, each in {"before": before, "after": models[1:]}.items():
        if any(distances := [kl_in_words(figures) for figures in each]):
            rows.append([f"KL to its own teacher {when} training (agreement)", "", *distances])
    speed_ups = [speed_up_in_words(run.made or {}) for run in runs.values()]
    if any(speed_ups):
        rows.append(["speed-up over its own teacher", "", *speed_ups])
    return rows


def _seconds_table(runs: dict[str, RunFiles], together: dict[str, RunFiles]) -> list[list[str]]:
    """Return the seconds of each step by run; `together` is the run of the steps that all students share."""
    seconds = {
        name: {
            step: float(entry["seconds"])
            for step, entry in run.record["stages"].items()
            if (name in together) == (step in SHARED) or not together
        }
        for name, run in (runs | together).items()
    }
    rows = [["seconds", *seconds]]
    for step in dict.fromkeys(step for steps in seconds.values() for step in steps):
        rows.append([step, *(f"{steps[step]:,.0f}" if step in steps else "" for steps in seconds.values())])
    return [*rows, ["all", *(f"{sum(steps.values()):,.0f}" for steps in seconds.values())]]


def _saving(folder: Path, num_students: int) -> str:
    path = folder / "teacher.json"
    if not path.exists():
        return "The teacher ran again for every student."
    teacher, others = read_json(path), num_students - 1
    return (
        f"The teacher ran over {teacher['tokens']:,} tokens once, in {teacher['seconds']:,.0f} s, for the search and "
        f"the distillation of all students. Separate runs would have run it {num_students} times: "
        f"{others * teacher['tokens']:,} tokens and about {others * teacher['seconds']:,.0f} s more."
    )
