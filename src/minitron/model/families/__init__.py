"""The families, each a table. A new one is a row table, its taps, and a line here."""

from minitron.errors import UserError
from minitron.model.anatomy import Family
from minitron.model.families.experts import GPT_OSS, MIXTRAL, QWEN3_MOE
from minitron.model.families.gemma import GEMMA2, GEMMA3
from minitron.model.families.gpt import GPT2, GPT_NEOX, OPT
from minitron.model.families.llama import GRANITE, LLAMA, MINISTRAL3, MISTRAL, QWEN2, QWEN3, SMOLLM3
from minitron.model.families.mamba import BAMBA, FALCON_H1, MAMBA2, NEMOTRON_H
from minitron.model.families.nemotron import NEMOTRON
from minitron.model.families.olmo import OLMO2
from minitron.model.families.phi import PHI3

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        LLAMA, MISTRAL, MINISTRAL3, NEMOTRON, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3, OLMO2, SMOLLM3, GRANITE,
        GPT2, GPT_NEOX, OPT, MIXTRAL, QWEN3_MOE, GPT_OSS, MAMBA2, NEMOTRON_H, BAMBA, FALCON_H1,
    )
}  # fmt: skip


class UnsupportedFamilyError(UserError):
    """A `model_type` that no table is for."""


def family_of(model_type: str) -> Family:
    """The table of a `model_type`; an unknown one is an `UnsupportedFamilyError` that lists the supported ones."""
    if model_type not in FAMILIES:
        supported = ", ".join(sorted(FAMILIES))
        raise UnsupportedFamilyError(f"model_type '{model_type}' is not supported; supported: {supported}")
    return FAMILIES[model_type]


def family_that_fits(tensor_names: set[str]) -> Family | None:
    """The first family whose table has a row for every one of these tensors and misses none that it must have."""
    for family in FAMILIES.values():
        matched = [family.match(name) for name in tensor_names]
        required = {row for row in family.rows if row.condition is None and row.kind is None and not row.is_ignored}
        if all(matched) and required <= {found.row for found in matched if found}:
            return family
    return None
