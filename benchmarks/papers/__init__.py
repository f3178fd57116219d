"""The papers' tables as commands; `python -m benchmarks.papers --help` lists them."""
