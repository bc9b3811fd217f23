"""The processes of a comparison: those that run now, and what an executor reports of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import psutil

SERVER = "peft_recipes.comparison.fork_server"


def workers() -> list[psutil.Process]:
    """The worker processes that this process has started, forked or not; not the server that forks them."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            words = child.cmdline()
            forked = child.children() if SERVER in words else []  # warm_python.py starts its server so
            found += [each for each in forked if not any("warm_python" in word for word in each.cmdline())]
            found += [child] if "peft_recipes.comparison.worker" in words else []
    return found


def all_ended(executor: Any) -> Iterator[Any]:
    """What an executor or a pool yields as its processes end, without the None while none does."""
    return (one for one in executor.finished() if one is not None)
