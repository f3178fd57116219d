"""`report.html` of a family: its members side by side, and what making them together saved."""

import html
from pathlib import Path
from typing import Any

from minitron.files import read_json, read_jsonl
from minitron.recipe import data_in_words
from minitron.reports.charts import curves
from minitron.reports.page import OF_RUNS, note, table, write_page


def write_series_report(out: Path) -> None:
    """Write `report.html` into the folder of a finished family."""
    record = read_json(out / "run.json")
    recipe, names = record["recipe"], [str(target) for target in record["recipe"]["target_params"]]
    results = {name: read_json(out / name / "eval.json") for name in names}
    members = {name: read_json(out / name / "run.json") for name in names}
    title = f"{recipe['teacher']}: a family of {len(names)}"
    first = results[names[0]]["student"]
    members_note = (
        f"Each is cut out of the one to its left and taught by {_taught_by(recipe)}. {first['num_tokens']:,} tokens of "
        f"{data_in_words(recipe['data'])} that no stage has seen, context {first['context']}, seed {record['seed']}."
    )
    sections = [
        ("Members", table(_figures(names, results)) + note(members_note) + f"<p>Their reports: {_links(names)}.</p>"),
        ("Distillation", curves({name: read_jsonl(out / name / "metrics.jsonl") for name in names}, OF_RUNS)),
        ("What it took", table(_seconds(names, members)) + note(_saving(out, names))),
    ]
    write_page(out / "report.html", title, sections)


def _figures(names: list[str], results: dict[str, Any]) -> list[list[str]]:
    whole = results[names[0]]["teacher"]
    columns = [("teacher", whole), *((name, results[name]["student"]) for name in names)]
    rows = [["", *(name for name, _ in columns)]]
    rows.append(["parameters", *(f"{found['num_parameters']:,}" for _, found in columns)])
    rows.append(
        ["share of the teacher", *(f"{found['num_parameters'] / whole['num_parameters']:.1%}" for _, found in columns)]
    )
    rows.append(
        ["perplexity before training", "", *(f"{results[name]['pruned']['perplexity']:,.4g}" for name in names)]
    )
    rows.append(["perplexity", *(f"{found['perplexity']:,.4g}" for _, found in columns)])
    rows.append(["bits per byte", *(f"{found['bits_per_byte']:.4g}" for _, found in columns)])
    rows.append(["tokens/s, forward pass", *(f"{found['tokens_per_second']:,.0f}" for _, found in columns)])
    return rows


def _seconds(names: list[str], members: dict[str, Any]) -> list[list[str]]:
    stages = list(members[names[0]]["stages"])
    rows = [["seconds", *names]]
    for stage in stages:
        rows.append([stage, *(f"{members[name]['stages'][stage]['seconds']:,.0f}" for name in names)])
    sums = (sum(entry["seconds"] for entry in members[name]["stages"].values()) for name in names)
    return [*rows, ["all", *(f"{total:,.0f}" for total in sums)]]


def _saving(out: Path, names: list[str]) -> str:
    path = out / "teacher.json"
    if not path.exists():
        return "The teacher ran along with every member."
    teacher = read_json(path)
    others = len(names) - 1
    return (
        f"The teacher ran over {teacher['tokens']:,} tokens once, in {teacher['seconds']:,.0f} s, for the search and "
        f"the distillation of all members. Separate runs would have run it {len(names)} times: "
        f"{others * teacher['tokens']:,} tokens and about {others * teacher['seconds']:,.0f} s more."
    )


def _taught_by(recipe: dict[str, Any]) -> str:
    return "the teacher" if recipe["lineage"]["taught_by"] == "teacher" else "that one"


def _links(names: list[str]) -> str:
    return ", ".join(f'<a href="{html.escape(name)}/report.html">{html.escape(name)}</a>' for name in names)
