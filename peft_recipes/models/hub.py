"""Whether the Hub can be reached, asked once: its client waits through retries, a minute in all, before it says no."""

from __future__ import annotations

import functools
import os
import socket
import sys
from urllib.parse import urlsplit

_SECONDS = 5.0


@functools.cache
def offline_if_unreachable() -> None:
    """Where nothing answers at the Hub's address, its clients work offline from here on: from their caches, at once.

    Behind a proxy, or where offline work is asked for already, nothing is tried.
    """
    from huggingface_hub import constants

    proxied = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    if constants.is_offline_mode() or proxied:
        return
    address = urlsplit(constants.ENDPOINT)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname or "", port), _SECONDS).close()
    except OSError:
        work_offline()


def work_offline() -> None:
    """The Hub's clients work from their caches alone, in this process and in those that it starts."""
    from huggingface_hub import constants

    constants.HF_HUB_OFFLINE = True
    os.environ["HF_HUB_OFFLINE"] = "1"
    if "datasets" in sys.modules:
        sys.modules["datasets"].config.HF_HUB_OFFLINE = True


def behind(error: BaseException) -> tuple[list[BaseException], set[str], int]:
    """What lies behind an exception of the Hub's clients: it and its causes, the names of all their classes (and of
    these classes' bases), and the status that the Hub answered with (0: it did not)."""
    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    kinds = {kind.__name__ for one in chain for kind in type(one).__mro__}
    answers = (getattr(getattr(one, "response", None), "status_code", None) for one in chain)
    return chain, kinds, next((status for status in answers if status), 0)
