"""Measure which parts of a model matter, and cut the rest."""
