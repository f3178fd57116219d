"""What the parts of a recipe are made of: counts, shares and sources of data, as people write them."""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from minitron.quantities import parse_count


def _share(target: Any) -> Any:
    # 0.7 from YAML and "0.7" from the command line have to give equal recipes, so that a run can be continued.
    try:
        return float(target) if 0 < float(target) <= 1 else str(target)
    except (TypeError, ValueError):
        return target


def shares(targets: Any) -> Any:
    """Read one target or several, as YAML and the command line give them."""
    if isinstance(targets, str) and "," in targets:
        targets = targets.split(",")
    return tuple(map(_share, targets)) if isinstance(targets, (list, tuple)) else _share(targets)


Data = str | Annotated[dict[str, Annotated[float, Field(gt=0)]], Field(min_length=1)]
"""One source of documents, or a mixture: a mapping from source to weight."""


def data_in_words(data: Data) -> str:
    """Describe the data in words: `wiki`, or `0.3 of wiki, 0.7 of code.jsonl`."""
    if isinstance(data, str):
        return data
    return ", ".join(f"{weight / sum(data.values()):.3g} of {source}" for source, weight in data.items())


Target = str | float
"""A share of the teacher's figure (0.7), an amount (94M, 20GiB), or a range of amounts (7.8B..8.5B)."""
Count = Annotated[int, BeforeValidator(parse_count)]
CountOrNone = Annotated[int, BeforeValidator(lambda value: 0 if str(value) == "0" else parse_count(value))]
Derived = Annotated[int | None, BeforeValidator(lambda value: value and (0 if value == "0" else parse_count(value)))]
DerivedCount = Annotated[int | None, BeforeValidator(lambda value: None if value is None else parse_count(value))]
"""A count; None leaves it to the program."""
Sizes = Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
Share = Annotated[Target, BeforeValidator(_share)]


class Part(BaseModel):
    """A part of a recipe: keys that are not listed are errors, and nothing changes once it is read."""

    model_config = ConfigDict(extra="forbid", frozen=True)
