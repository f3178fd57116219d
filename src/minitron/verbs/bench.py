"""Measure how fast models are and how much memory they take."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minitron.errors import UserError
from minitron.verbs.results import Measured


def bench(
    model: str | Path,
    *,
    against: str | Path | None = None,
    batch: Sequence[int] = (1,),
    context: Sequence[int] = (512,),
    repeats: int = 5,
    **settings: Any,
) -> Measured:
    """Return speed and peak memory of a model, beside those of another, at every batch size and context length.

    A run directory stands for its student, and is compared with its teacher; `bench.json` in it keeps the figures for
    its report. The models take turns; ratios divide turns next to each other.

    Raises:
        UserError: a context is above what a model was made for.
    """
    import torch

    from minitron.evaluation.peak_memory import peak_memory
    from minitron.evaluation.speed import DECODED_TOKENS, alternate, figures_of
    from minitron.files import write_json
    from minitron.model.language_model import load_model
    from minitron.model.source import open_teacher
    from minitron.progress import Progress
    from minitron.recipe import recipe_from
    from minitron.reports.figures import bench_conditions, bench_table
    from minitron.run import versions
    from minitron.session import Session
    from minitron.verbs.workspace import run_directory, student_of

    recipe = recipe_from(None, teacher=model, **settings)
    run = run_directory(recipe) if against is None else None
    recipe, other = student_of(recipe, str(against) if against else None)
    session = Session(recipe)
    session.validate()
    runtime = session.runtime
    checkpoints = {"model": session.teacher} | ({"against": open_teacher(other)} if other else {})
    for checkpoint in checkpoints.values():
        longest = getattr(checkpoint.config, "max_position_embeddings", None) or max(context)
        if max(context) > longest:
            raise UserError(
                f"context {max(context)} is above the {longest} tokens that {checkpoint.folder} was made for"
            )
    models = {
        name: load_model(each, runtime.device, runtime.dtype, runtime.attention) for name, each in checkpoints.items()
    }
    grid = [(size, length) for size in batch for length in context]
    rows = []
    with Progress("bench", len(grid) * len(models) * (repeats + 2), "measurements") as progress:
        for size, length in grid:
            speeds = alternate(models, size, length, repeats, progress.advance)
            peaks = {}
            for name, checkpoint in checkpoints.items():
                peaks[name] = peak_memory(checkpoint.folder, size, length, runtime)
                progress.advance(1)
            rows.append({"batch": size, "context": length, **figures_of(speeds, peaks)})
    record = {
        "run": str(run) if run else None,
        **{name: str(checkpoint.folder) for name, checkpoint in checkpoints.items()},
        "warm_up": 1,
        "repeats": repeats,
        "decoded_tokens": DECODED_TOKENS,
        "device": str(runtime.device),
        "dtype": runtime.dtype_name,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "rows": rows,
    }
    if run is not None:
        write_json(run / "bench.json", record)
    return Measured(record, bench_table(record), bench_conditions(record))
