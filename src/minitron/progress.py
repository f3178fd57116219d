"""Shows the progress of every stage that takes longer than two seconds, at least every five seconds.

On a terminal, progress is a bar with rate and remaining time; in a log, it is a plain line every few seconds. A
heartbeat thread prints these lines even while one long library call runs.
"""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console, RenderableType
from rich.filesize import decimal
from rich.progress import BarColumn, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

HEARTBEAT_SECONDS = 4.0
LOG_WIDTH = 160

_tables: list[Callable[[], RenderableType]] = []
_is_disabled = False


def disable_progress() -> None:
    """Show no progress from now on, in this process."""
    global _is_disabled
    _is_disabled = True


def enable_progress() -> None:
    """Show progress again after `disable_progress`."""
    global _is_disabled
    _is_disabled = False


def announce(text: str) -> None:
    """Print a heading for the progress that follows, on standard error."""
    if not _is_silent():
        print(f"\n{text}", file=sys.stderr, flush=True)


def _is_silent() -> bool:
    # Among the processes of torchrun, only the first one shows progress.
    return _is_disabled or os.environ.get("RANK", "0") != "0"


@contextmanager
def beside(table: Callable[[], RenderableType]) -> Iterator[None]:
    """Show a table together with every stage's progress while the block runs: live on a terminal, after it in a log."""
    _tables.append(table)
    try:
        yield
    finally:
        _tables.pop()


class Progress:
    """A context manager that shows the progress of one stage on standard error.

    `total` is the number of `unit`s to do; None means unknown, and only the elapsed time is shown. `done` units were
    finished by an earlier run. Call `advance` as units are done, and `note` to show a figure such as the loss.
    """

    def __init__(self, stage: str, total: int | None = None, unit: str = "tokens", done: int = 0) -> None:
        self.stage, self.total, self.unit, self.done = stage, total, unit, done
        self.resumed, self.text, self.started = done, "", time.monotonic()
        self._finished = threading.Event()
        self._silent = _is_silent()

    def __enter__(self) -> "Progress":
        self.started = time.monotonic()
        self._bar: RichProgress | None = None
        if self._silent:
            return self
        if sys.stderr.isatty():
            columns = [SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=24), _Status(self)]
            self._bar = _Bar(*columns, console=Console(stderr=True), refresh_per_second=4)
            self._task = self._bar.add_task(self.stage, total=self.total, completed=self.done)
            self._bar.start()
        else:
            self._thread = threading.Thread(target=self._beat, daemon=True)
            self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._finished.set()
        if self._silent:
            return
        if self._bar:
            if self.total is None and error is None:
                self._bar.update(self._task, total=1, completed=1)
            self._bar.stop()
        else:
            self._thread.join()
            print(f"{self.stage}: {'done' if error is None else 'stopped'}, {self.status()}", file=sys.stderr)
            for table in _tables if self.total is not None else []:
                Console(stderr=True, width=LOG_WIDTH).print(table())

    def advance(self, units: int) -> None:
        """Add `units` to those that are done."""
        self.done += units
        if self._bar:
            self._bar.update(self._task, completed=self.done)

    def note(self, text: str) -> None:
        """Show `text` after the figures of the progress, until the next note."""
        self.text = text

    def status(self) -> str:
        """Return a status such as `12,288 of 40,000 tokens · 310 tokens/s · 1:29 left · loss 0.81`, or the time."""
        elapsed = time.monotonic() - self.started
        parts = []
        if self.total is None:
            parts.append(f"{clock(elapsed)} elapsed")
        else:
            done = self._amount(self.done).removesuffix(f" {self.unit}")
            parts.append(f"{done} of {self._amount(self.total)}")
            done_now = self.done - self.resumed
            if done_now and elapsed > 0:
                rate = done_now / elapsed
                parts.append(f"{self._amount(rate)}/s")
                if self.done < self.total:
                    parts.append(f"{clock((self.total - self.done) / rate)} left")
                else:
                    parts.append(clock(elapsed))
        return " · ".join([*parts, *([self.text] if self.text else [])])

    def _amount(self, count: float) -> str:
        if self.unit == "bytes":
            return decimal(int(count))
        return f"{count:,.0f} {self.unit}" if count >= 10 or count == int(count) else f"{count:.2f} {self.unit}"

    def _beat(self) -> None:
        while not self._finished.wait(HEARTBEAT_SECONDS):
            print(f"{self.stage}: {self.status()}", file=sys.stderr, flush=True)


class _Bar(RichProgress):
    def get_renderables(self) -> Iterable[RenderableType]:
        """Return the tables of `beside`, and the bar below them."""
        yield from (table() for table in _tables)
        yield from super().get_renderables()


class _Status(ProgressColumn):
    """The status line of a log, as a column at the end of the bar."""

    max_refresh = 0.25

    def __init__(self, progress: Progress) -> None:
        super().__init__()
        self.progress = progress

    def render(self, task: Task) -> Text:
        return Text(self.progress.status(), style="cyan")


def clock(seconds: float) -> str:
    """Return a time as `0:07` or `1:02:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
