"""What the parts of a search took."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from minitron.files import read_json, write_json
from minitron.runtime import World


@dataclass(frozen=True)
class Seconds:
    """Seconds by part, those of earlier attempts included; kept in the JSON file at `path`."""

    path: Path
    world: World

    @property
    def spent(self) -> dict[str, float]:
        """So far."""
        return dict(read_json(self.path)) if self.path.exists() else {}

    @contextmanager
    def of(self, part: str) -> Iterator[None]:
        """Add the time that something takes to its part, whether it comes to its end or not."""
        started = time.monotonic()
        try:
            yield
        finally:
            if self.world.is_main and self.path.parent.exists():
                spent = self.spent
                write_json(self.path, spent | {part: round(spent.get(part, 0.0) + time.monotonic() - started, 2)})
