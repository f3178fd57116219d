"""The lock of a folder that a command writes: a second command sees which process holds it, and since when.

The kernel's lock (flock) decides where it is one lock for both processes, and is released with a killed process. Some
network file systems keep it on each machine by itself, or lack it; there the file's time decides, which a thread of the
holder renews. The `filelock` package offers the kernel's lock without a record of the holder.
"""

import json
import logging
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from minitron.errors import UserError

LOCK = ".minitron-lock"
HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 180.0
"""A lock of another machine that was not renewed for this time belongs to a process that has ended."""


Holder = dict[str, Any]
"""The record in a lock: host and process, the machine whose kernel runs it, and the time at which it began."""


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of an existing folder while the block runs.

    A lock that a killed process left is taken over, with a warning.

    Raises:
        UserError: another process holds it, or the folder cannot be written.
    """
    path = folder / LOCK
    mine: Holder = {"host": socket.gethostname(), "pid": os.getpid(), "machine": _machine(), "since": time.time()}
    try:
        descriptor = _acquire(path, mine)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}") from error
    ended = threading.Event()
    heart = threading.Thread(target=_beat, args=(path, mine, ended), name="heartbeat", daemon=True)
    try:
        heart.start()
        yield
    finally:
        ended.set()
        heart.join()
        with suppress(OSError):
            if _read(path) == mine:
                path.unlink()
        os.close(descriptor)


def _acquire(path: Path, mine: Holder) -> int:
    """Return the descriptor that holds the kernel's lock on the file, with `mine` as its record."""
    while True:
        is_new = not path.exists()
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            has_lock = _lock_of_kernel(path, descriptor)
            if not is_new:
                _refuse_held(path, has_lock)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, json.dumps(mine).encode(), 0)
            if _read(path) == mine:
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the file was removed by its holder after it was opened here


def _lock_of_kernel(path: Path, descriptor: int) -> bool:
    """Take the kernel's lock, and return whether it exists on this system and file system."""
    try:
        import fcntl  # Windows has none
    except ImportError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(_in_words(path, _read(path))) from None
    except OSError:
        return False
    return True


def _refuse_held(path: Path, has_lock_of_kernel: bool) -> None:
    holder = _read(path)
    is_decided = has_lock_of_kernel and holder.get("machine", _machine()) == _machine()
    if not is_decided and _seconds_since_heartbeat(path) < STALE_SECONDS:
        raise UserError(f"{_in_words(path, holder)}; if that process has ended, remove {path}")
    if holder:
        where = f"process {holder['pid']} on {holder['host']}"
        logging.warning(f"{path.parent} was locked by {where}, which has ended without releasing it")


def _beat(path: Path, mine: Holder, ended: threading.Event) -> None:
    while not ended.wait(HEARTBEAT_SECONDS):
        if _read(path) != mine:
            logging.warning(f"{path} was removed or taken over: does another process write this folder?")
            return
        with suppress(OSError):
            os.utime(path)


def _read(path: Path) -> Holder:
    """Return the record of a lock; {} where it is missing or incomplete, as in a lock that was just created."""
    try:
        holder = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) and {"host", "pid", "machine", "since"} <= set(holder) else {}


def _seconds_since_heartbeat(path: Path) -> float:
    """Return the age of a lock by the clock of its file system, which is one clock for all machines."""
    with tempfile.TemporaryFile(dir=path.parent, prefix=LOCK) as now:
        return max(0.0, os.fstat(now.fileno()).st_mtime - path.stat().st_mtime)


def _in_words(path: Path, holder: Holder) -> str:
    if not holder:
        return f"another command has just begun to write {path.parent}"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder["since"]))
    with suppress(OSError):
        since += f", last heartbeat {_seconds_since_heartbeat(path):.0f} s ago"
    return f"another command writes {path.parent}: process {holder['pid']} on {holder['host']}, since {since}"


def _machine() -> str:
    """Return what processes under one kernel have in common, those in different containers too."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()
