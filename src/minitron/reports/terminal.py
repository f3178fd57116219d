"""Prints results on the terminal, as tables of figures."""

from typing import Any

from rich.console import Console
from rich.table import Table

TEXT_COLUMNS = {"", "task", "metric"}
"""Names of the columns that hold text, which is aligned left; all other columns hold numbers."""


def print_result(result: Any) -> None:
    """Print the result of a verb: a table where its columns have names, otherwise a name and a value per line."""
    for rows, caption, footer in result.tables():
        if any(rows[0]):
            _print_table(rows, caption)
        else:
            for name, value in rows[1:]:
                print(f"{name:>28}  {value}")
        if footer:
            print(footer)


def _print_table(rows: list[list[str]], caption: str) -> None:
    table = Table(caption=caption)
    for name in rows[0]:
        table.add_column(name, justify="left" if name in TEXT_COLUMNS else "right", overflow="fold")
    for row in rows[1:]:
        table.add_row(*row)
    Console().print(table)
