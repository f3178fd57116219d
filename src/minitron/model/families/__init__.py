"""The families, each a table. A new one is a row table, its taps, and a line here."""

from minitron.errors import UserError
from minitron.model.anatomy import Family
from minitron.model.families.gemma import GEMMA2, GEMMA3
from minitron.model.families.gpt import GPT2, GPT_NEOX, OPT
from minitron.model.families.llama import GRANITE, LLAMA, MINISTRAL3, MISTRAL, QWEN2, QWEN3, SMOLLM3
from minitron.model.families.nemotron import NEMOTRON
from minitron.model.families.olmo import OLMO2
from minitron.model.families.phi import PHI3

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        LLAMA, MISTRAL, MINISTRAL3, NEMOTRON, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3, OLMO2, SMOLLM3, GRANITE,
        GPT2, GPT_NEOX, OPT,
    )
}  # fmt: skip


def family_of(model_type: str) -> Family:
    """The table of a `model_type`; an unknown one is a `UserError` that lists the supported ones."""
    if model_type not in FAMILIES:
        raise UserError(f"model_type '{model_type}' is not supported; supported: {', '.join(sorted(FAMILIES))}")
    return FAMILIES[model_type]
