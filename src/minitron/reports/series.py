"""Writes `report.html` of a series: its students side by side, and the time that making them together saved."""

import html
from pathlib import Path

from minitron.files import read_json
from minitron.recipe import data_in_words
from minitron.reports.charts import draw_curves
from minitron.reports.figures import LABELS, format_figure, speed_up_in_words
from minitron.reports.page import note, stacked, table, write_page
from minitron.reports.run_files import RunFiles


def write_series_report(folder: Path) -> None:
    """Write `report.html` into the folder of a finished series."""
    record = RunFiles(folder).record
    recipe = record["recipe"]
    students = {str(target): RunFiles(folder / str(target)) for target in recipe["target_params"]}
    first = next(iter(students.values())).results["student"]
    teacher = "the teacher" if recipe["lineage"]["taught_by"] == "teacher" else "that model"
    conditions = note(
        f"Each student is cut out of the model to its left and learns from {teacher}. Measured on "
        f"{first['num_tokens']:,} tokens of {data_in_words(recipe['data'])} that no other stage has seen, context "
        f"{first['context']}, seed {record['seed']}."
    )
    links = ", ".join(f'<a href="{html.escape(name)}/report.html">{html.escape(name)}</a>' for name in students)
    sections = [
        ("Students", table(_figures_table(students)) + conditions + f"<p>Their reports: {links}.</p>"),
        ("Distillation", stacked(draw_curves({name: run.metrics for name, run in students.items()}))),
        ("Time", table(_seconds_table(students)) + note(_saving(folder, len(students)))),
    ]
    write_page(folder / "report.html", f"{recipe['teacher']}: a series of {len(students)} students", sections)


def _figures_table(students: dict[str, RunFiles]) -> list[list[str]]:
    teacher = next(iter(students.values())).results["teacher"]
    models = [teacher, *(run.results["student"] for run in students.values())]
    pruned = [format_figure(run.results["pruned"]["perplexity"]) for run in students.values()]
    rows = [["", "teacher", *students]]
    for key, label in LABELS.items():
        if key == "perplexity":
            rows.append(["perplexity before training", "", *pruned])
        rows.append([label, *(format_figure(figures[key]) for figures in models)])
        if key == "num_parameters":
            shares = [f"{figures[key] / teacher[key]:.1%}" for figures in models]
            rows.append(["share of the teacher", *shares])
    speed_ups = [speed_up_in_words(run.results["student"]) for run in students.values()]
    if any(speed_ups):
        rows.append(["speed-up over its own teacher", "", *speed_ups])
    return rows


def _seconds_table(students: dict[str, RunFiles]) -> list[list[str]]:
    seconds = {
        name: {stage: float(entry["seconds"]) for stage, entry in run.record["stages"].items()}
        for name, run in students.items()
    }
    rows = [["seconds", *seconds]]
    for stage in next(iter(seconds.values())):
        rows.append([stage, *(f"{stages[stage]:,.0f}" for stages in seconds.values())])
    return [*rows, ["all", *(f"{sum(stages.values()):,.0f}" for stages in seconds.values())]]


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
