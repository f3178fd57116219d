"""Verbs that make a smaller model, or a part of the way to one."""

from pathlib import Path
from typing import Annotated

import typer

from minitron.cli.options import (
    Active,
    Batch,
    Context,
    Data,
    Device,
    Dtype,
    Family,
    Json,
    Latency,
    Memory,
    NonEmbedding,
    Out,
    Overwrite,
    Plain,
    RecipeFile,
    Seed,
    ServedContext,
    States,
    Target,
    Targets,
    Teacher,
    Throughput,
    Tokens,
    app,
    budget_of,
    imported,
    print_json,
    print_record,
    recipe_of,
    tables,
)
from minitron.errors import UserError


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
    budget = budget_of(target_non_embedding_params, target_active_params, memory, throughput, latency, batch, context)
    loaded = recipe_of(recipe, plain=plain, teacher=teacher, family=family, target_params=target_params, data=data,
                     seed=seed, device=device, dtype=dtype, **budget,
                     **{"distill.tokens": tokens, "distill.teacher_states": teacher_states})  # fmt: skip
    if isinstance(loaded.target_params, tuple):
        members = imported("lineage").compress_family(loaded, out, overwrite)
        if as_json:
            print_json({"out": str(out), "members": members})
        for name, found in () if as_json else members.items():
            tables().print_results(out / name, found)
        return
    results = imported("pipeline").compress(loaded, out, overwrite)
    if as_json:
        print_json({"out": str(out), **results})
    else:
        tables().print_results(out, results)


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
    loaded = recipe_of(recipe, teacher=teacher, family=family, data=data, context=context, seed=seed,
                     device=device, dtype=dtype, **{"calibration.tokens": tokens})  # fmt: skip
    print_record(imported("alone").calibrate(loaded, out, overwrite), as_json)


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
    budget = budget_of(target_non_embedding_params, target_active_params, memory, throughput, latency, batch, context)
    loaded = recipe_of(recipe, teacher=teacher, family=family, target_params=target_params, data=data,
                     seed=seed, device=device, dtype=dtype, **budget)  # fmt: skip
    print_record(imported("alone").search(loaded, out, overwrite), as_json)


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
        print_record(imported("alone").plan_prune(teacher, given, arch, family), as_json)
        return
    if out is None:
        raise UserError("prune needs OUT, the folder to make, or --dry-run")
    loaded = recipe_of(recipe, plain=plain, teacher=teacher, family=family, target_params=target_params, data=data,
                     context=context, seed=seed, device=device, dtype=dtype)  # fmt: skip
    print_record(imported("alone").prune(loaded, given, arch, importance, out, overwrite), as_json)


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
    loaded = recipe_of(recipe, teacher=teacher, family=family, data=data, context=context, seed=seed,
                     device=device, dtype=dtype,
                     **{"distill.tokens": tokens, "distill.teacher_states": teacher_states})  # fmt: skip
    print_record(imported("alone").distill(loaded, student, out, overwrite), as_json)


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
    loaded = recipe_of(recipe, teacher=teacher, family=family, data=data, context=context, seed=seed, device=device,
                     dtype=dtype, **{"distill.tokens": tokens, "distill.trains": method})  # fmt: skip
    print_record(imported("alone").correct(loaded, out, overwrite), as_json)
