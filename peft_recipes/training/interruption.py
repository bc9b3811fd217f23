"""Ctrl-C and SIGTERM: a training step ends, a checkpoint is written, and the process ends with 130 or 143."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from peft_recipes.errors import Terminated

EXIT_CODES: dict[type[BaseException], int] = {KeyboardInterrupt: 130, Terminated: 143}
_RAISED = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


class Interruption:
    """Whether a signal has asked for the end. While `deferred` the first one only asks; any other ends at once."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.deferred = self.silent = False

    def shield(self) -> None:
        """From here on a first signal changes nothing: the run ends anyhow, and says why."""
        self.deferred = self.silent = True

    @contextlib.contextmanager
    def heeded_after(self) -> Iterator[None]:
        """At its end whatever was deferred within it is heeded."""
        try:
            yield
        finally:
            self.deferred = False
        self.heed()

    def ask(self, number: int) -> None:
        """Asks for the end as that signal does: it was another process of the run that got it."""
        if self.asked is None:
            self._say()
        self.asked = signal.Signals(number)

    def heed(self) -> None:
        """Raises KeyboardInterrupt or Terminated where a signal has asked for the end."""
        if self.asked is not None:
            raise _RAISED[self.asked]

    def _handle(self, number: int, _: Any) -> None:
        again, self.asked = self.asked is not None, signal.Signals(number)
        if again or not self.deferred:
            raise _RAISED[self.asked]
        self._say()

    def _say(self) -> None:
        if os.environ.get("RANK", "0") == "0" and not self.silent:  # of several processes, the main one
            print("Ending after this step, with a checkpoint. Once more ends at once.", file=sys.stderr, flush=True)


@contextlib.contextmanager
def interruptible() -> Iterator[Interruption]:
    """Takes SIGINT and SIGTERM for as long as it is open; in a thread other than the main one it leaves them alone."""
    found = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield found
        return
    before = {number: signal.signal(number, found._handle) for number in _RAISED}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Within it SIGTERM raises Terminated (in the main thread; elsewhere nothing changes)."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(*_: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
