"""What every dimension of a family's tensors is made of: a finite difference over the shapes of several specimens."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, permutations, product
from math import prod

from minitron.model.anatomy import Dimension, Segment, size_of

PRODUCTS: tuple[Segment, ...] = (
    ("query", "head_dim"),
    ("kv", "head_dim"),
    ("query", "unturned+turned"),
    ("query", "unturned+value_dim"),
    ("query", "value_dim"),
    ("query", "unturned"),
    ("query", "turned"),
    ("delta_key", "delta_key_dim"),
    ("delta_value", "delta_value_dim"),
)
"""Products of axes along which one dimension may run: in attention, in multi-head latent attention, in delta nets."""
MOST_COPIES = 8
"""The most equal products that one dimension holds, one after the other."""


def dimension_of(sizes: Sequence[int], specimens: Sequence[Mapping[str, int]]) -> Dimension | None:
    """Return what a dimension is made of: the shortest sum of products that has its size in every specimen, or None.

    `sizes` holds the dimension's size in each specimen, `specimens` the sizes of the axes there. The order in which
    products and copies follow each other is not visible in sizes: see `orders`.
    """
    known = [axis for axis in specimens[0] if axis not in {"layer", "head_dim", "chosen"}]
    # A config without head_dim makes hidden equal to query times head_dim: `tables` decides which of both is meant.
    single: list[Segment] = [(axis,) for axis in known] + [
        factors
        for factors in (*PRODUCTS, ("head_dim",))
        if {axis for factor in factors for axis in str(factor).split("+")} <= specimens[0].keys()
    ]
    values = {
        factors: [prod(size_of(str(factor), each.__getitem__) for factor in factors) for each in specimens]
        for factors in single
    }
    for factors, products in values.items():
        for copies in range(1, MOST_COPIES + 1):
            if [copies * each for each in products] == list(sizes):
                return (factors,) if copies == 1 else ((copies, *factors),)
    for one, other in combinations(values, 2):
        for first, second in product(range(1, 4), repeat=2):
            if all(
                first * a + second * b == size for a, b, size in zip(values[one], values[other], sizes, strict=True)
            ):
                return (one,) * first + (other,) * second
    constant = {
        size - values[factors][i] for factors in [("position",)] if factors in values for i, size in enumerate(sizes)
    }
    if len(constant) == 1 and 0 < min(constant) <= MOST_COPIES:
        return (("position",), (min(constant),))
    return ((sizes[0],),) if len(set(sizes)) == 1 else None


def orders(dimension: Dimension) -> Iterator[Dimension]:
    """Yield the orders in memory that a dimension of this size may have, the commonest first.

    Copies of a product stand one after the other, or are adjacent for each entry of its outermost axis, or of its
    innermost; different products stand in any order.
    """
    if len(dimension) > 1:
        yield from dict.fromkeys(permutations(dimension))
    elif isinstance(dimension[0][0], int) and len(dimension[0]) > 1:
        copies, *factors = dimension[0]
        yield from (((*factors[:place], copies, *factors[place:]),) for place in range(len(factors) + 1))
    else:
        yield dimension


def in_words(dimension: Dimension) -> str:
    """Return a dimension as tables write it."""
    text = " | ".join(" ".join(map(str, segment)) for segment in dimension)
    return text if len(dimension) == 1 and len(dimension[0]) == 1 else f"({text})"
