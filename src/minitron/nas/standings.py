"""Shows how the candidates of a short list stand, as a table for the terminal."""

from rich.table import Table

from minitron.nas.candidates import Candidate


def standings(short_list: list[Candidate]) -> Table:
    """Return a table with a row per candidate: the sizes that differ, and the KL untrained and after each rung."""
    archs = [candidate.arch for candidate in short_list]
    names = [name for name in archs[0].sizes if len({arch.sizes[name] for arch in archs}) > 1]
    heights = sorted({tokens for candidate in short_list for tokens in candidate.distilled_kl})
    table = Table(title="held-out KL to the teacher, nats a token", title_justify="left")
    for name in ("", "parameters", *names, "predicted", "untrained", *(f"{tokens:,} tokens" for tokens in heights)):
        table.add_column(name, justify="right", overflow="fold")
    least = {tokens: min(c.distilled_kl.get(tokens, float("inf")) for c in short_list) for tokens in heights}
    for place, candidate in enumerate(short_list, 1):
        losses = [_in_words(candidate.distilled_kl.get(tokens), least[tokens]) for tokens in heights]
        sizes = [f"{candidate.arch.sizes[name]:,}" for name in names]
        before = [f"{candidate.predicted_kl:.3f}", "" if (kl := candidate.zero_shot_kl) is None else f"{kl:.3f}"]
        table.add_row(str(place), f"{candidate.arch.num_parameters:,}", *sizes, *before, *losses)
    return table


def _in_words(kl: float | None, least: float) -> str:
    if kl is None:
        return ""
    return f"[bold]{kl:.4f}[/bold]" if kl == least else f"{kl:.4f}"
