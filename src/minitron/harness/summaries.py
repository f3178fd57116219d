"""Chooses the articles of XL-Sum and rates their summaries, for the definition `definitions/xlsum.yaml`."""

import importlib.util
import math
from collections.abc import Sequence
from typing import Any

LONGEST_SUMMARY = 128
"""The most tokens of a summary; those of the data set are single sentences."""


def requirement() -> str | None:
    """Return the reason why summaries cannot be rated, or None."""
    return None if importlib.util.find_spec("rouge_score") else "it needs rouge_score: pip install rouge-score"


def first_fifth(articles: Any) -> Any:
    """Return the first fifth of a split of articles, a data set of the library datasets.

    The papers measure on 20 % of XL-Sum and do not state which (arXiv 2407.14679, section 4).
    """
    return articles.select(range(math.ceil(len(articles) / 5)))


def rouge_l(references: Sequence[str], predictions: Sequence[str]) -> float:
    """Return the F1 of the longest common subsequence of the words of one summary and its reference, from 0 to 1.

    Words are as the package rouge-score splits them, without stemming, as in lm-eval's tasks of XL-Sum.
    """
    from rouge_score.rouge_scorer import RougeScorer

    [reference], [prediction] = references, predictions
    return float(RougeScorer(["rougeL"]).score(reference, prediction)["rougeL"].fmeasure)
