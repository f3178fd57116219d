"""Write a model in the format of another engine."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.errors import UserError
from minitron.verbs.results import Result


@dataclass(frozen=True, repr=False)
class Exported(Result):
    """A folder with a model in another format."""

    out: Path
    record: dict[str, Any]
    """What `export.json` holds: the file, its type and size, its tensors by type, and what was checked."""

    @property
    def file(self) -> Path:
        """The model's file."""
        return self.out / str(self.record["file"])

    def to_dict(self) -> dict[str, Any]:
        """Return the folder and the record."""
        return {"out": str(self.out), **self.record}


def export(
    model: str | Path,
    out: str | Path | None = None,
    *,
    format: str = "gguf",
    quantize: str | None = None,
    check: bool = False,
    family: str | None = None,
    overwrite: bool = False,
) -> Exported:
    """Write a model in the format of another engine into a new folder at `out`.

    `model` is a run directory, for its student, or any model that a verb accepts. Without `out`, the export of a run
    directory goes into a folder of that directory, such as `gguf-q8_0`. `quantize` names the type of the matrices; by
    default they keep theirs. With `check`, the engine's own answers are compared with those of transformers.

    Raises:
        UserError: the format cannot represent the model, `out` may not be written, or what is asked for needs a
            package that is missing.
    """
    from minitron.formats import RECORD, require_format
    from minitron.formats import export as write
    from minitron.model.source import open_teacher
    from minitron.output import Output
    from minitron.run import RUN_RECORD

    require_format(format)
    run = Path(model).expanduser()
    is_run = (run / RUN_RECORD).is_file()
    if is_run and not (run / "student").is_dir():
        raise UserError(f"{run} has no student yet")
    if out is None and not is_run:
        raise UserError(
            "export needs OUT, the folder to make; only an export of a run directory has a place of its own"
        )
    folder = Path(out) if out is not None else run / "-".join(filter(None, (format, quantize)))
    checkpoint = open_teacher(str(run / "student" if is_run else model), family)
    output = Output(folder.absolute(), RECORD)
    output.require_usable(overwrite, (checkpoint.folder,))
    name = run.absolute().name if is_run else checkpoint.folder.name
    with output.work("export") as work:
        exported = work / "exported"
        exported.mkdir()
        record = write(checkpoint, exported, format=format, name=name, quantize=quantize, checks=check)
        output.publish(exported)
    return Exported(output.path, record)
