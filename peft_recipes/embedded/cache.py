"""A cache of folders that are built once: each appears complete or not at all."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peft_recipes.errors import RecipeError

logger = logging.getLogger("peft_recipes")
_FULL, _CLOSED = {errno.ENOSPC, errno.EDQUOT}, {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}


def cache_dir() -> Path:
    """Return `$PEFT_RECIPES_CACHE` or `~/.cache/peft_recipes`. What is deleted there is built again when needed."""
    return Path(os.environ.get("PEFT_RECIPES_CACHE") or Path.home() / ".cache" / "peft_recipes").expanduser()


def version_of(*parts: Any) -> str:
    """Return ten hexadecimal digits that change when any of `parts` (JSON values) does."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]


def build_once(kind: str, name: str, build: Callable[[Path], None], message: str) -> Path:
    """Return the folder `cache_dir()/kind/name`; if it does not exist, log `message` and let `build(folder)` fill it.

    It is built under another name and renamed, so an interrupted build leaves nothing that looks complete. Of several
    processes one builds and the others wait.

    Raises:
        RecipeError: the cache folder can't be written.
    """
    folder = cache_dir() / kind / name
    if folder.is_dir():
        return folder
    unfinished = folder.with_name(f".{name}.unfinished")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _locked(folder):
            shutil.rmtree(unfinished, ignore_errors=True)  # of a killed build
            if not folder.is_dir():  # else the process that held the lock has built it
                say(message)
                unfinished.mkdir()
                try:
                    build(unfinished)
                    unfinished.rename(folder)
                finally:
                    shutil.rmtree(unfinished, ignore_errors=True)
    except OSError as error:
        if error.errno not in _FULL | _CLOSED:
            raise  # the builder's own
        raise RecipeError(
            f"Cannot write the cache folder {cache_dir()} ({error.strerror}). "
            "Make it writable or make room, or name another folder in PEFT_RECIPES_CACHE."
        ) from error
    return folder


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"Another process is making {folder.name}; waiting for it.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def say(message: str) -> None:
    """Log a message to stderr through the logger `peft_recipes`, also in a program that has not set up logging."""
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler(sys.stderr))
        logger.setLevel(logging.INFO)
    logger.info(message)


def quiet_bars() -> contextlib.AbstractContextManager:
    """Hide the progress bars of loaders where stderr is not a terminal, such as in a log file."""
    return contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
