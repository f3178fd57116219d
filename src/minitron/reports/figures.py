"""Figures as rows of text, for cards, pages and the terminal."""

from typing import Any

Results = dict[str, dict[str, Any]]
"""What `eval.json` holds."""
LABELS = {
    "num_parameters": "parameters",
    "num_non_embedding_parameters": "of these not in embeddings",
    "perplexity": "perplexity",
    "bits_per_byte": "bits per byte",
    "tokens_per_second": "tokens/s, forward pass",
}
RETAINED = {"perplexity": "perplexity retained", "bits_per_byte": "bits per byte retained"}
"""Where less is better: the teacher's figure as a share of the student's."""


def figures_table(results: Results) -> list[list[str]]:
    """Rows of `measure, teacher, pruned, student`, the head first."""
    names = list(results)
    rows = [["", *names]]
    for key, label in LABELS.items():
        rows.append([label, *(format_figure(results[name][key]) for name in names)])
    if {"teacher", "student"} <= set(names):
        for key, label in RETAINED.items():
            share = results["teacher"][key] / results["student"][key]
            rows.append([label, *("" if name != "student" else f"{share:.1%}" for name in names)])
        speed_up = results["student"]["tokens_per_second"] / results["teacher"]["tokens_per_second"]
        rows.append(["speed-up", *("" if name != "student" else f"{speed_up:.2f}×" for name in names)])
    return rows


def tasks_table(record: dict[str, Any]) -> list[list[str]]:
    """Benchmarks as `measured.evaluate_tasks` found them, a row a metric, the head first."""
    of_teacher = record.get("teacher_tasks")
    rows = [["task", "metric", "shots", "items", *(["teacher", "student", "retained"] if of_teacher else ["value"])]]
    for name, found in record["tasks"].items():
        for metric, value in found["metrics"].items():
            figures = [f"{value:.4g}"]
            if of_teacher:
                whole = of_teacher.get(name, {}).get("metrics", {}).get(metric)
                figures = ["" if whole is None else f"{whole:.4g}", *figures, f"{value / whole:.1%}" if whole else ""]
            rows.append([name, metric, str(found["shots"]), f"{found['items']:,}", *figures])
    return rows


def tasks_conditions(record: dict[str, Any]) -> str:
    """On what these were measured, what was skipped, and what there is to say of the others."""
    limit = "all items" if record["limit"] is None else f"the first {record['limit']} items of each"
    data = ", ".join(sorted({found["data"] for found in record["tasks"].values()}))
    notes = [f"{name}: {found['note']}" for name, found in record["tasks"].items() if found.get("note")]
    skipped = [f"{name} skipped: {reason}" for name, reason in record["skipped"].items()]
    return "; ".join([f"{limit} of {data}, seed {record['seed']}, lm-eval {record['versions']['lm_eval']}", *notes,
                      *skipped])  # fmt: skip


def bench_table(record: dict[str, Any]) -> list[list[str]]:
    """Speeds and memory by batch and context, as `measured.bench` found them, the head first."""
    rows = [["batch", "context", "", "prefill tokens/s", "decode tokens/s", "first token", "peak memory"]]
    for row in record["rows"]:
        for name in ("model", "against"):
            if found := row.get(name):
                rows.append([
                    str(row["batch"]), f"{row['context']:,}", _called(record, name),
                    f"{found['prefill_tokens_per_second']:,.0f}", f"{found['decode_tokens_per_second']:,.1f}",
                    f"{found['time_to_first_token'] * 1e3:,.0f} ms", f"{found['peak_memory'] / 2**20:,.0f} MiB",
                ])  # fmt: skip
        if ratios := row.get("speed_up"):
            shown = [f"{part['median']:.2f}× ({part['low']:.2f}–{part['high']:.2f})" for part in ratios.values()]
            memory = row["model"]["peak_memory"] / row["against"]["peak_memory"]
            rows.append(["", "", "ratio", *shown, "", f"{memory:.2f}×"])
    return rows


def bench_conditions(record: dict[str, Any]) -> str:
    """How these were measured."""
    turns = f"medians of {record['repeats']} turns after {record['warm_up']} to warm up; speed-ups with their range"
    return f"{turns}; {record['device']}, {record['dtype']}, {record['threads']} threads"


def _called(record: dict[str, Any], name: str) -> str:
    return {"model": "student", "against": "teacher"}[name] if record.get("run") else name


def format_figure(value: Any) -> str:
    """A figure with as many digits as mean something."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
