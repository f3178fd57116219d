"""Counts, bytes and lengths as people write them: `40k`, `20GiB`, `128k`."""

import re
from typing import Any

from minitron.errors import UserError

UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
BYTES: dict[str, int] = {
    "": 1,
    **{f"{k}b": 1000**n for n, k in enumerate("kmgt", 1)},
    **{f"{k}ib": 1024**n for n, k in enumerate("kmgt", 1)},
}


def parse_count(text: Any) -> int:
    """Parse a count such as `2M`, `40k`, `4.2B` or a plain number into an integer.

    Raises:
        ValueError: the text is not a count, or the count is not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmbt]?)", str(text).strip().replace("_", ""), re.IGNORECASE)
    count = round(float(match[1]) * UNITS[match[2].lower()]) if match else 0
    if count < 1:
        raise ValueError(f"'{text}' is not a count; accepted: a number such as 40000, 40k, 2M or 4.2B")
    return count


def parse_bytes(text: str) -> int:
    """Return the bytes of `19.66GiB`, `300 MB` or a plain number.

    Raises:
        ValueError: the text is not a size, or it is zero.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*((?:[kmgt]i?b)?)", text.strip().lower())
    if not match or not float(match[1]):
        raise ValueError(f"'{text}' must be a size such as 20GiB")
    return round(float(match[1]) * BYTES[match[2]])


def parse_context(text: Any) -> int:
    """Parse a context length such as `4096` or `128k` into a number of tokens; the k of a length is 1,024.

    Raises:
        ValueError: the text is not a length, or the length is not positive.
    """
    match = re.fullmatch(r"([1-9]\d*)(k?)", str(text).strip(), re.IGNORECASE)
    if not match:
        raise ValueError(f"context '{text}' is not a length; accepted: a number of tokens such as 4096, or 128k")
    return int(match[1]) * (1024 if match[2] else 1)


def option_count(option: str, text: str | int | None) -> int | None:
    """Parse a count of the command line; None stays None.

    Raises:
        UserError: the text is not a count; the message names the option.
    """
    try:
        return None if text is None else parse_count(text)
    except ValueError as error:
        raise UserError(f"{option}: {error}") from error


def option_lengths(option: str, text: str) -> list[int]:
    """Parse lengths of the command line, such as `1,8` or `512,4k`, into integers.

    Raises:
        UserError: a part is not a length; the message names the option.
    """
    try:
        return [parse_context(part) for part in text.split(",")]
    except ValueError as error:
        raise UserError(f"{option}: {error}") from error
