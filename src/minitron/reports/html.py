"""`report.html`: one self-contained page on a run, finished or under way, or on several; from their files alone."""

import html
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minitron.errors import UserError
from minitron.files import read_json, read_jsonl
from minitron.model.anatomy import AXES
from minitron.model.arch import Arch
from minitron.model.checkpoint import read_config
from minitron.recipe import data_in_words
from minitron.reports.charts import curves, heatmap, layer_scores, layer_stack, per_layer, shape_bars
from minitron.reports.figures import (
    LABELS,
    bench_conditions,
    bench_table,
    figures_table,
    format_figure,
    tasks_conditions,
    tasks_table,
)
from minitron.reports.page import BLUE, OF_RUNS, note, table, write_page
from minitron.reports.plot import last_loss, panels_apart

NUM_UNTRAINED_SHOWN = 12
MEASURED = (
    ("Benchmarks", "tasks.json", tasks_table, tasks_conditions),
    ("Speed", "bench.json", bench_table, bench_conditions),
)
"""What `evaluate --tasks` and `bench` leave in a run directory."""
FIXED = {"vocab_size", "head_dim", "max_position_embeddings"}


def write_report(run: Path) -> None:
    """Write `report.html` into a run directory, on as much of the run as there is.

    Raises:
        UserError: it is no run directory.
    """
    record = _record(run)
    write_page(run / "report.html", _title(run, record), _sections(run, record))


def write_comparison(runs: list[Path], path: Path) -> None:
    """Write a page that puts several runs side by side.

    Raises:
        UserError: one is no run directory.
    """
    records = {run: _record(run) for run in runs}
    names = _names(runs)
    results = {name: read_json(run / "eval.json") for run, name in names.items() if (run / "eval.json").exists()}
    sections = [
        ("Figures", _compared_figures(results) + "".join(_conditions(records[run], results[names[run]], names[run])
                                                       for run in runs if names[run] in results)),
        ("Shapes", _compared_shapes({names[run]: run for run in runs})),
        ("Distillation", curves({names[run]: read_jsonl(run / "metrics.jsonl") for run in runs}, OF_RUNS)),
        ("Recipes", "".join(f"<h3>{html.escape(names[run])}</h3>{_provenance(records[run])}" for run in runs)),
    ]  # fmt: skip
    write_page(path, f"{len(runs)} runs", sections)


def _record(run: Path) -> dict[str, Any]:
    if not (run / "run.json").is_file():
        raise UserError(f"{run} holds no run.json: not a run of minitron")
    found = read_json(run / "run.json")
    if not isinstance(found, dict) or not {"recipe", "stages"} <= set(found):
        raise UserError(f"{run / 'run.json'} is not the record of a run")
    return found


def _title(run: Path, record: dict[str, Any]) -> str:
    teacher = record["recipe"]["teacher"]
    if not (run / "eval.json").exists():
        return f"{teacher}: under way"
    results = read_json(run / "eval.json")
    if "student" not in results:
        return f"{teacher}: under way"
    share = results["student"]["num_parameters"] / results["teacher"]["num_parameters"]
    return f"{teacher}, pruned to {share:.1%} and distilled"


def _sections(run: Path, record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    results = read_json(run / "eval.json") if (run / "eval.json").exists() else {}
    yield "Stages", "" if "student" in results else _stages(record)
    if results:
        conditions = _conditions(record, results) if "student" in results else ""
        yield "Figures", table(figures_table(results)) + conditions
    for name, file, rows, words in MEASURED:
        if (run / file).exists():
            found = read_json(run / file)
            yield name, table(rows(found)) + note(words(found))
    archs = _archs(run, record)
    yield "Shape", _shape(archs, record)
    yield "Importance", _importance(run, archs, record)
    if (run / "search.json").exists():
        yield "Search", _search(run, read_json(run / "arch.json"))
    yield "Distillation", curves({"student": read_jsonl(run / "metrics.jsonl")}, [BLUE], _resumed(record))
    yield "How they go on", _samples(results)
    yield "Recipe", _provenance(record)


def _stages(record: dict[str, Any]) -> str:
    rows = [[name, entry["state"], f"{entry['seconds']:,.0f}"] for name, entry in record["stages"].items()]
    return table([["stage", "state", "seconds"], *rows]) if rows else ""


def _conditions(record: dict[str, Any], results: dict[str, Any], name: str = "") -> str:
    measured = results["student"]
    return note(
        f"{name + ': ' if name else ''}{measured['num_tokens']:,} tokens of {data_in_words(record['recipe']['data'])} "
        f"that no other stage has seen, context {measured['context']}, seed {record['seed']}."
    )


def _archs(run: Path, record: dict[str, Any]) -> list[Arch]:
    """Teacher and student, as far as there is a shape."""
    if not (run / "arch.json").exists() or not (run / "teacher").exists():
        return []
    teacher = Arch.from_config(read_config(run / "teacher", record["recipe"].get("family")).to_dict())
    sizes = read_json(run / "arch.json")
    return [teacher, teacher.resized(**{name: sizes[name] for name in teacher.sizes})]


def _shape(archs: list[Arch], record: dict[str, Any]) -> str:
    if not archs:
        return ""
    teacher, student = archs
    bars = shape_bars(_sizes(teacher), _sizes(student))
    kept = record.get("kept_layers")
    return bars + (layer_stack(teacher, student, kept) if kept is not None else "")


def _sizes(arch: Arch) -> dict[str, int]:
    return {name: size for name, size in arch.sizes.items() if name not in FIXED}


def _importance(run: Path, archs: list[Arch], record: dict[str, Any]) -> str:
    path = run / "importance.safetensors"
    if not path.exists() or not archs or "larger" in record["sources"]:
        return ""
    from safetensors.numpy import load_file

    importance, (teacher, student) = load_file(path), archs
    kept = record.get("kept_layers", list(range(teacher.axis_size("layer"))))
    parts = ["<h3>layers</h3>", layer_scores(importance["layer"], kept)]
    for axis, scores in per_layer(importance, teacher).items():
        parts.append(heatmap(scores, student.axis_size(axis) / teacher.axis_size(axis), AXES[axis]))
    text = (
        "Layers: what is lost without each; hollow ones went. The others: a row a layer, its entries from the most to "
        "the least important, dark being the most; what is left of the line was kept."
    )
    if record["recipe"]["prune"].get("rotate") is not False:
        text += " Where hidden is turned, its directions and not these channels are kept."
    return "".join(parts) + note(text)


def _search(run: Path, chosen: dict[str, Any]) -> str:
    """The plot, what was done, and a table of the candidates that were distilled, or else of the best untrained."""
    rows, search = read_jsonl(run / "candidates.jsonl"), read_json(run / "search.json")
    names = [name for name, size in chosen.items() if name in rows[0]["arch"] and _is_size(name, size)]
    shown = [row for row in rows if row["distilled_kl"]] or sorted(rows, key=last_loss)[:NUM_UNTRAINED_SHOWN]
    heights = sorted({int(tokens) for row in shown for tokens in row["distilled_kl"]})
    trained = [f"{tokens:,} tokens" for tokens in heights]
    lines = [["parameters", *names, "predicted", "untrained", *trained, "prefill ms", "token ms"]]
    # Those that went furthest first, and of these the best.
    ordered = sorted(shown, key=lambda row: (-max(map(int, row["distilled_kl"]), default=0), last_loss(row)))
    for row in ordered:
        speeds = [f"{row[key] * 1e3:.3g}" if row[key] else "" for key in ("prefill_seconds", "decode_seconds")]
        losses = [f"{kl:.4f}" if (kl := row["distilled_kl"].get(str(tokens))) else "" for tokens in heights]
        sizes = [f"{row['arch'][name]:,}" for name in names]
        untrained = [f"{row['predicted_kl']:.3f}", f"{row['zero_shot_kl']:.3f}"]
        lines.append([f"{row['num_parameters']:,}", *sizes, *untrained, *losses, *speeds])
    marked = next((i for i, row in enumerate(ordered) if row["chosen"]), None)
    speed, compared, distilled = search["speed_of"], search["compared"], search["distilled"]
    seconds = ", ".join(f"{part.replace('_', '-')} {value:,.0f}" for part, value in search["seconds"].items())
    probes = ", ".join(f"{AXES[axis]} {kl:.3f}" for axis, kl in search["probes"].items())
    text = (
        f"KL to the teacher in nats a token: untrained on {compared['tokens_each']:,} held-out tokens, then on "
        f"{search['heldout_tokens']:,}, context {search['context']}, seed {search['seed']}. Of {search['feasible']:,} "
        f"shapes within the budget {compared['shapes']:,} were compared untrained and {distilled['shapes']:,} "
        f"distilled, on {distilled['tokens']:,} tokens in all. Cut about half way along one axis alone: {probes}. "
        f"Speeds: prefill of {speed['batch']} × {speed['context']:,} tokens and one token behind them, "
        f"{speed['device']}, {speed['dtype']}. Seconds: {seconds}."
    )
    return panels_apart(rows, search) + table(lines, marked) + note(text)


def _is_size(name: str, size: Any) -> bool:
    return name not in FIXED and isinstance(size, int) and not isinstance(size, bool)


def _resumed(record: dict[str, Any]) -> list[float]:
    return list(record["stages"].get("distill", {}).get("resumed_at", []))


def _samples(results: dict[str, Any]) -> str:
    found = {name: figures["samples"] for name, figures in results.items() if "samples" in figures}
    if not found:
        return ""
    rows = [list(texts) for texts in zip(*found.values(), strict=True)]
    return table([list(found), *rows], kind="texts") + note(
        "The likeliest next token, one after the other, behind the first tokens of some of the texts above."
    )


def _provenance(record: dict[str, Any]) -> str:
    shown = {key: record[key] for key in ("recipe", "versions", "sources", "stages") if key in record}
    return f"<pre>{html.escape(json.dumps(shown, indent=2))}</pre>"


def _names(runs: list[Path]) -> dict[Path, str]:
    """What to call them: the last parts of their paths, as many as tell them apart."""
    for count in range(1, 1 + max(len(run.parts) for run in runs)):
        names = {run: "/".join(run.parts[-count:]) for run in runs}
        if len(set(names.values())) == len(runs):
            return names
    raise UserError("the same run is given twice")


def _compared_figures(results: dict[str, Any]) -> str:
    if not results:
        return ""
    rows = [["", "teacher of the first", *results]]
    first = next(iter(results.values()))["teacher"]
    for key, label in LABELS.items():
        students = [format_figure(found["student"][key]) if "student" in found else "" for found in results.values()]
        rows.append([label, format_figure(first[key]), *students])
    return table(rows)


def _compared_shapes(runs: dict[str, Path]) -> str:
    shapes = {name: read_json(run / "arch.json") for name, run in runs.items() if (run / "arch.json").exists()}
    names = dict.fromkeys(name for shape in shapes.values() for name, size in shape.items() if _is_size(name, size))
    rows = [[name, *(f"{shape[name]:,}" if name in shape else "" for shape in shapes.values())] for name in names]
    return table([["", *shapes], *rows]) if shapes else ""
