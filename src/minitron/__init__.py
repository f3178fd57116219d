"""Minitron: a trained language model goes in, a smaller one, nearly as good, comes out."""

__version__ = "0.1.0"
