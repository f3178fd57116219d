"""Minitron: a trained language model goes in; a smaller one, nearly as good, comes out.

The verbs of the command line are functions here, with equal names and meanings:

    import minitron

    result = minitron.compress("smollm2", "out", target_params=0.7, data="wiki")
    print(result)            # the figures of teacher, pruned model and student
    result.student           # a folder for AutoModelForCausalLM.from_pretrained

Nothing imports torch before a verb runs. `configure_backends()` makes products of float32 faster on some processors, as
the command line does. `disable_progress()` switches the lines of progress off. What cannot be done raises `UserError`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Arch": "model.arch",
    "Blocks": "data.blocks",
    "Checkpoint": "model.checkpoint",
    "Cut": "pruning.cut",
    "Family": "model.family",
    "Recipe": "recipe",
    "Runtime": "runtime",
    "Session": "session",
    "UserError": "errors",
    "bench": "verbs.bench",
    "calibrate": "verbs.calibrate",
    "chat": "verbs.chat",
    "compress": "verbs.compress",
    "configure_backends": "runtime",
    "correct": "verbs.correct",
    "disable_progress": "progress",
    "distill": "verbs.distill",
    "enable_progress": "progress",
    "evaluate": "verbs.evaluate",
    "evaluate_tasks": "verbs.evaluate",
    "export": "verbs.export",
    "families": "verbs.families",
    "generate": "verbs.generate",
    "inspect": "verbs.inspect",
    "merge": "verbs.merge",
    "open_checkpoint": "model.checkpoint",
    "open_teacher": "model.source",
    "plan": "verbs.plan",
    "prefer": "verbs.prefer",
    "prune": "verbs.prune",
    "push": "verbs.push",
    "rejoin": "verbs.rejoin",
    "report": "verbs.report",
    "search": "verbs.search",
    "tune": "verbs.tune",
}
"""The module that each public name is imported from when the name is first used."""

__all__ = [*_HOMES, "__version__"]

if TYPE_CHECKING:
    from minitron.data.blocks import Blocks as Blocks
    from minitron.errors import UserError as UserError
    from minitron.model.arch import Arch as Arch
    from minitron.model.checkpoint import Checkpoint as Checkpoint
    from minitron.model.checkpoint import open_checkpoint as open_checkpoint
    from minitron.model.family import Family as Family
    from minitron.model.source import open_teacher as open_teacher
    from minitron.progress import disable_progress as disable_progress
    from minitron.progress import enable_progress as enable_progress
    from minitron.pruning.cut import Cut as Cut
    from minitron.recipe import Recipe as Recipe
    from minitron.runtime import Runtime as Runtime
    from minitron.runtime import configure_backends as configure_backends
    from minitron.session import Session as Session
    from minitron.verbs.bench import bench as bench
    from minitron.verbs.calibrate import calibrate as calibrate
    from minitron.verbs.chat import chat as chat
    from minitron.verbs.compress import compress as compress
    from minitron.verbs.correct import correct as correct
    from minitron.verbs.distill import distill as distill
    from minitron.verbs.evaluate import evaluate as evaluate
    from minitron.verbs.evaluate import evaluate_tasks as evaluate_tasks
    from minitron.verbs.export import export as export
    from minitron.verbs.families import families as families
    from minitron.verbs.generate import generate as generate
    from minitron.verbs.inspect import inspect as inspect
    from minitron.verbs.merge import merge as merge
    from minitron.verbs.plan import plan as plan
    from minitron.verbs.prefer import prefer as prefer
    from minitron.verbs.prune import prune as prune
    from minitron.verbs.push import push as push
    from minitron.verbs.rejoin import rejoin as rejoin
    from minitron.verbs.report import report as report
    from minitron.verbs.search import search as search
    from minitron.verbs.tune import tune as tune


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'minitron' has no attribute '{name}'")
    return getattr(import_module(f"minitron.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
