"""Families that were derived from transformers and proven, each a file of `derived/` with rows, taps and norms."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from minitron.files import cache_folder
from minitron.model.family import Demand, Family, LayerKinds, Product
from minitron.model.grammar import parse_norms, parse_rows, parse_taps

COMMITTED = Path(__file__).parent / "derived"
PARSERS = {"rows": parse_rows, "taps": parse_taps, "norms": parse_norms}
PARTS = {"product": Product, "demand": Demand, "kinds": LayerKinds}

_under_proof: dict[str, Family] = {}
_read_tables: dict[tuple[str, str], Family] = {}


def cached_tables() -> Path:
    """Return the folder of the tables that were derived on this machine, for the installed transformers."""
    return cache_folder() / "families" / f"transformers-{_transformers_version()}"


_transformers_version = cache(lambda: version("transformers"))


def derived_family(model_type: str) -> Family | None:
    """Return the derived family of a `model_type`: committed, or cached on this machine; None if there is none."""
    return _family_in(COMMITTED, model_type) or _family_in(cached_tables(), model_type)


def _family_in(folder: Path, model_type: str) -> Family | None:
    """Return the family of a table in a folder; what was read once is kept."""
    key = str(folder), model_type
    if key not in _read_tables and Path(model_type).name == model_type:
        file = folder / f"{model_type}.yaml"
        if file.is_file():
            _read_tables[key] = parse_table(file.read_text(encoding="utf-8"))
    return _read_tables.get(key)


def family_under_proof(model_type: str) -> Family | None:
    """Return the family of a table that is being proven (`known`), or None."""
    return _under_proof.get(model_type)


def committed_types() -> list[str]:
    """Return the types whose derived family is part of this package."""
    return sorted(file.stem for file in COMMITTED.glob("*.yaml"))


def derived_types() -> list[str]:
    """Return the types that have a derived family, in this package or on this machine."""
    return sorted({*committed_types(), *(file.stem for file in cached_tables().glob("*.yaml"))})


@contextmanager
def known(family: Family) -> Iterator[None]:
    """Let `family_of` return a family whose table is not written yet, while the block runs."""
    _under_proof[family.model_type] = family
    try:
        yield
    finally:
        del _under_proof[family.model_type]


def parse_table(text: str) -> Family:
    """Return the family of a table as `in_text` writes it.

    Raises:
        ValueError: a line is not a row, a tap or a norm, or see `Family`.
    """
    values: dict[str, Any] = yaml.safe_load(text)
    for name, value in values.items():
        if name in PARSERS:
            values[name] = PARSERS[name](value)
        elif name in PARTS:
            values[name] = PARTS[name](**{key: tuple(v) if isinstance(v, list) else v for key, v in value.items()})
        elif isinstance(value, list):
            values[name] = tuple(value)
    return Family(**values)


def in_text(family: dict[str, Any]) -> str:
    """Return the text of a table: entries of `Family`, with rows, taps and norms as the grammar writes them."""
    defaults = {field.name: field.default for field in fields(Family) if field.default is not MISSING}
    lines = []
    for name, value in family.items():
        if name in PARSERS:
            lines += [f"{name}: |", *(f"  {line}" for line in _in_columns(value))]
        elif value != defaults.get(name, ...):
            lines.append(f"{name}: {value if isinstance(value, str) else json.dumps(value)}")
    return "\n".join(lines) + "\n"


def _in_columns(table: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(line[place]) for line in table if len(line) > place) for place in range(max(map(len, table)))]
    return [
        "    ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=False)).rstrip() for line in table
    ]
