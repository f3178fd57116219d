"""Turns figures into tables of text, their head first, for cards, pages, notebooks and the terminal."""

from typing import Any

from rich.filesize import decimal

Results = dict[str, dict[str, Any]]
"""What `eval.json` holds: figures by model, of which tokens per second are not compared: see `speed_up_in_words`."""
Rows = list[list[str]]
PER_TEACHER_TOKEN = "perplexity_per_teacher_token"
"""The figure of models whose vocabulary was narrowed that compares with the teacher's perplexity."""
LABELS = {
    "num_parameters": "parameters",
    "num_non_embedding_parameters": "parameters without embeddings",
    "perplexity": "perplexity",
    PER_TEACHER_TOKEN: "perplexity per token of the teacher",
    "bits_per_byte": "bits per byte",
}
RETAINED = {
    "perplexity": "perplexity retained",
    PER_TEACHER_TOKEN: "perplexity retained",
    "bits_per_byte": "bits per byte retained",
}
"""Figures of which less is better: the student retains the teacher's figure divided by its own. Perplexity is that per
token of the teacher, where the student has other tokens."""
ROUNDED = "student in "
"""How the name of a student that was measured in a scheme begins; the scheme follows."""
BENCH_SPEEDS = ("prefill tokens/s", "decode tokens/s", "first token")
BENCH_SIZES = {"num_parameters": "parameters", "peak_memory": "peak memory", "num_bytes": "file"}
"""What is counted of a model that is timed; peak memory in transformers, the size of the file in other engines."""


def rounded_name(scheme: str) -> str:
    """Return the name in `eval.json` of a student whose matrices are rounded by a scheme (`distill.quantize`)."""
    return f"{ROUNDED}{scheme}"


def labels_of(models: list[dict[str, Any]]) -> dict[str, str]:
    """Return the figures that are shown of models, with their labels; see `figure`."""
    is_narrowed = any(PER_TEACHER_TOKEN in figures for figures in models)
    return {key: label for key, label in LABELS.items() if key != PER_TEACHER_TOKEN or is_narrowed}


def figure(figures: dict[str, Any], key: str) -> Any:
    """Return a figure of a model; a model with all tokens of its teacher has one perplexity."""
    return figures["perplexity"] if key == PER_TEACHER_TOKEN and key not in figures else figures[key]


def figures_table(results: Results) -> Rows:
    """Return a row per figure and a column per model, with what a student retains of its teacher."""
    names = list(results)
    rows = [["", *names]]
    labels = labels_of(list(results.values()))
    for key, label in labels.items():
        rows.append([label, *(format_figure(figure(results[name], key)) for name in names)])
    distances = [kl_in_words(results[name]) for name in names]
    if any(distances):
        rows.append(["KL to the teacher (agreement)", *distances])
    if {"teacher", "student"} <= set(names):
        other = "perplexity" if PER_TEACHER_TOKEN in labels else PER_TEACHER_TOKEN
        for key, label in RETAINED.items():
            if key == other:
                continue
            shares = {name: results["teacher"][key] / results[name][key] for name in names if _is_student(name)}
            rows.append([label, *(f"{shares[name]:.1%}" if name in shares else "" for name in names)])
        if speed_up := speed_up_in_words(results["student"]):
            rows.append(["speed-up", *("" if name != "student" else speed_up for name in names)])
    return rows


def _is_student(name: str) -> bool:
    return name == "student" or name.startswith(ROUNDED)


def rounded_conditions(results: Results) -> str:
    """Return which student each figure is of, where one was measured in a scheme as well; else an empty string."""
    return " ".join(
        f'"student" was measured as it is saved, "{name}" with its matrices rounded as in training, which are the '
        f"values that an export in {name.removeprefix(ROUNDED)} holds."
        for name in results
        if name.startswith(ROUNDED)
    )


def rounded_in_words(results: dict[str, Any]) -> str:
    """Return the perplexity of a student in the scheme that it was trained for; empty where none was measured."""
    rounded = {name.removeprefix(ROUNDED): figures for name, figures in results.items() if name.startswith(ROUNDED)}
    return ", ".join(f"{format_figure(figures['perplexity'])} in {scheme}" for scheme, figures in rounded.items())


def kl_in_words(figures: dict[str, Any]) -> str:
    """Return a model's KL to its teacher in nats per token, and their agreement; empty where they were not compared."""
    return f"{format_figure(figures['kl'])} ({figures['top1']:.1%})" if "kl" in figures else ""


def speed_up_in_words(student: dict[str, Any]) -> str:
    """Return how much faster than its teacher a student is, with the range; empty where they were not timed in turn.

    The tokens per second of models that were measured one after the other do not compare: what else the machine did
    changed in between.
    """
    return ratio_in_words(student["speed_up"]) if "speed_up" in student else ""


def speed_up_conditions(student: dict[str, Any]) -> str:
    """Return how a speed-up was measured; empty where it was not."""
    if "speed_up" not in student:
        return ""
    return (
        f"The speed-up is the median ratio of {student['speed_up']['turns']} turns, with the range: in each, teacher "
        f"and student read {student['context']} tokens in one forward pass, on the machine that made the student."
    )


def versions_in_words(versions: dict[str, str]) -> str:
    """Return the versions of the software that computes figures."""
    names = ("minitron", "torch", "transformers")
    return ", ".join(f"{name} {versions[name]}" for name in names if name in versions)


def ratio_in_words(ratio: dict[str, float]) -> str:
    """Return the median of some ratios, and their range."""
    return f"{ratio['median']:.2f}× ({ratio['low']:.2f}–{ratio['high']:.2f})"


def tasks_table(record: dict[str, Any]) -> Rows:
    """Return a row per metric of every benchmark in a `tasks.json`."""
    teacher_tasks = record.get("teacher_tasks")
    rows = [["task", "metric", "shots", "items", *(["teacher", "student", "retained"] if teacher_tasks else ["value"])]]
    for name, result in record["tasks"].items():
        for metric, value in result["metrics"].items():
            figures = [f"{value:.4g}"]
            if teacher_tasks:
                teacher = teacher_tasks.get(name, {}).get("metrics", {}).get(metric)
                retained = f"{value / teacher:.1%}" if teacher else ""
                figures = ["" if teacher is None else f"{teacher:.4g}", *figures, retained]
            rows.append([name, metric, str(result["shots"]), f"{result['items']:,}", *figures])
    return rows


def tasks_conditions(record: dict[str, Any]) -> str:
    """Return which items the benchmarks in a `tasks.json` used, notes on them, and why others were skipped."""
    limit = "all items" if record["limit"] is None else f"the first {record['limit']} items of each"
    data = ", ".join(sorted({result["data"] for result in record["tasks"].values()}))
    items = f"{limit} of {data}, seed {record['seed']}, lm-eval {record['versions']['lm_eval']}"
    notes = [f"{name}: {result['note']}" for name, result in record["tasks"].items() if result.get("note")]
    skipped = [f"{name} skipped: {reason}" for name, reason in record["skipped"].items()]
    return "; ".join([items, *notes, *skipped])


def bench_by_engine(stored: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the measurements that a `bench.json` holds, by engine; earlier files hold one, of transformers."""
    return {"transformers": stored} if "rows" in stored else stored


def bench_table(record: dict[str, Any]) -> Rows:
    """Return speeds and sizes of a measurement in `bench.json`, a row per model, batch size and context."""
    sizes = {key: label for key, label in BENCH_SIZES.items() if all(key in row["model"] for row in record["rows"])}
    rows = [["batch", "context", "", *BENCH_SPEEDS, *sizes.values()]]
    names = (
        {"model": "student", "against": "teacher"} if record.get("run") else {"model": "model", "against": "against"}
    )
    for row in record["rows"]:
        for key, name in names.items():
            if key not in row:
                continue
            speeds = [
                f"{row[key]['prefill_tokens_per_second']:,.0f}",
                f"{row[key]['decode_tokens_per_second']:,.1f}",
                f"{row[key]['time_to_first_token'] * 1e3:,.0f} ms",
            ]
            counts = [
                f"{row[key][size] / 1e6:,.1f}M" if size == "num_parameters" else f"{row[key][size] / 2**20:,.0f} MiB"
                for size in sizes
            ]
            rows.append([str(row["batch"]), f"{row['context']:,}", name, *speeds, *counts])
        if ratios := row.get("speed_up"):
            cells = [ratio_in_words(ratio) for ratio in ratios.values()]
            shares = [f"{row['model'][size] / row['against'][size]:.2f}×" for size in sizes]
            rows.append(["", "", "ratio", *cells, "", *shares])
    return rows


def bench_conditions(record: dict[str, Any]) -> str:
    """Return how often, in what and on what the speeds of a measurement in `bench.json` were measured."""
    rounds = f"medians of {record['repeats']} rounds after {record['warm_up']} warm-up; ratios with their range"
    tokens = f"random tokens of seed 0, {record['decoded_tokens']} decoded"
    engine, versions = record.get("engine", "transformers"), record["versions"]
    package = {"llama.cpp": "xllamacpp", "vllm": "vllm"}.get(engine, "transformers")
    software = f"{engine} {versions[package]}" if package == engine else f"{engine} ({package} {versions[package]})"
    return f"{rounds}; {tokens}; {software}, {record['device']}, {record['dtype']}, {record['threads']} threads"


def format_figure(value: Any) -> str:
    """Return a figure with its significant digits: integers whole, others with four digits or no decimals."""
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def exports_table(exports: dict[str, dict[str, Any]]) -> Rows:
    """Return a table of exports, by folder: what each one takes, and how far it is from the student, where checked."""
    rows = [["export", "type", "size", "KL, nats per token", "top-1 agreement", "checked in"]]
    for folder, record in exports.items():
        checked = record["checked"]
        figures = [f"{checked['kl']:.4g}", f"{checked['agreement']:.2%}", checked["engine"]] if checked else [""] * 3
        rows.append([folder, record["type"], decimal(record["num_bytes"]), *figures])
    return rows
