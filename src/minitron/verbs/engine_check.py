"""Check a model folder by what was read in the sources of engines, and name the commands that run it there."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minitron.model.anatomy import SIZE_NAMES
from minitron.model.config import read_config
from minitron.model.engines import BY_NAME, Verdict, engine_named
from minitron.model.source import BUILT_IN, config_of
from minitron.reports.figures import Rows
from minitron.verbs.results import Result


@dataclass(frozen=True, repr=False)
class Checked(Result):
    """Whether engines run a model folder on a number of GPUs, by their sources; nothing was run."""

    model: str
    tensor_parallel: int
    verdicts: Mapping[str, Verdict]
    """By the name of the engine on the command line."""
    teacher: str = "TEACHER"

    @property
    def passes(self) -> bool:
        """Whether every engine is known to run the model."""
        return all(verdict.passes for verdict in self.verdicts.values())

    @property
    def failure(self) -> str | None:
        """What the command line adds where an engine is not known to run the model, before it exits with status 1."""
        others = [f"{name}: {verdict.state}" for name, verdict in self.verdicts.items() if not verdict.passes]
        return f"{self.model} on {self._gpus}: {', '.join(others)}" if others else None

    @property
    def _gpus(self) -> str:
        return f"{self.tensor_parallel} GPU{'s' if self.tensor_parallel > 1 else ''}"

    def commands(self, name: str) -> list[tuple[str, str]]:
        """Return the purpose and the text of each command that an engine has for this folder."""
        return BY_NAME[name].commands_for(self.model, self.tensor_parallel, self.teacher)

    def rows(self) -> Rows:
        """Return the verdicts of all engines, one after the other."""
        return [["", ""], *(row for name in self.verdicts for row in self._rows_of(name))]

    def tables(self) -> list[tuple[Rows, str, str]]:
        """Return a table per engine, with the commands that run the folder there below it."""
        return [([["", ""], *self._rows_of(name)], "", self._next(name)) for name in self.verdicts]

    def _rows_of(self, name: str) -> Rows:
        engine, verdict = BY_NAME[name], self.verdicts[name]
        rows = [[engine.title, f"{verdict.state} on {self._gpus}"]]
        for obstacle in verdict.obstacles:
            rows += [["obstacle", obstacle.reason], ["read in", obstacle.source]]
        for text, source in verdict.notes:
            rows += [["note", text], *([["read in", source]] if source else [])]
        return rows

    def _next(self, name: str) -> str:
        """Return the commands of an engine, or how a shape is found that it runs."""
        verdict = self.verdicts[name]
        if any(obstacle.size in SIZE_NAMES for obstacle in verdict.obstacles):
            return f"shapes that pass: minitron search … --for {name} --tensor-parallel {self.tensor_parallel}"
        if not verdict.passes:
            return ""
        lines = [f"# {purpose}\n{command}" for purpose, command in self.commands(name)]
        return "\n".join(["", *lines, ""])

    def to_dict(self) -> dict[str, Any]:
        """Return the verdicts with their sources, and the commands."""
        engines = {
            name: {
                "engine": BY_NAME[name].name,
                "version": BY_NAME[name].version,
                "repository": BY_NAME[name].repository,
                "verdict": verdict.state,
                "obstacles": [obstacle.to_dict() for obstacle in verdict.obstacles],
                "notes": [{"note": text, "source": source} for text, source in verdict.notes],
                "commands": dict(self.commands(name)),
            }
            for name, verdict in self.verdicts.items()
        }
        return {
            "model": self.model,
            "tensor_parallel": self.tensor_parallel,
            "passes": self.passes,
            "engines": engines,
        }


def check_folder(
    model: str | Path, names: Sequence[str], *, tensor_parallel: int = 1, family: str | None = None,
    teacher: str = "TEACHER",
) -> Checked:  # fmt: skip
    """Return whether engines run a model on a number of GPUs, from its config alone.

    Raises:
        UserError: an engine is unknown, how it splits models over GPUs was not read, or the config cannot be read.
    """
    engines = {name: engine_named(name) for name in names}
    for engine in engines.values():
        engine.require_read(tensor_parallel)
    path = config_of(model, family)
    config = read_config(path, family).to_dict()
    verdicts = {name: engine.verdict(config, tensor_parallel) for name, engine in engines.items()}
    is_local = Path(model).expanduser().exists() or str(model) in BUILT_IN
    folder = str(path.parent if path.is_file() else path) if is_local else str(model)
    return Checked(folder, tensor_parallel, verdicts, teacher)
