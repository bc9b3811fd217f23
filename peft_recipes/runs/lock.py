"""The lock of a run or comparison folder: two processes never write to the same folder."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

from peft_recipes.errors import RecipeError

LOCK_FILES = (".lock", ".lock-holder")
_PROBE_SECONDS = 0.3  # `is_locked` of another process holds a free lock for a moment


def is_locked(folder: Path) -> bool:
    """Whether a process holds the lock of a folder."""
    from filelock import FileLock, Timeout

    path = folder / LOCK_FILES[0]
    if not path.exists():
        return False
    lock = FileLock(str(path))
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):  # OSError: the folder can't be written, so it is not known; nothing is claimed
        return True
    lock.release()
    return False


@contextlib.contextmanager
def locked(folder: Path, wait: bool | float = False) -> Iterator[None]:
    """Hold the lock of a folder. The system releases the lock of a process that was killed.

    wait: until the other process is done (True), or so many seconds. Raises RecipeError, which names that process.
    """
    from filelock import FileLock, Timeout

    path, holder = (folder / name for name in LOCK_FILES)
    lock = FileLock(str(path))
    try:
        lock.acquire(timeout=-1 if wait is True else wait or _PROBE_SECONDS)
    except Timeout as error:
        who = ""
        with contextlib.suppress(OSError):
            who = holder.read_text(encoding="utf-8").strip()
        raise RecipeError(
            f"{folder} is being written by another process{who and f' ({who})'}. Wait for it (--wait does), or name "
            "another --output."
        ) from error
    try:
        with contextlib.suppress(OSError):  # a full disk: the lock itself holds
            holder.write_text(f"process {os.getpid()}, since {time.strftime('%H:%M:%S')}\n", encoding="utf-8")
        yield
    finally:
        holder.unlink(missing_ok=True)
        path.unlink(missing_ok=True)  # before the release: a waiting process checks that its file still exists
        lock.release()
