"""Write a model in the format of another engine, or check which engines run it as it is."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from minitron.errors import UserError
from minitron.verbs.results import Result

if TYPE_CHECKING:
    from minitron.recipe import Recipe, RecipeSource
    from minitron.verbs.engine_check import Checked


@dataclass(frozen=True, repr=False)
class Exported(Result):
    """A folder with a model in another format."""

    out: Path
    record: dict[str, Any]
    """What `export.json` holds: the file, its type and size, and what was checked."""

    @property
    def file(self) -> Path:
        """The model's file, or the index of its files."""
        return self.out / str(self.record["file"])

    def to_dict(self) -> dict[str, Any]:
        """Return the folder and the record."""
        return {"out": str(self.out), **self.record}


@overload
def export(model: str | Path, out: str | Path | None = None, *, format: str, **settings: Any) -> Exported: ...
@overload
def export(model: str | Path, out: None = None, *, check: Sequence[str] | str, **settings: Any) -> "Checked": ...


def export(
    model: str | Path,
    out: str | Path | None = None,
    *,
    format: str | None = None,
    quantize: str | None = None,
    check: Sequence[str] | str = (),
    tensor_parallel: int | None = None,
    overwrite: bool = False,
    recipe: "RecipeSource" = None,
    **settings: Any,
) -> "Exported | Checked":
    """Write a model in the format of another engine into a new folder at `out`, or check which engines run its folder.

    `model` is a run directory, for its student, or any model that a verb accepts. Without `out`, the export of a run
    directory goes into a folder of that directory, such as `gguf-q8_0` or `fp8`. `quantize` names the type of the
    matrices in GGUF; by default they keep theirs. `check` names the engine whose answers are compared with those of the
    model itself in transformers. Text that a format measures activations on, and that a check reads, is that of the
    recipe, by default a run's own, under the keyword arguments.

    Without `format`, nothing is written: `check` names engines, by whose sources the model's config is checked for
    `tensor_parallel` GPUs (`check_folder`).

    Raises:
        UserError: the format cannot represent the model, `out` may not be written, or what is asked for needs a
            package that is missing.
    """
    from minitron.formats import FORMATS, RECORD, Request, require_format
    from minitron.formats import export as write
    from minitron.history import HISTORY
    from minitron.output import Output
    from minitron.recipe import recipe_from
    from minitron.reports.card import write_card
    from minitron.run import local_inputs
    from minitron.session import Session
    from minitron.verbs.workspace import run_directory

    asked = [check] if isinstance(check, str) else check
    if format is None:
        if not asked:
            raise UserError(f"export needs --format ({', '.join(FORMATS)}), or --check and an engine")
        if out is not None or quantize is not None:
            raise UserError("export --check writes nothing without --format: give that, or neither OUT nor --quantize")
        return _checked(recipe_from(recipe, teacher=model, **settings), asked, tensor_parallel or 1)
    if tensor_parallel is not None:
        raise UserError("--tensor-parallel belongs to --check without --format")
    checks = _is_checked(require_format(format).engine, asked)
    given = recipe_from(recipe, teacher=model, **settings)
    run = run_directory(given)
    if run is not None:
        given = recipe_from(recipe or _recipe_of(run), **settings, teacher=str(run / "student"))
    if out is None and run is None:
        raise UserError(
            "export needs OUT, the folder to make; only an export of a run directory has a place of its own"
        )
    folder = Path(out) if out is not None else Path(str(run)) / "-".join(filter(None, (format, quantize)))
    session = Session(given)
    source = session.teacher.folder
    output = Output(folder.absolute(), RECORD)
    output.require_usable(overwrite, (source, *local_inputs(given)))
    name = run.absolute().name if run else source.name
    with output.work("export") as work:
        exported = work / "exported"
        exported.mkdir()
        record = write(session, exported, Request(format, name, quantize, checks))
        if (exported / HISTORY).is_file():  # a model folder, which transformers reads
            write_card(exported, session.teacher.arch)
        output.publish(exported)
    return Exported(output.path, record)


def _checked(recipe: "Recipe", engines: Sequence[str], tensor_parallel: int) -> "Checked":
    """Return what engines make of the folder of a model, of a run directory of its student."""
    from minitron.run import teacher_of
    from minitron.verbs.engine_check import check_folder
    from minitron.verbs.workspace import run_directory, student_of

    run = run_directory(recipe)
    known = {"teacher": str(teacher_of(run))} if run else {}
    folder, family = student_of(recipe, None)[0].teacher, None if run else recipe.family
    return check_folder(folder, engines, tensor_parallel=tensor_parallel, family=family, **known)


def _is_checked(engine: str, asked: Sequence[str]) -> bool:
    """Return whether a check in the engine of a format is asked for.

    Raises:
        UserError: the check in another engine is.
    """
    if others := [name for name in asked if name != engine]:
        raise UserError(f"--check {others[0]}: this format is checked in {engine}")
    return bool(asked)


def _recipe_of(run: Path) -> "RecipeSource":
    """Return the recipe of a run directory.

    Raises:
        UserError: the run has no student yet.
    """
    from minitron.files import read_json
    from minitron.recipe import Recipe, validate
    from minitron.run import RUN_RECORD

    if not (run / "student").is_dir():
        raise UserError(f"{run} has no student yet")
    return validate(Recipe, read_json(run / RUN_RECORD)["recipe"], str(run / RUN_RECORD))
