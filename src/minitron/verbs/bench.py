"""Measure how fast models are and how much memory they take."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron.errors import UserError, nearest
from minitron.verbs.results import Measured

if TYPE_CHECKING:
    from minitron.model.checkpoint import Checkpoint
    from minitron.runtime import Runtime
    from minitron.session import Session

ENGINES = ("transformers", "llama.cpp", "vllm")
QUANTIZE = "q8_0"
"""The type of the matrices in llama.cpp, where no other is asked for."""


def bench(
    model: str | Path,
    *,
    against: str | Path | None = None,
    batch: Sequence[int] = (1,),
    context: Sequence[int] = (512,),
    repeats: int = 5,
    engine: str = "transformers",
    quantize: str | None = None,
    **settings: Any,
) -> Measured:
    """Return speed and size of a model, beside those of another, at every batch size and context length.

    A run directory stands for its student, and is compared with its teacher; `bench.json` in it keeps the figures of
    each engine for its report. The models take turns; ratios divide turns next to each other. In the engine `llama.cpp`
    both run as GGUF files with matrices of the type `quantize` (q8_0 by default), made for the time of the
    measurement, one sequence at a time on the CPU. In `vllm` both folders run as they are, quantised ones too, on the
    device that vLLM was built for.

    Raises:
        UserError: a context is above what a model was made for; the engine does not run a model, is not installed, or
            has no such batch, device or dtype.
    """
    import torch

    from minitron.files import read_json, write_json
    from minitron.recipe import recipe_from
    from minitron.reports.figures import bench_by_engine, bench_conditions, bench_table
    from minitron.run import versions
    from minitron.session import Session
    from minitron.verbs.workspace import run_directory, student_of

    recipe = recipe_from(None, teacher=model, **settings)
    if engine not in ENGINES:
        raise UserError(f"--engine {engine}: {nearest(engine, list(ENGINES))}")
    if engine == "llama.cpp":
        _require_llama_cpp(batch, recipe.device, recipe.dtype)
    elif quantize:
        raise UserError(f"--quantize {quantize} is for --engine llama.cpp: {engine} runs models as they are")
    if engine == "vllm":
        _require_vllm(recipe.device)
    run = run_directory(recipe) if against is None else None
    stored = run / "bench.json" if run else None
    kept = bench_by_engine(read_json(stored)) if stored and stored.is_file() else {}
    recipe, other = student_of(recipe, str(against) if against else None)
    session = Session(recipe)
    session.validate()
    sessions = {"model": session} | (
        {"against": Session(recipe.model_copy(update={"teacher": other}))} if other else {}
    )
    checkpoints = {name: each.teacher for name, each in sessions.items()}
    for checkpoint in checkpoints.values():
        longest = getattr(checkpoint.config, "max_position_embeddings", None) or max(context)
        _require_context(context, longest, f"{checkpoint.folder} was made for")
    grid = [(size, length) for size in batch for length in context]
    if engine == "llama.cpp":
        measured = _in_llama_cpp(sessions, context, repeats=repeats, quantize=quantize or QUANTIZE)
    elif engine == "vllm":
        measured = _in_vllm(sessions, grid, repeats=repeats, dtype=recipe.dtype)
    else:
        measured = _in_transformers(checkpoints, grid, repeats=repeats, runtime=session.runtime)
    record = {
        "run": str(run) if run else None,
        **{name: str(checkpoint.folder) for name, checkpoint in checkpoints.items()},
        "engine": engine,
        "warm_up": 1,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        **measured,
        "versions": versions() | measured.get("versions", {}),
    }
    if stored:
        write_json(stored, {**kept, engine: record})
    return Measured(record, bench_table(record), bench_conditions(record))


def _in_transformers(
    checkpoints: Mapping[str, "Checkpoint"], grid: list[tuple[int, int]], *, repeats: int, runtime: "Runtime"
) -> dict[str, Any]:
    from minitron.evaluation.peak_memory import peak_memory
    from minitron.evaluation.speed import DECODED_TOKENS, alternate, figures_of
    from minitron.model.language_model import load_model
    from minitron.progress import Progress

    models = {
        name: load_model(each, runtime.device, runtime.dtype, runtime.attention) for name, each in checkpoints.items()
    }
    rows = []
    with Progress("bench", len(grid) * len(models) * (repeats + 2), "measurements") as progress:
        for size, length in grid:
            speeds = alternate(models, size, length, repeats, progress.advance)
            sizes = {}
            for name, checkpoint in checkpoints.items():
                peak = peak_memory(checkpoint.folder, size, length, runtime)
                sizes[name] = {"num_parameters": checkpoint.arch.num_parameters, "peak_memory": peak}
                progress.advance(1)
            rows.append({"batch": size, "context": length, **figures_of(speeds, sizes)})
    return {
        "decoded_tokens": DECODED_TOKENS,
        "device": str(runtime.device),
        "dtype": runtime.dtype_name,
        "rows": rows,
    }


def _in_llama_cpp(
    sessions: Mapping[str, "Session"], context: Sequence[int], *, repeats: int, quantize: str
) -> dict[str, Any]:
    import torch

    from minitron.evaluation.speed import figures_of
    from minitron.formats import Request, export
    from minitron.formats.gguf import llama_cpp
    from minitron.progress import Progress

    paths, sizes, rows, version = {}, {}, [], ""
    with (
        tempfile.TemporaryDirectory(prefix="minitron-bench-") as folder,
        Progress("bench", len(sessions) + len(context), "files and contexts") as progress,
    ):
        for name, session in sessions.items():
            (out := Path(folder) / name).mkdir()
            written = export(session, out, Request("gguf", name, quantize))
            _require_context(context, written["context"] or max(context), f"{session.teacher.folder} has in llama.cpp")
            paths[name] = out / written["file"]
            sizes[name] = {key: written[key] for key in ("num_parameters", "num_bytes")}
            progress.advance(1)
        for length in context:
            timing = llama_cpp.alternate(paths, length, threads=torch.get_num_threads(), repeats=repeats)
            rows.append({"batch": 1, "context": length, **figures_of(timing.speeds, sizes)})
            version = timing.version
            progress.advance(1)
    return {
        "decoded_tokens": llama_cpp.DECODED_TOKENS,
        "device": "cpu",
        "dtype": quantize,
        "versions": {"xllamacpp": version},
        "rows": rows,
    }


def _in_vllm(
    sessions: Mapping[str, "Session"], grid: list[tuple[int, int]], *, repeats: int, dtype: str
) -> dict[str, Any]:
    from minitron.evaluation.speed import figures_of
    from minitron.evaluation.vllm_speed import DECODED_TOKENS, load
    from minitron.progress import Progress

    folders = {}
    for name, session in sessions.items():  # vLLM reads quantised folders itself, which a session dequantises
        given = Path(session.recipe.teacher).expanduser()
        folders[name] = given if given.is_dir() else session.teacher.folder
    rows = []
    with Progress("bench", len(grid) * len(folders) * (repeats + 1), "measurements") as progress:
        batch, context = (max(sizes) for sizes in zip(*grid, strict=True))
        models = load(folders, batch=batch, context=context, dtype=dtype)
        sizes = {name: {"num_parameters": each.teacher.arch.num_parameters} for name, each in sessions.items()}
        for size, length in grid:
            speeds = models.alternate(size, length, repeats, progress.advance)
            rows.append({"batch": size, "context": length, **figures_of(speeds, sizes)})
    return {
        "decoded_tokens": DECODED_TOKENS,
        "device": models.device,
        "dtype": dtype,
        "versions": {"vllm": models.version},
        "rows": rows,
    }


def _require_vllm(device: str) -> None:
    from minitron.evaluation.vllm_speed import require_installed

    require_installed()
    if device != "auto":
        raise UserError(f"--device {device}: --engine vllm runs on the device that vLLM was built for")


def _require_llama_cpp(batch: Sequence[int], device: str, dtype: str) -> None:
    from minitron.formats import require_format
    from minitron.formats.gguf import llama_cpp

    llama_cpp.require_installed("--engine llama.cpp")
    require_format("gguf")
    if set(batch) != {1}:
        others = ",".join(map(str, batch))
        raise UserError(f"--batch {others}: --engine llama.cpp is timed with one sequence, --batch 1")
    if device not in ("auto", "cpu"):
        raise UserError(f"--device {device}: --engine llama.cpp is timed on the CPU, --device cpu")
    if dtype != "auto":
        raise UserError(f"--dtype {dtype}: in --engine llama.cpp, --quantize names the type of the matrices")


def _require_context(context: Sequence[int], longest: int, of: str) -> None:
    if max(context) > longest:
        raise UserError(f"context {max(context)} is above the {longest} tokens that {of}")
