"""Things that are made once and kept: each in a folder of its own, which appears whole or not at all."""

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
    """`$PEFT_RECIPES_CACHE`, or `~/.cache/peft_recipes`. Deleting it costs nothing but the time to build again."""
    return Path(os.environ.get("PEFT_RECIPES_CACHE") or Path.home() / ".cache" / "peft_recipes").expanduser()


def version_of(*parts: Any) -> str:
    """Ten hexadecimal digits that change when any of `parts` (anything JSON can hold) does."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:10]


def build_once(kind: str, name: str, build: Callable[[Path], None], why: str) -> Path:
    """The folder `cache_dir()/kind/name`, made by `build(folder)` when it is not there yet.

    Built beside and renamed, so an interrupted build leaves nothing that looks finished; of several processes one
    builds and the others wait for it. `why` is said on stderr, because building takes a while.

    Raises:
        RecipeError: the cache folder can't be written.
    """
    folder = cache_dir() / kind / name
    if folder.is_dir():
        return folder
    from filelock import FileLock, Timeout

    with _cache_errors():
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder.parent / f".{name}.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            say(f"Another process is making {name}; waiting for it.")
            lock.acquire()
        try:
            _build(folder, build, why)
        finally:
            lock.release()
    return folder


def _build(folder: Path, build: Callable[[Path], None], why: str) -> None:
    """With the lock held: the folder may be there by now, and what a killed build left belongs to nobody."""
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    if folder.is_dir():
        return
    say(why)
    unfinished.mkdir()
    try:
        build(unfinished)
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


@contextlib.contextmanager
def _cache_errors() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL | _CLOSED:
            raise  # a builder's own
        raise RecipeError(
            f"Cannot write the cache folder {cache_dir()} ({error.strerror}). "
            "Make it writable or make room, or name another folder in PEFT_RECIPES_CACHE."
        ) from error


def say(message: str) -> None:
    """On stderr, through the logger `peft_recipes`; a program that has not set up logging hears it too."""
    if not logger.hasHandlers():
        logger.addHandler(logging.StreamHandler(sys.stderr))
        logger.setLevel(logging.INFO)
    logger.info(message)


def quiet_bars() -> contextlib.AbstractContextManager:
    """The loaders' progress bars stay out of a log: nothing on stderr where it is no terminal."""
    return contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO())
