"""Figures as tables on the terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

WORDS = {"", "task", "metric"}
"""Columns of these names hold words, all others numbers."""


def print_result(result: Any) -> None:
    """Print what a verb returned: tables of figures, or a name and a value per line."""
    for rows, caption, below in result.tables():
        if any(rows[0]):
            _print(rows, caption)
        else:
            for name, value in rows[1:]:
                print(f"{name:>28}  {value}")
        if below:
            print(below)


def _print(rows: list[list[str]], caption: str) -> None:
    table = Table(caption=caption)
    for name in rows[0]:
        table.add_column(name, justify="left" if name in WORDS else "right", overflow="fold")
    for row in rows[1:]:
        table.add_row(*row)
    Console().print(table)
