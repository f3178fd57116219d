"""Architecture search: from a budget to a shape."""

from minitron.nas.rank import budget_of, removed_layers, search, shapes_within

__all__ = ["budget_of", "removed_layers", "search", "shapes_within"]
