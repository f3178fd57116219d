"""`python -m minitron`, as torchrun starts it."""

from minitron.cli import main

main()
