"""What engines run of a model folder: facts read in their sources, each with its file, a module per engine."""

from minitron.errors import UserError, nearest
from minitron.model.engines.engine import Config, Engine, Limit, Obstacle, SizeLimit, Verdict, added
from minitron.model.engines.llama_cpp import LLAMA_CPP
from minitron.model.engines.megatron import MEGATRON
from minitron.model.engines.tensorrt_llm import TENSORRT_LLM
from minitron.model.engines.vllm import VLLM

__all__ = [
    "BY_NAME",
    "ENGINES",
    "LLAMA_CPP",
    "MEGATRON",
    "TENSORRT_LLM",
    "VLLM",
    "Config",
    "Engine",
    "Limit",
    "Obstacle",
    "SizeLimit",
    "Verdict",
    "added_obstacles",
    "engine_named",
    "order_obstacles",
]

ENGINES = (VLLM, LLAMA_CPP, TENSORRT_LLM)
"""The engines that serve a model: a pruning warns of what it takes away from them, and the card names them."""
BY_NAME = {"vllm": VLLM, "trtllm": TENSORRT_LLM, "megatron": MEGATRON, "llama.cpp": LLAMA_CPP}
"""All engines whose sources were read, by their names on the command line and in recipes."""
ORDERS = ("layer_types", "no_rope_layers")
"""The entries that list what each layer is, of which an engine may hold a constant order instead."""


def engine_named(name: str) -> Engine:
    """Return an engine by its name on the command line.

    Raises:
        UserError: it was not read; the message names the nearest name.
    """
    if name not in BY_NAME:
        raise UserError(f"no engine '{name}': {nearest(name, list(BY_NAME))}")
    return BY_NAME[name]


def added_obstacles(teacher: Config, student: Config) -> dict[str, str]:
    """Return, by the name of each engine that a cut takes away from a teacher's models, a line with the reasons."""
    lines = {}
    for engine in ENGINES:
        if new := added(engine.obstacles(teacher), engine.obstacles(student)):
            reasons = "; ".join(obstacle.reason for obstacle in new)
            lines[engine.name] = f"{engine.title} does not run such a student as transformers does: {reasons}"
    return lines


def order_obstacles(teacher: Config) -> dict[str, str]:
    """Return, by the name of each engine that takes the order of a teacher's layers for a constant, a line about it.

    Which layers are cut is known once they are scored; those that stay may have the order that the engine expects.
    """
    lists = {name: entries for name in ORDERS if isinstance(entries := teacher.get(name), list)}
    shifted = {**teacher, **{name: entries[1:] for name, entries in lists.items()}}
    taken = {engine.name: engine.title for engine in ENGINES}
    return {
        name: f"{taken[name]} takes the order of this family's layers for a constant: it runs a student with fewer "
        "layers as transformers does only where those that stay are in that order"
        for name in added_obstacles(teacher, shifted)
    }
