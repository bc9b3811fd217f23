"""The processes of a comparison that run now."""

from __future__ import annotations

import contextlib

import psutil

SERVER = "peft_recipes.comparison.fork_server"


def workers() -> list[psutil.Process]:
    """The worker processes that this process has started, forked or not; not the server that forks them."""
    found = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            words = child.cmdline()
            found += child.children() if SERVER in words else []
            found += [child] if "peft_recipes.comparison.worker" in words else []
    return found
