"""How the candidates of a short list stand, as a table for the terminal."""

from rich.table import Table

from minitron.model.arch import Arch


def standings(rows: list[dict[str, object]], archs: list[Arch], numbers: list[int]) -> Table:
    """A row a candidate: the sizes in which they differ, and its KL to the teacher untrained and after each rung."""
    names = [name for name in archs[0].sizes if len({archs[i].sizes[name] for i in numbers}) > 1]
    heights = sorted({int(tokens) for i in numbers for tokens in _distilled(rows[i])})
    table = Table(title="held-out KL to the teacher, nats a token", title_justify="left")
    for name in ("", "parameters", *names, "untrained", *(f"{tokens:,} tokens" for tokens in heights)):
        table.add_column(name, justify="right", overflow="fold")
    least = {tokens: min(_distilled(rows[i]).get(str(tokens), float("inf")) for i in numbers) for tokens in heights}
    for place, i in enumerate(numbers):
        found = _distilled(rows[i])
        losses = [
            ""
            if (kl := found.get(str(tokens))) is None
            else f"[bold]{kl:.4f}[/bold]"
            if kl == least[tokens]
            else f"{kl:.4f}"
            for tokens in heights
        ]
        sizes = [f"{archs[i].sizes[name]:,}" for name in names]
        table.add_row(str(place + 1), f"{archs[i].num_parameters:,}", *sizes, f"{rows[i]['zero_shot_kl']:.3f}", *losses)
    return table


def _distilled(row: dict[str, object]) -> dict[str, float]:
    found = row["distilled_kl"]
    assert isinstance(found, dict)
    return found
