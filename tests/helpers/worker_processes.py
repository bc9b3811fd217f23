"""The processes of a comparison that run now."""

from __future__ import annotations

import psutil

SERVER = "peft_recipes.comparison.fork_server"


def workers() -> list[psutil.Process]:
    """The worker processes that this process has started, forked or not; not the server that forks them."""
    children = psutil.Process().children()
    servers = [child for child in children if SERVER in child.cmdline()]
    forked = [worker for server in servers for worker in server.children()]
    return forked + [child for child in children if "peft_recipes.comparison.worker" in child.cmdline()]
