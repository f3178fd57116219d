"""Put a student back into the multimodal model whose text model it was made of."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minitron.verbs.results import Result

if TYPE_CHECKING:
    from minitron.model.rejoined import Rejoined


@dataclass(frozen=True, repr=False)
class Whole(Result):
    """A folder with a multimodal model."""

    out: Path
    found: "Rejoined"

    def to_dict(self) -> dict[str, Any]:
        """Return the folder and what was done."""
        return {"out": str(self.out), **asdict(self.found)}


def rejoin(student: str | Path, whole: str, out: str | Path, *, overwrite: bool = False) -> Whole:
    """Write a multimodal model with a student in the place of its text model into a new folder at `out`.

    `student` is a run directory made with `text_only`, or a model folder; `whole` is the multimodal model, a hub id or
    a folder. What writes the text model's stream, such as a projector's outputs, is fitted to the student's channels;
    everything else is copied.

    Raises:
        UserError: `whole` holds no text model, the student does not fit into it, or `out` may not be written.
    """
    from minitron.history import record_step
    from minitron.model.checkpoint import open_checkpoint
    from minitron.model.rejoined import rejoin as write
    from minitron.model.source import open_teacher, resolve_teacher
    from minitron.output import Output
    from minitron.recipe import Recipe
    from minitron.verbs.workspace import student_of

    source = open_checkpoint(Path(student_of(Recipe(teacher=str(student)), None)[0].teacher))
    folder = resolve_teacher(whole)
    output = Output(Path(out).absolute(), "config.json")
    output.require_usable(overwrite, (source.folder, folder))
    teacher = open_teacher(whole, text_only=True)
    with output.work("rejoin") as work:
        written = work / "whole"
        written.mkdir()
        found = write(source, teacher, folder, written)
        record_step(written, source.folder, {"step": "rejoin", "moved": list(found.moved)})
        output.publish(written)
    return Whole(output.path, found)
