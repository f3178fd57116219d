"""Let a model answer prompts, as data to train on."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from minitron.errors import UserError
from minitron.verbs.results import Result


@dataclass(frozen=True, repr=False)
class Generated(Result):
    """A file of answers."""

    out: Path
    answers: int
    finished: int
    """Answers that ended by themselves, not at the limit of tokens."""

    def to_dict(self) -> dict[str, Any]:
        """Return the file and the counts."""
        return asdict(self) | {"out": str(self.out)}


def generate(
    model: str | Path,
    out: str | Path,
    *,
    prompts: str | Path,
    sampling: Mapping[str, Any] | None = None,
    batch_size: int = 8,
    overwrite: bool = False,
    **settings: Any,
) -> Generated:
    """Answer the prompts of a file and write them with their answers to `out`, a file of JSON lines that `data` reads.

    `sampling` may hold `max_new_tokens`, `temperature` (0 is greedy) and `top_p`. An interrupted run with equal inputs
    continues to equal answers. For a run directory, its student answers.

    Raises:
        UserError: the prompts cannot be read, a prompt is too long, or `out` exists.
    """
    from minitron.data.prompts import read_prompts
    from minitron.data.tokens import load_tokenizer
    from minitron.evaluation.answering import Answerer, write_answers
    from minitron.evaluation.generation import Sampling
    from minitron.model.language_model import load_model
    from minitron.recipe import recipe_from
    from minitron.session import Session
    from minitron.verbs.workspace import student_of

    out = Path(out).absolute()
    if out.is_dir():
        raise UserError(f"{out} is a folder: name a file, such as {out / 'answers.jsonl'}")
    if out.suffix not in {".jsonl", ".ndjson"}:
        raise UserError(f"{out}: answers are written as JSON lines; accepted: a name that ends with .jsonl")
    if out.exists() and not overwrite:
        raise UserError(f"{out} exists: choose another file or pass --overwrite")
    recipe, _ = student_of(recipe_from(None, teacher=model, **settings), None)
    chats = read_prompts(Path(prompts).expanduser())
    session = Session(recipe)
    session.validate()
    runtime, checkpoint = session.runtime, session.teacher
    identity = {"model": checkpoint.fingerprint(), "dtype": runtime.dtype_name, "device": runtime.device.type}
    loaded = load_model(checkpoint, runtime.device, runtime.dtype, runtime.attention)
    drawn = Sampling(**{"max_new_tokens": 256, **(sampling or {})}, seed=recipe.seed)
    answerer = Answerer(loaded, load_tokenizer(checkpoint.folder), drawn, batch_size)
    finished = write_answers(out, answerer, chats, identity)
    return Generated(out, len(chats), finished)
