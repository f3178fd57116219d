"""The hash of what files hold, which names the folder of a converted teacher.

Files of tens of gigabytes take minutes to read. Their hash is therefore kept in the cache under a stamp: the hash of
path, size, inode and times of every file. A file that changes has another stamp, and the kept hash is not found.
"""

import json
import time
from hashlib import sha256
from pathlib import Path

from filelock import FileLock

from minitron.errors import courtesy
from minitron.files import whole_file
from minitron.progress import Progress

HASHES = "hashes"
"""The folder in the cache that holds kept hashes, one per file, which its stamp names."""
LENGTH = 16
SETTLED_NANOSECONDS = 2 * 10**9
"""Files that changed less than this before they are read may change again under equal times: their hash is not kept."""


def content_hash(name: str, paths: list[Path], cache: Path) -> str:
    """Return the first 16 digits of the SHA-256 of files, one after the other; it is read from the cache if kept there.

    `name` names the files in the progress.
    """
    begun, stamp = time.time_ns(), _stamp(paths)
    kept = cache / HASHES / stamp
    if kept.is_file() and len(text := kept.read_text().strip()) == LENGTH:
        return text
    digest = sha256()
    with Progress(f"hash {name}", sum(path.stat().st_size for path in paths), "bytes") as progress:
        for path in paths:
            with path.open("rb") as file:
                while piece := file.read(1 << 24):
                    digest.update(piece)
                    progress.advance(len(piece))
    found = digest.hexdigest()[:LENGTH]
    changed = max(max(path.stat().st_mtime_ns, path.stat().st_ctime_ns) for path in paths)
    if changed < begun - SETTLED_NANOSECONDS and _stamp(paths) == stamp:
        with courtesy(f"the kept hash of {name}"):
            kept.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(kept.parent / "lock"), whole_file(kept) as staging:
                staging.write_text(found)
    return found


def _stamp(paths: list[Path]) -> str:
    # The time of the last change of the inode (ctime) cannot be set back, as the time of the last write can.
    stats = [(path.resolve(), path.stat()) for path in paths]
    values = [(str(path), s.st_size, s.st_ino, s.st_mtime_ns, s.st_ctime_ns) for path, s in stats]
    return sha256(json.dumps(values).encode()).hexdigest()[:32]
