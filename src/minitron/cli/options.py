"""How a verb of the command line is declared: its own parameters, groups of settings, and printing the result."""

import inspect
import json
import logging
import os
import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from minitron.errors import UserError

app = typer.Typer(
    help="Make a smaller language model out of a trained one: prune it, then distil the rest back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # Rich takes a third of a second and cuts long names of options off.
    context_settings={"help_option_names": ["-h", "--help"]},
)


class Command(typer.core.TyperCommand):
    """A verb whose option `--plain` may stand without a value; it means `--plain papers` then."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments of the command line, after the value that a lone `--plain` means is put in."""
        if PLAIN in args:
            from minitron.recipe import BASELINES

            place = args.index(PLAIN) + 1
            if not BASELINES.keys() & set(args[place : place + 1]):
                args = [*args[:place], next(iter(BASELINES)), *args[place:]]
        parsed: list[str] = super().parse_args(ctx, args)
        return parsed


class Setting(NamedTuple):
    """An option of the command line that sets a key of the recipe, or a size of the shape."""

    name: str
    """The parameter; `--name` unless `option` says otherwise."""
    key: str
    help: str
    type: Any = str
    option: str | None = None
    minimum: int | None = None

    @property
    def parameter(self) -> inspect.Parameter:
        """The parameter as typer reads it; None where the option is not given."""
        names = [self.option] if self.option else []
        option = typer.Option(*names, help=self.help, min=self.minimum)
        return inspect.Parameter(
            self.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[self.type | None, option]
        )


FAMILY = Setting("family", "family", "Read the teacher as this model_type, whatever its config says.")
CONTEXT = Setting("context", "context", "Tokens in a block.", int)
MACHINE = (
    Setting("seed", "seed", "Decides the order of the text, and every random draw.", int),
    Setting("device", "device", "auto, cpu, cuda or cuda:N."),
    Setting("dtype", "dtype", "Dtype of the forward passes: auto, float32, bfloat16 or float16."),
)
TEXT = (
    FAMILY,
    Setting("text_only", "text_only", "Read the text model inside a multimodal teacher.", bool, option="--text-only"),
    Setting("data", "data", "A text, JSON, CSV or parquet file, a folder, a glob, a hub data set, or wiki (built in)."),
    *MACHINE,
)
TARGET = Setting(
    "target_params", "target_params", "A share of the teacher (0.7), a count (94M, 4B) or a range (7.8B..8.5B)."
)
BUDGET = (
    Setting("target_non_embedding_params", "budget.non_embedding_params", "Like --target-params, without embeddings."),
    Setting(
        "target_active_params",
        "budget.active_params",
        "Like --target-params, of the experts only those that a token is sent to.",
    ),
    Setting("memory", "budget.memory", "Of weights, KV cache and Mamba state: 20GiB, or a share of the teacher's."),
    Setting("throughput", "budget.throughput", "Least prefill speed on this device: 1.5x the teacher's, or 900 tok/s."),
    Setting("latency", "budget.latency", "Most time per decoded token on this device: 0.7x the teacher's, or 40ms."),
    Setting("batch", "budget.batch", "Sequences that --memory, --throughput and --latency are for.", int, minimum=1),
    Setting(
        "context",
        "context",
        "Tokens in a block; with --memory, --throughput or --latency, tokens of the sequences that are served (128k).",
    ),
)
TRIM = Setting(
    "trim_vocab", "vocabulary.trim", "Search for the size of the vocabulary too.", bool, option="--trim-vocab"
)
SERVED = (
    Setting(
        "engine",
        "search.engine",
        "Offer only shapes that this engine runs: vllm, trtllm, megatron or llama.cpp.",
        option="--for",
    ),
    Setting("tensor_parallel", "search.tensor_parallel", "GPUs over which it splits every tensor.", int, minimum=1),
)
TRAINING = (
    Setting("tokens", "distill.tokens", "Tokens to distil on, such as 2M."),
    Setting("teacher_states", "distill.teacher_states", "Run the teacher once and keep its outputs in this folder."),
)

Teacher = Annotated[str, typer.Argument(help="A hub id, a folder, a .gguf file, or the built-in smollm2.")]
Out = Annotated[Path, typer.Argument(help="The folder to make.", resolve_path=True)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the result at OUT, once the new one is whole.")]
PLAIN = "--plain"
Plain = Annotated[
    str | None,
    typer.Option(
        PLAIN,
        metavar="[papers|modelopt]",
        help="Prune by the papers' method, or Model-Optimizer's, in place of the recipe's; other options override it.",
    ),
]

RECIPE_OPTIONS = (
    inspect.Parameter(
        "recipe",
        inspect.Parameter.KEYWORD_ONLY,
        default=[],
        annotation=Annotated[
            list[Path],
            typer.Option(
                "--recipe", help="A YAML recipe, or minitron-8b and the like; repeatable; options override it."
            ),
        ],
    ),
    inspect.Parameter(
        "assignments",
        inspect.Parameter.KEYWORD_ONLY,
        default=[],
        annotation=Annotated[
            list[str],
            typer.Option("--set", metavar="KEY=VALUE", help="A key of the recipe: --set distill.loss=jsd; repeatable."),
        ],
    ),
)
JSON = inspect.Parameter(
    "as_json",
    inspect.Parameter.KEYWORD_ONLY,
    default=False,
    annotation=Annotated[bool, typer.Option("--json", help="One JSON object on standard output.")],
)


def verb(
    *settings: Setting, has_recipe: bool = True, has_result: bool = True
) -> Callable[[Callable[..., Any]], Callable[..., None]]:
    """Add a function as a verb of the command line; a verb that `has_result` prints it, as JSON with `--json`.

    The function's own parameters come first. Of the `settings`, and of `--recipe` and `--set` where the verb
    `has_recipe`, the function receives those that are given, by recipe key.
    """

    def add(function: Callable[..., Any]) -> Callable[..., None]:
        own = [
            parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for parameter in inspect.signature(function).parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        others = [setting.parameter for setting in settings]
        taken = {parameter.name for parameter in own}
        options = [option for option in RECIPE_OPTIONS if has_recipe and option.name not in taken]
        parameters = [*own, *others, *options, *([JSON] if has_result else [])]

        @wraps(function)
        def called(**given: Any) -> None:
            as_json = given.pop("as_json", False)
            arguments = {parameter.name: given.pop(parameter.name) for parameter in own}
            assigned = dict(_assignment(text) for text in given.pop("assignments", []))
            if taken := assigned.keys() & {*arguments, "recipe"}:
                raise UserError(f"--set {min(taken)}: this is an argument or option of the command, not a key to set")
            values = {setting.key: given.pop(setting.name) for setting in settings}
            # Options that are not given are None; what --set assigns may be None on purpose.
            chosen = {key: value for key, value in (given | values).items() if value is not None}
            result = _with_tables(lambda: function(**arguments, **(assigned | chosen)))
            if result is not None:
                _print(result, as_json)
                if failure := getattr(result, "failure", None):
                    print(failure, file=sys.stderr)
                    sys.exit(1)

        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        app.command(cls=Command)(called)
        return called

    return add


def _with_tables(call: Callable[[], Any]) -> Any:
    """Call a verb; if a model's family has no table, derive it and call the verb again.

    Verbs read the configs of their models before anything else, so that nothing is lost.
    """
    try:
        return call()
    except UserError as error:
        from minitron.model.families import UnsupportedFamilyError

        if not isinstance(error, UnsupportedFamilyError) or not error.can_be_derived:
            raise
        model_type = error.model_type
    from minitron.verbs.families import derive_table

    derive_table(model_type)
    return _with_tables(call)


def _assignment(text: str) -> tuple[str, Any]:
    """Read `KEY=VALUE`, the value as YAML."""
    import yaml

    key, equals, value = text.partition("=")
    if not equals or not key:
        raise UserError(f"--set '{text}' is not KEY=VALUE, such as distill.learning_rate=1e-4")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {key}: '{value}' is not a value: {' '.join(str(error).split())}") from error


def imported(name: str) -> Any:
    """Import a verb's module, and torch and transformers, which take seconds; set them up as the command line does."""
    from minitron.progress import Progress

    with Progress("start"):
        import_module("minitron.runtime").configure_backends()
        for library in ("torchao", "torch.utils._pytree"):  # they warn about each other's versions
            logging.getLogger(library).setLevel(logging.ERROR)
        import_module("minitron.session")
        return import_module(f"minitron.{name}")


def _print(result: Any, as_json: bool) -> None:
    if os.environ.get("RANK", "0") != "0":  # of the processes of torchrun, the first one prints
        return
    if as_json:
        print(json.dumps(result.to_dict(), allow_nan=False))
    else:
        import_module("minitron.reports.terminal").print_result(result)
