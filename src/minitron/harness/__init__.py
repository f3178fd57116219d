"""Other people's benchmarks: lm-eval, and those that lm-eval lacks (MT-Bench, ChatRAG-Bench, BFCL, programs)."""

import logging
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minitron.harness.answers import Answerer
from minitron.harness.benches import run_benches
from minitron.harness.judge import Judge
from minitron.harness.lm_eval_model import load_lm
from minitron.harness.tasks import Plan, fitting, run_tasks
from minitron.run import versions
from minitron.session import Session

__all__ = ["measure_tasks", "warn_of_skipped"]

logger = logging.getLogger(__name__)


def measure_tasks(
    session: Session, plan: Plan, data: Path | None, answers: Path | None, judge: Judge | None
) -> dict[str, Any]:
    """Return the benchmarks of the session's model that a plan names, with the versions that made them.

    Answers to chats are kept in the folder `answers`, if one is given, and rated by the judge.

    Raises:
        UserError: lm-eval is not installed, or the answers kept are another model's.
    """
    recipe, packages = session.recipe, versions() | {"lm_eval": version("lm_eval")}
    dtype = session.runtime.dtype_name
    model = load_lm(session.teacher.folder, str(session.runtime.device), dtype)
    before, plan = plan, fitting(plan, model.max_length)
    warn_of_skipped({name: reason for name, reason in plan.skipped.items() if name not in before.skipped})
    results = run_tasks(model, plan, data, recipe.seed) if plan.tasks else {}
    if plan.benches:
        identity = {"model": session.teacher.fingerprint(), "seed": recipe.seed, "dtype": dtype, "versions": packages}
        answerer = Answerer(model, "-".join(Path(recipe.teacher).parts[-2:]), recipe.seed)
        results |= run_benches(plan.benches, answerer, data, answers, identity, plan.limit, judge)
    return {
        "tasks": results,
        "skipped": dict(plan.skipped),
        "limit": plan.limit,
        "seed": recipe.seed,
        "versions": packages,
    }


def warn_of_skipped(skipped: Mapping[str, str]) -> None:
    """Warn of every task that is skipped, with the reason."""
    for name, reason in skipped.items():
        logger.warning("skipped %s: %s", name, reason)
