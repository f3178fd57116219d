"""What a pruning really did, for the history of the model that it made."""

from minitron.history import Step
from minitron.model.arch import Arch
from minitron.pruning.cut import Cut
from minitron.pruning.repair import rescales
from minitron.run import versions
from minitron.session import Session


def pruning_step(session: Session, cut: Cut) -> Step:
    """Return how the session's model was cut and repaired."""
    recipe, source, student = session.recipe.prune, cut.teacher, cut.student
    return _step(session, student) | {
        "kept_layers": cut.layers,
        "rounds": recipe.rounds,
        "hidden": "rotated" if cut.basis is not None else "channels",
        "nested": cut.is_nested,
        "merges_heads": cut.partners is not None,
        "rescales_norms": rescales(source, student, recipe),
        "refits": recipe.refit,
    }


def random_step(session: Session, student: Arch) -> Step:
    """Return how a model of a student's shape with random weights was made."""
    return _step(session, student) | {"random_seed": session.runtime.seed}


def _step(session: Session, student: Arch) -> Step:
    source = session.source.arch
    return {
        "step": "prune",
        "of": str(session.larger or session.recipe.teacher),
        "sizes": {name: [size, student.sizes[name]] for name, size in source.sizes.items()},
        "num_parameters": [source.num_parameters, student.num_parameters],
        "seed": session.runtime.seed,
        "versions": versions(),
    }
