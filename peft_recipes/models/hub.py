"""Checks once whether the Hub can be reached: its client would retry for a minute before it gives up."""

from __future__ import annotations

import functools
import os
import socket
import sys
from urllib.parse import urlsplit

from peft_recipes.errors import causes

_TIMEOUT = 5.0  # seconds


@functools.cache
def offline_if_unreachable() -> None:
    """Switch the Hub's clients to their caches if no connection to the Hub can be opened.

    Tries nothing behind a proxy or if offline mode is already set.
    """
    from huggingface_hub import constants

    proxied = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    if constants.is_offline_mode() or proxied:
        return
    endpoint = urlsplit(constants.ENDPOINT)
    port = endpoint.port or (443 if endpoint.scheme == "https" else 80)
    try:
        socket.create_connection((endpoint.hostname or "", port), _TIMEOUT).close()
    except OSError:
        work_offline()


def work_offline() -> None:
    """Let the Hub's clients use only their caches, in this process and in those it starts."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True


def error_chain(error: BaseException) -> tuple[list[BaseException], set[str], int]:
    """Return an exception with its causes, the class names of all of them (bases included) and the HTTP status.

    The status is 0 if the Hub did not answer.
    """
    chain = list(causes(error))
    class_names = {cls.__name__ for link in chain for cls in type(link).__mro__}
    statuses = (getattr(getattr(link, "response", None), "status_code", None) for link in chain)
    return chain, class_names, next((status for status in statuses if status), 0)
