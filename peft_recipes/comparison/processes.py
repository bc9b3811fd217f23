"""Start the processes of a comparison, each in a session of its own, and end them together."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from peft_recipes.comparison import forking
from peft_recipes.errors import Terminated

GRACE_SECONDS = 120  # for an interrupted worker to finish its step and write a checkpoint


class Process(Protocol):
    """What a comparison needs of a worker's process; subprocess.Popen has it."""

    stdin: Any
    returncode: int | None

    def poll(self) -> int | None: ...

    def wait(self, timeout: float | None = None) -> int: ...

    def send_signal(self, number: int, /) -> None: ...

    def kill(self) -> None: ...


def start(command: Sequence[str], log: Path, environment: Mapping[str, str] = {}, *, fork: bool = False) -> Process:
    """Start a command, its output appended to `log`. It has to end itself when its stdin closes.

    environment: variables in addition to this process's. fork: the command is `python -m MODULE ...` and does not need
    bitsandbytes: it is forked from a process that has imported the libraries, where that is possible.
    """
    variables = {**os.environ, **environment}
    if fork and forking.can_fork():
        with contextlib.suppress(OSError, ValueError):  # the server was killed: the command starts without it as well
            return forking.prepare().start(command[2], command[3:], log, variables)
    with log.open("ab") as output:
        pipes = {"stdin": subprocess.PIPE, "stdout": output, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, **pipes, start_new_session=True, env=variables)


def run_to_end(command: Sequence[str], *, fork: bool = False) -> tuple[int, list[str]]:
    """Start a command and wait for it; return its exit code and the lines of its output."""
    with tempfile.TemporaryDirectory() as folder, ending_together() as processes:
        log = Path(folder) / "log.txt"
        processes.append(start(command, log, fork=fork))
        code = processes[0].wait()
        return code, log.read_text(encoding="utf-8", errors="replace").splitlines()


@contextlib.contextmanager
def ending_together() -> Iterator[list[Process]]:
    """End the processes added to the yielded list when the block is left by an error or an interruption."""
    processes: list[Process] = []
    try:
        yield processes
    except BaseException:
        _interrupt(processes)
        raise
    finally:
        for process in processes:
            process.stdin.close()


def _interrupt(processes: list[Process]) -> None:
    """Send SIGINT and wait; kill after the grace period, or at once when interrupted a second time."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + GRACE_SECONDS
    try:
        for process in processes:
            process.wait(max(deadline - time.monotonic(), 0))
    except (subprocess.TimeoutExpired, KeyboardInterrupt, Terminated):
        for process in processes:
            process.kill()
            process.wait()
