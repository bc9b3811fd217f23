"""Handle Ctrl-C and SIGTERM: the training step ends, a checkpoint is saved, and the process exits with 130 or 143."""

from __future__ import annotations

import _weakrefset
import contextlib
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from peft_recipes.errors import Terminated

EXIT_CODES: dict[type[BaseException], int] = {KeyboardInterrupt: 130, Terminated: 143}
_AGAIN_SECONDS = 0.05  # until a signal is sent again that came at a moment when nothing can be raised
EXCEPTIONS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


class Interruption:
    """The signal that a run has received, if any.

    While `deferred`, the first signal is only recorded; every other one raises at once. silent: print nothing.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.deferred = self.silent = False

    def ignore_first_signal(self) -> None:
        """Let a first signal change nothing from here on: the run is failing already, and says why."""
        self.deferred = self.silent = True

    @contextlib.contextmanager
    def deferred_signals(self) -> Iterator[None]:
        """At the end of the block, raise KeyboardInterrupt or Terminated if a signal was deferred within it."""
        try:
            yield
        finally:
            self.deferred = self.silent  # a run that is failing keeps ignoring the first signal
        if self.received is not None:
            raise EXCEPTIONS[self.received]

    def raise_received(self) -> None:
        """Raise KeyboardInterrupt or Terminated for a signal that was recorded: there are no steps to lose here."""
        if self.received is not None:
            raise EXCEPTIONS[self.received]

    def receive(self, number: int) -> None:
        """Record a signal that any rank of the run has received."""
        if self.received is None:
            self._announce()
        self.received = signal.Signals(number)

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The signal handler of this process."""
        if _in_finaliser(frame):  # Python would print what is raised there, and go on
            threading.Timer(_AGAIN_SECONDS, os.kill, (os.getpid(), number)).start()
            return
        again, self.received = self.received is not None, signal.Signals(number)
        if again or not self.deferred:
            raise EXCEPTIONS[self.received]
        self._announce()

    def _announce(self) -> None:
        if os.environ.get("RANK", "0") == "0" and not self.silent:
            print("Ending after this step, with a checkpoint. Once more ends at once.", file=sys.stderr, flush=True)


def _in_finaliser(frame: FrameType | None) -> bool:
    """Whether a `__del__` or a callback of a weak reference is running."""
    while frame is not None:
        if frame.f_code.co_name == "__del__" or frame.f_code.co_filename in (weakref.__file__, _weakrefset.__file__):
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def interruptible(interruption: Interruption | None = None) -> Iterator[Interruption]:
    """Record SIGINT and SIGTERM within the block. interruption: where, if not in a new one."""
    interruption = interruption or Interruption()
    with _handler(interruption.handle, signal.SIGINT, signal.SIGTERM):
        yield interruption


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Let SIGTERM raise Terminated within the block."""

    def terminate(*_: Any) -> None:
        raise Terminated

    with _handler(terminate, signal.SIGTERM):
        yield


@contextlib.contextmanager
def _handler(handle: Callable[[int, Any], None], *signals: signal.Signals) -> Iterator[None]:
    """Install a signal handler within the block; outside the main thread, where Python allows none, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
