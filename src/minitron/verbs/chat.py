"""Talk to models, side by side."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def chat(
    model: str | Path,
    *,
    against: str | Path | None = None,
    terminal: Mapping[str, Any] | None = None,
    host: str = "127.0.0.1",
    port: int | None = None,
    **settings: Any,
) -> None:
    """Serve a page on which a model answers, a run's student beside its teacher; or take turns on the terminal.

    With `terminal`, which may hold `max_new_tokens`, `temperature` and `top_p`, the conversation is on the terminal.

    Raises:
        UserError: a model cannot be read, the page cannot be served, or Gradio is missing.
    """
    from minitron.data.tokens import load_tokenizer
    from minitron.evaluation.generation import Sampling, TextGenerator
    from minitron.model.language_model import load_model
    from minitron.model.source import open_teacher
    from minitron.recipe import recipe_from
    from minitron.reports.chat import serve, talk
    from minitron.session import Session
    from minitron.verbs.workspace import student_of

    recipe, other = student_of(recipe_from(None, teacher=model, **settings), str(against) if against else None)
    session = Session(recipe)
    session.validate()
    runtime = session.runtime
    checkpoints = {"teacher": open_teacher(other)} if other else {}
    checkpoints["student" if other else "model"] = session.teacher
    speakers = {
        name: TextGenerator(
            load_model(checkpoint, runtime.device, runtime.dtype, runtime.attention), load_tokenizer(checkpoint.folder)
        )
        for name, checkpoint in checkpoints.items()
    }
    if terminal is not None:
        talk(speakers, Sampling(**terminal, seed=recipe.seed))
    else:
        serve(speakers, f"minitron: {session.teacher.folder.parent.name}", host=host, port=port)
