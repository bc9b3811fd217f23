"""Processes that end with the block that started them, after a checkpoint where they write one."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Iterator
from typing import Any, Protocol

from peft_recipes.errors import Terminated

GRACE_SECONDS = 120  # for an interrupted process to finish its step and write a checkpoint


class Process(Protocol):
    """What is needed of a worker's process; subprocess.Popen has it."""

    stdin: Any
    returncode: int | None

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, number: int, /) -> None: ...

    def kill(self) -> None: ...


@contextlib.contextmanager
def ending_together() -> Iterator[list[Process]]:
    """End the processes added to the yielded list when the block is left by an error or an interruption."""
    processes: list[Process] = []
    try:
        yield processes
    except BaseException:
        interrupt(processes)
        raise
    finally:
        for process in processes:
            process.stdin.close()


def interrupt(processes: list[Process], number: int = signal.SIGINT) -> None:
    """Send a signal and wait; kill after the grace period, or at once when interrupted a second time."""
    for process in processes:
        process.send_signal(number)
    deadline = time.monotonic() + GRACE_SECONDS
    try:
        for process in processes:
            process.wait(max(deadline - time.monotonic(), 0))
    except (subprocess.TimeoutExpired, KeyboardInterrupt, Terminated):
        for process in processes:
            process.kill()
            process.wait()
