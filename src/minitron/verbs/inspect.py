"""Say what a model is and what would come of it, from its config alone: nothing here imports torch but for weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.errors import UserError
from minitron.files import read_json
from minitron.model.anatomy import SIZE_NAMES
from minitron.model.arch import Arch
from minitron.model.config import config_values, has_weights
from minitron.model.memory import DTYPE_BYTES, Memory, attention_windows, memory
from minitron.model.source import config_of
from minitron.quantities import parse_context
from minitron.reports.figures import Rows
from minitron.verbs.results import Result


@dataclass(frozen=True, repr=False)
class Inspected(Result):
    """What a model is, and what serving it takes."""

    arch: Arch
    weights_checked: bool
    """Whether there were weights, which fit the family's table."""
    memory: Memory
    memory_of: dict[str, Any]
    """Batch, context and dtype that the memory is for."""
    vocabulary: list[dict[str, Any]] | None = None
    """What a cut of the vocabulary would leave of a text and of the model, by size; None without a text."""

    def to_dict(self) -> dict[str, Any]:
        """Return the counts and sizes, and the memory in bytes."""
        return {
            "model_type": self.arch.model_type,
            "num_parameters": self.arch.num_parameters,
            "num_non_embedding_parameters": self.arch.num_non_embedding_parameters,
            "arch": self.arch.to_dict(),
            "weights_checked": self.weights_checked,
            "memory": self.memory.to_dict(),
            "memory_of": self.memory_of,
        } | ({} if self.vocabulary is None else {"vocabulary": self.vocabulary})

    def rows(self) -> Rows:
        """Return the same with the memory in GiB."""
        sizes = {key: f"{size / 2**30:.2f} GiB" for key, size in self.memory.to_dict().items()}
        lines = {row[0]: row for row in super().rows()}
        lines["memory"] = ["memory", " · ".join(f"{key} {size}" for key, size in sizes.items())]
        lines.pop("vocabulary", None)
        cuts = [
            [
                f"vocab_size {each['vocab_size']:,}",
                f"{each['coverage']:.2%} of the tokens of held-out text · {each['num_parameters']:,} parameters "
                f"({each['share']:.1%}) · {each['bytes_per_token']:.3g} bytes per token",
            ]
            for each in self.vocabulary or ()
        ]
        return [*lines.values(), *cuts]


@dataclass(frozen=True, repr=False)
class DryRun(Result):
    """The shape that `prune` would cut a teacher to."""

    teacher: Arch
    arch: Arch

    def to_dict(self) -> dict[str, Any]:
        """Return the model type to be written, the sizes, and exact counts."""
        restated = self.arch.restatement
        return {
            "model_type": restated.restated_as if restated else self.arch.model_type,
            "num_parameters": self.arch.num_parameters,
            "arch": self.arch.to_dict(),
            "num_non_embedding_parameters": self.arch.num_non_embedding_parameters,
            "share_of_teacher": self.arch.num_parameters / self.teacher.num_parameters,
        }


def inspect(
    model: str | Path,
    *,
    data: str | None = None,
    family: str | None = None,
    batch: int = 1,
    context: str | int = "4k",
    dtype: str = "auto",
) -> Inspected:
    """Return the sizes and exact parameter counts of a model, and the memory that serving it takes.

    The memory is for `batch` sequences of `context` tokens in `dtype`, by default bfloat16. Weights that are there are
    checked against the family's table. With `data`, also what cuts of the vocabulary would leave of that text and of
    the model.

    Raises:
        UserError: `context` or `dtype` is not understood, or the model cannot be read.
    """
    dtype = "bfloat16" if dtype == "auto" else dtype
    if dtype not in DTYPE_BYTES:
        raise UserError(f"unknown dtype '{dtype}'; accepted: auto, {', '.join(DTYPE_BYTES)}")
    try:
        num_tokens = parse_context(context)
    except ValueError as error:
        raise UserError(str(error)) from error
    path = config_of(model, family)
    is_checked = has_weights(path)
    if is_checked:
        from minitron.model.checkpoint import open_checkpoint

        values = open_checkpoint(path, family).config.to_dict()
    else:
        values = config_values(path, family)
    arch = Arch.from_config(values)
    needed = memory(arch, batch, num_tokens, dtype, attention_windows(values))
    cuts = None if data is None else _vocabulary_cuts(model, data, family)
    return Inspected(arch, is_checked, needed, {"batch": batch, "context": num_tokens, "dtype": dtype}, cuts)


def _vocabulary_cuts(model: str | Path, data: str, family: str | None) -> list[dict[str, Any]]:
    """Return what each derived size of the vocabulary would leave of a text and of a model."""
    from minitron.nas.vocabulary import vocabulary_sizes
    from minitron.pruning.vocabulary import TokenChoice, describe_cut
    from minitron.recipe import recipe_from
    from minitron.session import Session

    offered = {"trim": True, "least_coverage": 0.0}  # all sizes are shown, also those that a search refuses
    session = Session(recipe_from(None, teacher=str(model), data=data, family=family, vocabulary=offered))
    choice, whole = TokenChoice.of(session), session.teacher.arch
    cuts = []
    for size in vocabulary_sizes(session):
        count = whole.resized(vocab_size=size).num_parameters
        described = describe_cut(session, choice.kept(size))
        cuts.append(
            {
                "vocab_size": size,
                "num_parameters": count,
                "share": count / whole.num_parameters,
                "coverage": described["coverage"],
                "bytes_per_token": described["bytes_per_token"][1],
            }
        )
    return cuts


def dry_run(teacher: str | Path, settings: Mapping[str, Any], arch_file: str | Path | None = None) -> DryRun:
    """Return the shape that `prune` would cut a teacher to, and its exact counts, from the teacher's config alone.

    The shape is that of `arch_file`, or of the sizes among the `settings`, or of the recipe that they make.

    Raises:
        UserError: no shape is given, or it cannot be cut out of the teacher, or the recipe has stages.
    """
    sizes, settings = split_sizes(settings)
    family = settings.get("family")
    if not arch_file and not sizes and not (sizes := _stated_shape(teacher, settings)):
        raise UserError("--dry-run needs a shape: sizes such as --hidden-size, --arch, or a recipe with a shape")
    whole = Arch.from_config(config_values(config_of(teacher, family), family))
    arch = read_arch(Path(arch_file), whole) if arch_file else whole.resized(**sizes)
    whole.require_prunable_to(arch)
    return DryRun(whole, arch)


def read_arch(path: Path, teacher: Arch) -> Arch:
    """Read the shape in an `arch.json`.

    Raises:
        UserError: there is no such file, or the teacher cannot be cut to that shape.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    arch = Arch.from_dict(read_json(path), teacher)
    teacher.require_prunable_to(arch)
    return arch


def _stated_shape(teacher: str | Path, settings: Mapping[str, Any]) -> dict[str, int]:
    from minitron.recipe import recipe_from

    others = {name: value for name, value in settings.items() if name != "recipe"}
    recipe = recipe_from(settings.get("recipe"), **others, teacher=str(teacher))
    if recipe.stages:
        raise UserError("--dry-run shows one shape, and the recipe has stages: `minitron plan` lists theirs")
    return dict(recipe.shape)


def split_sizes(settings: Mapping[str, Any]) -> tuple[dict[str, int], dict[str, Any]]:
    """Split keyword arguments into sizes of a shape, without those that are None, and keys of a recipe."""
    sizes = {name: int(settings[name]) for name in SIZE_NAMES if settings.get(name) is not None}
    return sizes, {name: value for name, value in settings.items() if name not in SIZE_NAMES}
