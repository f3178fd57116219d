"""An engine: the families that it runs, the conditions that it sets, and its commands.

An engine that reads a folder takes some sizes from the config, computes others, and holds some as constants; on several
GPUs it splits tensors along axes, whose sizes have to be divisible. A student has the teacher's family and other sizes,
so that an engine may refuse it, or compute another function, although it runs the teacher. Families whose sources were
not read for an engine are not in its table: nothing is stated about them.
"""

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from minitron.errors import UserError
from minitron.model.anatomy import AXES
from minitron.model.arch import Arch

Config = Mapping[str, Any]
"""The entries of a `config.json` as transformers writes it, defaults included."""
Sizes = Mapping[str, int]
"""The sizes of a model by config name, as `Arch.sizes` has them."""
LARGEST_STEP = 64
"""The search for the next larger size that passes ends this number of GPUs above the size."""


def names(text: str) -> frozenset[str]:
    """Return the words of a text, such as the `model_type` of several families."""
    return frozenset(text.split())


@dataclass(frozen=True)
class Limit:
    """A condition on the network without which an engine does not run a model, or runs another network."""

    families: frozenset[str]
    """The `model_type` of the models that it concerns."""
    lacks: Callable[[Config], str | None]
    """Returns what a config has that the engine cannot express, or None."""
    source: str
    """The files of the engine's repository in which this was read."""
    is_overcome: bool = False
    """Whether a file that `minitron export` writes is free of it: by metadata that the engine's own converter does not
    write, by another name of an identical network, or by a context within the window."""
    fewest_gpus: int = 1
    """The number of GPUs from which on it holds."""


@dataclass(frozen=True)
class SizeLimit:
    """The values of a size with which an engine runs a model on a number of GPUs."""

    families: frozenset[str]
    axes: tuple[str, ...]
    """The axes whose sizes it concerns, where a model has them."""
    accepts: Callable[[int, int], bool]
    """Returns whether a size passes on a number of GPUs."""
    rule: str
    """The sizes that it accepts, in words."""
    source: str
    refusal: str = "cannot be split over {gpus} GPUs"
    """What follows the name and the value of a size that does not pass; `{gpus}` is the number of GPUs."""

    def passing(self, size: int, gpus: int) -> tuple[int, ...]:
        """Return the next smaller and the next larger size that pass, as far as there are any."""
        smaller = next((near for near in range(size - 1, 0, -1) if self.accepts(near, gpus)), None)
        largest = size + LARGEST_STEP * gpus
        larger = next((near for near in range(size + 1, largest + 1) if self.accepts(near, gpus)), None)
        return tuple(near for near in (smaller, larger) if near is not None)


@dataclass(frozen=True)
class Note:
    """What an engine does by itself with a model that it runs, or what its project states about the family."""

    families: frozenset[str]
    tells: Callable[[Sizes, int], str | None]
    """Returns what happens to a model of these sizes on a number of GPUs, or None."""
    source: str


@dataclass(frozen=True)
class Obstacle:
    """Why an engine does not run a model."""

    reason: str
    source: str
    size: str | None = None
    """The config name of the size that is at fault, if one size is."""
    passing: tuple[int, ...] = ()
    """The nearest values of that size that would pass, each by itself."""

    def to_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        at_fault = {"size": self.size, "passing": list(self.passing)} if self.size else {}
        return {"reason": self.reason, "source": self.source, **at_fault}


@dataclass(frozen=True)
class Use:
    """A command of an engine; `{path}`, `{gpus}` and `{teacher}` stand for the folder, its GPUs and its teacher."""

    purpose: str
    command: str


@dataclass(frozen=True)
class Verdict:
    """Whether an engine runs a model on a number of GPUs."""

    state: Literal["passes", "fails", "not known"]
    obstacles: tuple[Obstacle, ...]
    notes: tuple[tuple[str, str], ...] = ()
    """What happens by itself, each with its source."""

    @property
    def passes(self) -> bool:
        """Whether the engine is known to run the model."""
        return self.state == "passes"


@dataclass(frozen=True)
class Engine:
    """An engine that reads model folders, as it was at the version that was read."""

    name: str
    version: str
    repository: str
    families: frozenset[str]
    """The `model_type` of the models that it runs, within its limits."""
    unsupported: Mapping[str, str]
    """Families that it does not run at all, with the reason."""
    limits: tuple[Limit, ...]
    commands: str
    """How a model folder PATH is run, for the model card."""
    quantisations: frozenset[str] = frozenset()
    """The `quant_method` of quantised weights that it is known to read as `minitron export` writes them."""
    unsupported_source: str = ""
    """The file that lists what it runs; the version by itself where it is empty."""
    size_limits: tuple[SizeLimit, ...] = ()
    notes: tuple[Note, ...] = ()
    uses: tuple[Use, ...] = field(default=(), repr=False)
    """The commands with which a folder is served, measured, converted or trained."""

    @property
    def title(self) -> str:
        """Its name and the version that was read."""
        return f"{self.name} ({self.version})"

    def obstacles(self, config: Config, gpus: int = 1) -> list[Obstacle]:
        """Return why the engine does not run a model, or runs another function, each with the source of the fact.

        It is empty where the engine runs the model as transformers does, and where nothing is known about the family.
        Sizes are judged where the config states them all (`config.read_config` fills its defaults in).
        """
        return self.network_obstacles(config, gpus) + self.size_obstacles(_family(config), _sizes(config), gpus)

    def network_obstacles(self, config: Config, gpus: int = 1) -> list[Obstacle]:
        """Return those of its obstacles that concern the network as a whole."""
        family = _family(config)
        if family in self.unsupported:
            return [Obstacle(self.unsupported[family], self.unsupported_source or self.version)]
        limits = (limit for limit in self.limits if family in limit.families and gpus >= limit.fewest_gpus)
        return [Obstacle(reason, limit.source) for limit in limits if (reason := limit.lacks(config))]

    def size_obstacles(self, family: str, sizes: Sizes, gpus: int = 1) -> list[Obstacle]:
        """Return those of its obstacles that concern a single size, each with the nearest sizes that pass."""
        found = []
        for limit in self.size_limits:
            for name in (AXES[axis] for axis in limit.axes if family in limit.families):
                size = sizes.get(name)
                if size is None or limit.accepts(size, gpus):
                    continue
                passing = limit.passing(size, gpus)
                others = f"; {' or '.join(map(str, passing))} would pass" if passing else ""
                reason = f"{name} {size} {limit.refusal.format(gpus=gpus)}{others}"
                found.append(Obstacle(reason, limit.source, name, passing))
        return found

    def runs(self, config: Config) -> bool:
        """Return whether the engine is known to run a model as transformers does."""
        method = (config.get("quantization_config") or {}).get("quant_method")
        is_read = method is None or method in self.quantisations
        return is_read and _family(config) in self.families and not self.obstacles(config)

    def verdict(self, config: Config, gpus: int = 1) -> Verdict:
        """Return whether the engine runs a model on a number of GPUs, why not, and what it does by itself.

        Raises:
            UserError: see `require_read`.
        """
        self.require_read(gpus)
        family, obstacles = _family(config), self.obstacles(config, gpus)
        if family not in self.families and not obstacles:
            return Verdict("not known", ())
        told = [(note.tells(_sizes(config), gpus), note.source) for note in self.notes if family in note.families]
        notes = [(text, source) for text, source in told if text]
        if config.get("quantization_config"):
            notes.append(("its weights are quantised: what kernels of quantised weights ask was not read", ""))
        return Verdict("fails" if obstacles else "passes", tuple(obstacles), tuple(notes))

    def require_read(self, gpus: int) -> None:
        """Check that what the engine asks of a model on a number of GPUs was read.

        Raises:
            UserError: it was not, or there are no GPUs.
        """
        if gpus < 1:
            raise UserError(f"--tensor-parallel {gpus}: a number of GPUs, from 1")
        if gpus > 1 and not self.size_limits:
            raise UserError(f"--tensor-parallel {gpus}: how {self.name} splits a model over GPUs was not read")

    def commands_for(self, path: str, gpus: int, teacher: str = "TEACHER") -> list[tuple[str, str]]:
        """Return the purpose and the text of every command, for a folder and a number of GPUs."""
        filled = {"path": shlex.quote(path), "gpus": gpus, "teacher": shlex.quote(teacher)}
        return [(use.purpose, use.command.format(**filled)) for use in self.uses]


def _family(config: Config) -> str:
    return str(config["model_type"])


def _sizes(config: Config) -> Sizes:
    """Return the sizes of a config by the names that all families share; none where it does not state them all."""
    try:
        return Arch.from_config(config).sizes
    except (UserError, LookupError):
        return {}


def added(before: Sequence[Obstacle], after: Sequence[Obstacle]) -> list[Obstacle]:
    """Return the obstacles that another model does not have, by their sources and sizes."""
    known = {(obstacle.source, obstacle.size) for obstacle in before}
    return [obstacle for obstacle in after if (obstacle.source, obstacle.size) not in known]
