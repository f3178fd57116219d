"""The families, each a table. A new family is a module with its rows, taps and norms, and a line here."""

from minitron.errors import UserError
from minitron.model.families.experts import GPT_OSS, MIXTRAL, QWEN3_MOE
from minitron.model.families.gemma import GEMMA2, GEMMA3
from minitron.model.families.gpt import GPT2, GPT_NEOX, OPT
from minitron.model.families.llama import GRANITE, LLAMA, MINISTRAL3, MISTRAL, QWEN2, QWEN3, SMOLLM3
from minitron.model.families.mamba import BAMBA, FALCON_H1, MAMBA2, NEMOTRON_H
from minitron.model.families.nemotron import NEMOTRON
from minitron.model.families.olmo import OLMO2
from minitron.model.families.phi import PHI3
from minitron.model.families.table_files import derived_family, family_under_proof
from minitron.model.family import Family

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        LLAMA, MISTRAL, MINISTRAL3, NEMOTRON, QWEN2, QWEN3, GEMMA2, GEMMA3, PHI3, OLMO2, SMOLLM3, GRANITE,
        GPT2, GPT_NEOX, OPT, MIXTRAL, QWEN3_MOE, GPT_OSS, MAMBA2, NEMOTRON_H, BAMBA, FALCON_H1,
    )
}  # fmt: skip


class UnsupportedFamilyError(UserError):
    """The `model_type` has no table."""

    def __init__(self, model_type: str, hint: str = "") -> None:
        derives = f" yet: minitron families {model_type} derives one"
        super().__init__(f"model_type '{model_type}' has no table{hint or derives}")
        self.model_type = model_type
        self.can_be_derived = not hint


def family_of(model_type: str) -> Family:
    """Return the table of a `model_type`.

    Raises:
        UnsupportedFamilyError: there is none.
    """
    family = family_under_proof(model_type) or FAMILIES.get(model_type) or derived_family(model_type)
    if family is None:
        raise UnsupportedFamilyError(model_type)
    return family


def family_that_fits(tensor_names: set[str]) -> Family | None:
    """Return the first family whose table has a row for every tensor and whose required rows all have one, or None."""
    for family in FAMILIES.values():
        places = [family.match(name) for name in tensor_names]
        required = {row for row in family.rows if row.condition is None and row.kind is None and not row.is_ignored}
        if all(places) and required <= {place.row for place in places if place}:
            return family
    return None
