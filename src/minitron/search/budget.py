"""What the student may cost, as a range of exact parameter counts."""

from dataclasses import dataclass

from minitron.errors import UserError
from minitron.model.arch import Arch
from minitron.recipe import parse_count


@dataclass(frozen=True)
class Budget:
    """Parameter counts from `low` to `high`, both included; `high` is the target."""

    low: int
    high: int


def parse_budget(target: str | float | None, teacher: Arch, tolerance: float) -> Budget:
    """`0.7` (of the teacher), `94M`, `4B` or a plain count, to the range within `tolerance` under it.

    Raises:
        UserError: it is not a number, or not below the teacher.
    """
    if target is None:
        raise UserError(
            "target_params is not given; accepted: a share of the teacher such as 0.7, or a count such as 94M"
        )
    total = teacher.num_parameters
    try:
        ratio = float(target)
        high = round(ratio * total) if 0 < ratio <= 1 else parse_count(target)
    except ValueError:
        try:
            high = parse_count(target)
        except ValueError as error:
            raise UserError(
                f"target_params '{target}' is not a number; accepted: a share of the teacher such as 0.7, "
                "or a count such as 94M or 4B"
            ) from error
    if high >= total:
        raise UserError(f"target_params {target} is not below the teacher's {total:,} parameters")
    return Budget(low=round(high * (1 - tolerance)), high=high)
