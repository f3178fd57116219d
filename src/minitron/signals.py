"""SIGINT and SIGTERM as a wish to stop at the next good moment rather than at once."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from minitron.errors import StoppedError

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopWish:
    """Whether one of them has come."""

    def __init__(self) -> None:
        self.number: int | None = None

    def grant(self) -> None:
        """Stop, now that everything is safe.

        Raises:
            StoppedError: always.
        """
        raise StoppedError(self.number or signal.SIGTERM)


@contextmanager
def stop_wish() -> Iterator[StopWish]:
    """Take note of the first such signal while the block runs; a second one does what it always does."""
    wish = StopWish()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield wish
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def take_note(number: int, _: Any) -> None:
        wish.number = number
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in SIGNALS:
        signal.signal(number, take_note)
    try:
        yield wish
    finally:
        restore()
