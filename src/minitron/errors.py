"""Exceptions that end a run with a message instead of a traceback, and failures that do not end it."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


class UserError(Exception):
    """An input cannot be used; the message explains why and what would be accepted.

    The command line prints it as one `error: …` line and exits with status 2.
    """


class StoppedError(Exception):
    """A run has saved its state and stopped because of a signal; the command line exits with the signal's status."""

    def __init__(self, signal_number: int) -> None:
        super().__init__("stopped, with everything saved: run the same command again to continue")
        self.signal_number = signal_number


@contextmanager
def courtesy(what: str) -> Iterator[None]:
    """Let a failure of the block be a warning: what it makes accompanies a result, which is whole without it."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit, StoppedError):
        raise
    except BaseException as error:  # panics of Rust libraries derive from it directly
        reason = " ".join(str(error).split())[:300]
        logging.warning(f"{what} could not be made: {reason or type(error).__name__}")


def nearest(word: str, accepted: list[str]) -> str:
    """Return `did you mean …?` if an accepted word is similar to `word`, else the list of accepted words."""
    import difflib

    close = difflib.get_close_matches(word, accepted, n=1, cutoff=0.6)
    return f"did you mean '{close[0]}'?" if close else f"accepted: {', '.join(accepted)}"
