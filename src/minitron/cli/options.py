"""What verbs share: the application that they are added to, options, and what is done with these."""

import json
import os
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    help="Make a smaller language model out of a trained one: prune it, then distil the rest back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Teacher = Annotated[str, typer.Argument(help="A hub id, a folder, a .gguf file, or the built-in smollm2.")]
Out = Annotated[Path, typer.Argument(help="The folder to make.", resolve_path=True)]
RecipeFile = Annotated[
    Path | None, typer.Option("--recipe", help="A YAML recipe, or minitron-8b and the like; options override it.")
]
Target = Annotated[
    str | None,
    typer.Option("--target-params", help="A share of the teacher (0.7), a count (94M, 4B) or a range (7.8B..8.5B)."),
]
Targets = Annotated[
    str | None,
    typer.Option("--target-params", help="A share of the teacher (0.7), a count (94M, 4B) or a range (7.8B..8.5B); "
                 "several (0.8,0.6,0.4) make a family."),
]  # fmt: skip
NonEmbedding = Annotated[
    str | None, typer.Option("--target-non-embedding-params", help="The same, embeddings not counted.")
]
Active = Annotated[
    str | None, typer.Option("--target-active-params", help="The same, of the experts only those a token is sent to.")
]
Memory = Annotated[
    str | None, typer.Option(help="Of weights, KV cache and Mamba state: 20GiB, or a share of the teacher's.")
]
Throughput = Annotated[str | None, typer.Option(help="Prefill here, at least: 1.5x the teacher's, or 900 tok/s.")]
Latency = Annotated[str | None, typer.Option(help="Of a decoded token here, at most: 0.7x the teacher's, or 40ms.")]
Batch = Annotated[int | None, typer.Option(min=1, help="Sequences that --memory, --throughput and --latency are for.")]
Data = Annotated[
    str | None, typer.Option(help="A txt, jsonl or parquet file or glob, a hub data set, or the built-in wiki.")
]
Family = Annotated[str | None, typer.Option(help="Read the teacher as this model_type, whatever its config says.")]
Tokens = Annotated[str | None, typer.Option(help="Tokens to distil on, such as 2M.")]
States = Annotated[
    str | None, typer.Option("--teacher-states", help="Run the teacher once and keep its states in this folder.")
]
Context = Annotated[int | None, typer.Option(help="Tokens in a block.")]
ServedContext = Annotated[
    str | None, typer.Option("--context", help="Tokens in a block; where --memory, --throughput or --latency is given, "
                             "of the sequences that these are for (128k).")
]  # fmt: skip
Seed = Annotated[int | None, typer.Option(help="Decides the order of the text.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str | None, typer.Option(help="auto, float32, bfloat16 or float16, of the forward passes.")]
Plain = Annotated[bool, typer.Option("--plain", help="The papers' pruning: no rotation, no rescaled norms, no refit.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is at OUT.")]


def imported(name: str) -> Any:
    """A module of ours, imported when a command needs it: torch and transformers take seconds."""
    from minitron.progress import Progress

    with Progress("start"):
        return import_module(f"minitron.{name}")


def recipe_of(path: Path | None, plain: Any = False, **options: Any) -> Any:
    """The recipe of a file and of options, which override it; with `plain`, nothing is mended."""
    from minitron.recipe import PLAIN, load_recipe

    if plain:
        options.update({f"prune.{name}": value for name, value in PLAIN.model_dump().items()})
    return load_recipe(path, options)


def budget_of(
    non_embedding_params: str | None,
    active_params: str | None,
    memory: str | None,
    throughput: str | None,
    latency: str | None,
    batch: int | None,
    context: str | None,
) -> dict[str, Any]:
    """Options as entries of a recipe; a context is that of serving where there is a limit on serving."""
    is_served = any((memory, throughput, latency))
    return {
        "budget.non_embedding_params": non_embedding_params, "budget.active_params": active_params,
        "budget.memory": memory, "budget.throughput": throughput, "budget.latency": latency, "budget.batch": batch,
        "budget.context" if is_served else "context": context,
    }  # fmt: skip


def tables() -> Any:
    """What puts figures in tables."""
    return import_module("minitron.reports.terminal")


def print_json(record: dict[str, Any]) -> None:
    """One JSON object on standard output."""
    if os.environ.get("RANK", "0") == "0":  # of the processes of torchrun, the first one speaks
        print(json.dumps(record, allow_nan=False))


def print_record(record: dict[str, Any], as_json: bool) -> None:
    """A line a key, or JSON."""
    if as_json or os.environ.get("RANK", "0") != "0":
        print_json(record)
        return
    for key, value in record.items():
        shown = value if not isinstance(value, dict) else " · ".join(f"{k} {v}" for k, v in value.items())
        print(f"{key:>28}  {shown:,}" if type(shown) is int else f"{key:>28}  {shown}")
