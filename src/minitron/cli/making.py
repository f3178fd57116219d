"""Verbs that make a smaller model, or do one step towards it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from minitron.cli.options import (
    BUDGET,
    CONTEXT,
    MACHINE,
    SERVED,
    TARGET,
    TEXT,
    TRAINING,
    TRIM,
    Out,
    Overwrite,
    Plain,
    Setting,
    Teacher,
    imported,
    verb,
)
from minitron.errors import UserError
from minitron.model.anatomy import AXES, KINDS, PRUNABLE

SIZES = (
    *(Setting(AXES[axis], AXES[axis], f"{entries}.", int) for axis, entries in PRUNABLE.items()),
    *(
        Setting(f"num_{kind}_layers", f"num_{kind}_layers", f"Layers with {kind}, where layers differ.", int)
        for kind in sorted(set(KINDS.values()))
    ),
)


@verb(
    TARGET._replace(help=f"{TARGET.help} Several (0.8,0.6,0.4) make a series."),
    Setting(
        "nested",
        "lineage.nested",
        "Make the students of a series in one training, on shared weights.",
        bool,
        "--nested",
    ),
    TRIM,
    *BUDGET,
    *SERVED,
    *TEXT,
    *TRAINING,
    Setting("chats", "chats.share", "Share of training blocks that are chats which the teacher answers (0.1).", float),
    Setting("prompts", "chats.prompts", "With --chats, a file of questions in place of the built-in ones."),
)
def compress(teacher: Teacher, out: Out, plain: Plain = None, overwrite: Overwrite = False, **settings: Any) -> Any:
    """The main job: search for a shape, prune, distil, evaluate. Run the command again to continue."""
    settings = _with_baseline(plain, _serving(settings))
    return imported("verbs.compress").compress(teacher, out, overwrite=overwrite, **settings)


@verb(Setting("tokens", "calibration.tokens", "Tokens to calibrate on."), CONTEXT, *TEXT)
def calibrate(teacher: Teacher, out: Out, overwrite: Overwrite = False, **settings: Any) -> Any:
    """Measure importance: calibration.safetensors and importance.safetensors in OUT."""
    return imported("verbs.calibrate").calibrate(teacher, out, overwrite=overwrite, **settings)


@verb(TARGET, TRIM, *BUDGET, *SERVED, *TEXT)
def search(teacher: Teacher, out: Out, overwrite: Overwrite = False, **settings: Any) -> Any:
    """Find the best shape within a budget: candidates.jsonl and arch.json in OUT."""
    return imported("verbs.search").search(teacher, out, overwrite=overwrite, **_serving(settings))


@verb(*SIZES, TARGET, CONTEXT, *TEXT)
def prune(
    teacher: Teacher,
    out: Annotated[Path | None, typer.Argument(help="The folder to make.", resolve_path=True)] = None,
    arch: Annotated[Path | None, typer.Option(help="An arch.json instead of sizes.")] = None,
    importance: Annotated[Path | None, typer.Option(help="A folder that calibrate wrote, instead of --data.")] = None,
    random: Annotated[bool, typer.Option("--random", help="Random weights in place of the teacher's.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would come out; needs no weights.")] = False,
    plain: Plain = None,
    overwrite: Overwrite = False,
    **settings: Any,
) -> Any:
    """Cut a teacher to a shape, untrained: a Hugging Face folder at OUT."""
    if dry_run:
        from minitron.verbs.inspect import dry_run as shape_of

        return shape_of(teacher, settings, arch)
    if out is None:
        raise UserError("prune needs OUT, the folder to make, or --dry-run")
    settings = _with_baseline(plain, settings)
    return imported("verbs.prune").prune(
        teacher, out, arch=arch, importance=importance, random=random, overwrite=overwrite, **settings
    )


@verb(*TRAINING, CONTEXT, *TEXT)
def distill(
    teacher: Teacher,
    student: Annotated[str, typer.Argument(help="The pruned model to train.")],
    out: Out,
    overwrite: Overwrite = False,
    **settings: Any,
) -> Any:
    """Train a smaller model on the outputs of a larger one: a Hugging Face folder at OUT."""
    return imported("verbs.distill").distill(teacher, student, out, overwrite=overwrite, **settings)


@verb(
    Setting("method", "distill.trains", "What is trained: full, norms, or lora (needs minitron[lora])."),
    Setting("tokens", "distill.tokens", "Tokens to train on, such as 2M."),
    CONTEXT,
    *TEXT,
)
def correct(teacher: Teacher, out: Out, overwrite: Overwrite = False, **settings: Any) -> Any:
    """Train a teacher on the text that it is to teach with: a Hugging Face folder at OUT."""
    return imported("verbs.correct").correct(teacher, out, overwrite=overwrite, **settings)


@verb(
    Setting("epochs", "tune.epochs", "How often the data is read.", float),
    Setting("learning_rate", "tune.learning_rate", "Peak learning rate.", float),
    Setting("method", "distill.trains", "What is trained: full, norms, lisa, or lora (needs minitron[lora])."),
    Setting("keep_adapter", "tune.keeps_adapter", "Keep LoRA's adapters, in OUT/adapter.", bool, "--keep-adapter"),
    CONTEXT,
    *TEXT,
)
def tune(
    model: Annotated[str, typer.Argument(help="A run directory, for its student, or a model as in compress.")],
    out: Out,
    overwrite: Overwrite = False,
    **settings: Any,
) -> Any:
    """Train a model on texts, chats or questions with answers: a Hugging Face folder at OUT."""
    return imported("verbs.tune").tune(model, out, overwrite=overwrite, **settings)


@verb(Setting("tokens", "calibration.tokens", "Tokens on which fp8 measures how large inputs are."), CONTEXT, *TEXT)
def export(
    model: Annotated[str, typer.Argument(help="A run directory, for its student, or a model as in compress.")],
    out: Annotated[
        Path | None,
        typer.Argument(help="The folder to make; by default one in the run directory.", resolve_path=True),
    ] = None,
    format: Annotated[
        str | None,
        typer.Option(
            help="gguf, which llama.cpp, Ollama and others read; fp8, w8a8 or w4a16, which vLLM and transformers read; "
            "or onnx."
        ),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            help="The type of matrices. gguf: f32, f16, bf16, q8_0; with llama.cpp q4_k_m, q6_k and others too. "
            "onnx: f32, f16, int8."
        ),
    ] = None,
    check: Annotated[
        list[str] | None,
        typer.Option(
            metavar="ENGINE",
            help="With --format, compare what its engine computes (llama.cpp for gguf, onnxruntime for onnx, "
            "transformers for others) with the model itself; without, check the folder by the sources of vllm, trtllm, "
            "megatron or llama.cpp. Repeatable.",
        ),
    ] = None,
    tensor_parallel: Annotated[
        int | None, typer.Option(min=1, help="GPUs over which the engine of --check splits every tensor.")
    ] = None,
    overwrite: Overwrite = False,
    **settings: Any,
) -> Any:
    """Write a model in the format of another engine, a folder at OUT; or check which engines run it as it is."""
    served = {} if tensor_parallel is None else {"tensor_parallel": tensor_parallel}
    return imported("verbs.export").export(
        model, out, format=format, quantize=quantize, check=check or (), overwrite=overwrite, **served, **settings
    )


@verb(
    Setting("epochs", "prefer.epochs", "How often the pairs are read.", float),
    Setting("learning_rate", "prefer.learning_rate", "Peak learning rate.", float),
    Setting("beta", "prefer.beta", "Strength with which the model is held to what it was.", float),
    CONTEXT,
    *TEXT,
)
def prefer(
    model: Annotated[str, typer.Argument(help="A run directory, for its student, or a model as in compress.")],
    out: Out,
    overwrite: Overwrite = False,
    **settings: Any,
) -> Any:
    """Train a model on pairs of answers, chosen and rejected (DPO, needs minitron[preference]): a folder at OUT."""
    return imported("verbs.prefer").prefer(model, out, overwrite=overwrite, **settings)


@verb(*MACHINE, has_recipe=False)
def generate(
    model: Annotated[str, typer.Argument(help="A run directory, for its student, or a model as in compress.")],
    out: Annotated[Path, typer.Argument(help="The file to make, such as answers.jsonl.", resolve_path=True)],
    prompts: Annotated[Path, typer.Option(help="Questions or chats: a text file with one per line, or JSON, CSV, …")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Draw from this share of the probability.")] = 1.0,
    batch_size: Annotated[int, typer.Option(min=1, help="Prompts that are answered together.")] = 8,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file at OUT.")] = False,
    **settings: Any,
) -> Any:
    """Let a model answer prompts: a file of chats at OUT, which --data reads."""
    sampling = {"max_new_tokens": max_new_tokens, "temperature": temperature, "top_p": top_p}
    return imported("verbs.generate").generate(
        model, out, prompts=prompts, sampling=sampling, batch_size=batch_size, overwrite=overwrite, **settings
    )


@verb(has_recipe=False)
def merge(
    one: Annotated[str, typer.Argument(help="A run directory, for its student, or a model as in compress.")],
    other: Annotated[str, typer.Argument(help="A model of the same shape.")],
    out: Out,
    weight: Annotated[float, typer.Option(help="Share of the second model, from 0 to 1.")] = 0.5,
    overwrite: Overwrite = False,
) -> Any:
    """Write the model between two models of one shape, by linear interpolation: a Hugging Face folder at OUT."""
    return imported("verbs.merge").merge(one, other, out, weight=weight, overwrite=overwrite)


@verb(has_recipe=False)
def rejoin(
    student: Annotated[Path, typer.Argument(help="A run directory made with --text-only, or a student's folder.")],
    whole: Annotated[str, typer.Argument(help="The multimodal model whose text model was the teacher.")],
    out: Out,
    overwrite: Overwrite = False,
) -> Any:
    """Put a student back into the multimodal model whose text model it was made of: a Hugging Face folder at OUT."""
    return imported("verbs.rejoin").rejoin(student, whole, out, overwrite=overwrite)


def _serving(settings: dict[str, Any]) -> dict[str, Any]:
    """Let `--context` be that of the sequences served, where a limit on serving is given."""
    is_served = any(f"budget.{limit}" in settings for limit in ("memory", "throughput", "latency"))
    if is_served and "context" in settings:
        settings["budget.context"] = settings.pop("context")
    return settings


def _with_baseline(plain: str | None, settings: dict[str, Any]) -> dict[str, Any]:
    """Lay the settings that are given over those of the published method that `--plain` names."""
    if plain is None:
        return settings
    from minitron.recipe import baseline

    parts = {f"{part}.{name}" for part, values in settings.items() if isinstance(values, dict) for name in values}
    return {key: value for key, value in baseline(plain).items() if key not in parts} | settings
