"""The families, each a table. A new one is a row table, its taps, and a line here."""

from minitron.errors import UserError
from minitron.model.anatomy import Family
from minitron.model.families.llama import LLAMA, MISTRAL, QWEN2, QWEN3

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAMA, MISTRAL, QWEN2, QWEN3)}


def family_of(model_type: str) -> Family:
    """The table of a `model_type`; an unknown one is a `UserError` that lists the supported ones."""
    if model_type not in FAMILIES:
        raise UserError(f"model_type '{model_type}' is not supported; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]
