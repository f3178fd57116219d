"""The settings of a run: YAML, command-line options or keyword arguments become a validated `Recipe`.

The attribute docstrings of the classes are the reference of all recipe keys. Counts accept suffixes (`40k`, `2M`). Many
defaults are measured in docs/studies.
"""

from minitron.recipe.baselines import BASELINES, baseline
from minitron.recipe.cutting import (
    CUT_ONLY,
    BudgetRecipe,
    CalibrationRecipe,
    DepthRecipe,
    Factors,
    PruneRecipe,
    SearchRecipe,
    Span,
    VocabularyRecipe,
)
from minitron.recipe.parts import Data, Target, data_in_words
from minitron.recipe.reading import RecipeSource, built_in_recipes, laid_over, load_recipe, recipe_from, validate
from minitron.recipe.run import DEFAULT_CONTEXT, ChatsRecipe, EvaluationRecipe, LineageRecipe, Recipe
from minitron.recipe.training import (
    CorrectionRecipe,
    DistillRecipe,
    Documents,
    IntermediateRecipe,
    OnPolicyRecipe,
    OriginalTraining,
    PreferRecipe,
    TuneRecipe,
)

__all__ = [
    "BASELINES",
    "CUT_ONLY",
    "DEFAULT_CONTEXT",
    "BudgetRecipe",
    "CalibrationRecipe",
    "ChatsRecipe",
    "CorrectionRecipe",
    "Data",
    "DepthRecipe",
    "DistillRecipe",
    "Documents",
    "EvaluationRecipe",
    "Factors",
    "IntermediateRecipe",
    "LineageRecipe",
    "OnPolicyRecipe",
    "OriginalTraining",
    "PreferRecipe",
    "PruneRecipe",
    "Recipe",
    "RecipeSource",
    "SearchRecipe",
    "Span",
    "Target",
    "TuneRecipe",
    "VocabularyRecipe",
    "baseline",
    "built_in_recipes",
    "data_in_words",
    "laid_over",
    "load_recipe",
    "recipe_from",
    "validate",
]
