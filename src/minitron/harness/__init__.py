"""Runs other people's benchmarks: lm-eval, and benchmarks that lm-eval lacks."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from minitron.errors import UserError
from minitron.harness.answers import Answerer, answers_folder
from minitron.harness.benchmarks import run_benchmarks
from minitron.harness.interface import Inputs
from minitron.harness.lm_eval_model import load_lm
from minitron.harness.lm_eval_tasks import run_tasks
from minitron.harness.plan import Plan, fitting
from minitron.run import versions
from minitron.session import Session

__all__ = ["measure_tasks", "warn_of_skipped"]

logger = logging.getLogger(__name__)


def measure_tasks(session: Session, plan: Plan, inputs: Inputs, *, answers: Path | None = None) -> dict[str, Any]:
    """Run every task of a plan on the session's model; return results by task, skipped tasks, limit, seed, versions.

    The results are metrics, the number of items, shots and the source of the data. The folder `answers`, if given,
    caches answers and judgements.

    Raises:
        UserError: lm-eval is not installed; or see `run_plan`.
    """
    recipe, dtype, packages = session.recipe, session.runtime.dtype_name, versions() | {"lm_eval": version("lm_eval")}
    model = load_lm(session.teacher.folder, str(session.runtime.device), dtype)
    planned, plan = plan, fitting(plan, model.max_length)
    warn_of_skipped({name: reason for name, reason in plan.skipped.items() if name not in planned.skipped})
    answerer = Answerer(model, "-".join(Path(recipe.teacher).parts[-2:]), recipe.seed)
    fingerprint = session.teacher.fingerprint() if plan.benchmarks else None
    identity = {"model": fingerprint, "seed": recipe.seed, "dtype": dtype, "versions": packages}
    return {
        "tasks": run_plan(plan, answerer, inputs, answers=answers, identity=identity),
        "skipped": dict(plan.skipped),
        "limit": plan.limit,
        "seed": recipe.seed,
        "versions": packages,
    }


def run_plan(
    plan: Plan, answerer: Answerer, inputs: Inputs, *, answers: Path | None = None, identity: Mapping[str, Any]
) -> dict[str, Any]:
    """Run every task of a plan on one model; return metrics, number of items, shots and source of data by task.

    `identity` says what answers depend on, so that answers of another model or setting are not taken for this model's.

    Raises:
        UserError: the folder `answers` holds answers with another identity; or the data of no task can be read.
    """
    inputs, cache = replace(inputs, limit=plan.limit), answers if plan.benchmarks else None
    with answers_folder(cache, {**identity, "data": str(inputs.data)}) as folder:
        results = {
            **run_tasks(answerer.model, plan.tasks, inputs, answerer.seed),
            **run_benchmarks(plan.benchmarks, answerer, inputs, folder),
        }
    if results and not any(result["items"] for result in results.values()):
        raise UserError("; ".join(f"{name}: {result['note']}" for name, result in results.items()))
    return results


def warn_of_skipped(skipped: Mapping[str, str]) -> None:
    """Warn of every task that is skipped, with the reason."""
    for name, reason in skipped.items():
        logger.warning("skipped %s: %s", name, reason)
