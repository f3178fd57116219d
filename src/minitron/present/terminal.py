"""Figures as tables on the terminal."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from minitron.present.card import figures_table


def print_bench(record: dict[str, Any]) -> None:
    """Speeds and memory by batch and context, as `measured.bench` found them."""
    where = f"{record['device']}, {record['dtype']}, {record['threads']} threads"
    turns = f"medians of {record['repeats']} turns after {record['warm_up']} to warm up; speed-ups with their range"
    table = Table(caption=f"{turns}; {where}")
    for name in ("batch", "context", "", "prefill tokens/s", "decode tokens/s", "first token", "peak memory"):
        table.add_column(name, justify="right")
    for row in record["rows"]:
        for name in ("model", "against"):
            if found := row.get(name):
                table.add_row(
                    str(row["batch"]), f"{row['context']:,}", name, f"{found['prefill_tokens_per_second']:,.0f}",
                    f"{found['decode_tokens_per_second']:,.1f}", f"{found['time_to_first_token'] * 1e3:,.0f} ms",
                    f"{found['peak_memory'] / 2**20:,.0f} MiB",
                )  # fmt: skip
        if ratios := row.get("speed_up"):
            shown = [f"{part['median']:.2f}× ({part['low']:.2f}–{part['high']:.2f})" for part in ratios.values()]
            memory = row["model"]["peak_memory"] / row["against"]["peak_memory"]
            table.add_row("", "", "ratio", *shown, "", f"{memory:.2f}×")
    Console().print(table)


def print_tasks(record: dict[str, Any]) -> None:
    """Benchmarks, as `measured.evaluate_tasks` found them."""
    limit = "all items" if record["limit"] is None else f"the first {record['limit']} items of each"
    table = Table(caption=f"{limit}, seed {record['seed']}, lm-eval {record['versions']['lm_eval']}")
    for name in ("task", "metric", "value", "shots", "items", "data"):
        table.add_column(name, justify="right" if name in {"value", "shots", "items"} else "left", overflow="fold")
    for name, found in record["tasks"].items():
        for metric, value in found["metrics"].items():
            table.add_row(name, metric, f"{value:.4f}", str(found["shots"]), f"{found['items']:,}", found["data"])
        if note := found.get("note"):
            table.add_row(name, note, "", "", f"{found['items']:,}", found["data"])
    Console().print(table)


def print_results(out: Path, results: dict[str, Any]) -> None:
    """What `eval.json` holds, and where the student is."""
    head, *rows = figures_table(results)
    measured = results["student"]
    table = Table(caption=f"{measured['num_tokens']:,} held-out tokens, context {measured['context']}")
    for i, name in enumerate(head):
        table.add_column(name, justify="right" if i else "left")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    print(f"student: {out / 'student'}")
