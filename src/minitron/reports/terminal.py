"""Figures as tables on the terminal."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from minitron.reports.figures import bench_conditions, bench_table, figures_table, tasks_conditions, tasks_table

WORDS = {"", "task", "metric"}
"""Columns of these names hold words, all others numbers."""


def print_bench(record: dict[str, Any]) -> None:
    """Speeds and memory by batch and context, as `measured.bench` found them."""
    _print(bench_table(record), bench_conditions(record))


def print_tasks(record: dict[str, Any]) -> None:
    """Benchmarks, as `measured.evaluate_tasks` found them."""
    _print(tasks_table(record), tasks_conditions(record))


def print_results(out: Path, results: dict[str, Any]) -> None:
    """What `eval.json` holds, and where the student is."""
    measured = results["student"]
    _print(figures_table(results), f"{measured['num_tokens']:,} held-out tokens, context {measured['context']}")
    print(f"student: {out / 'student'}")


def _print(rows: list[list[str]], caption: str) -> None:
    table = Table(caption=caption)
    for name in rows[0]:
        table.add_column(name, justify="left" if name in WORDS else "right", overflow="fold")
    for row in rows[1:]:
        table.add_row(*row)
    Console().print(table)
