"""Processes forked from one that has imported the libraries (fork_server.py), as the comparison sees them.

Forking needs Linux. It is left out where a GPU is, since a process that has touched CUDA can't be forked.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_POLL_SECONDS = 0.02
_LOST = -15  # what a worker's end is called when its server is gone, whose end ends it by SIGTERM
_PLACE = {"PWD", "OLDPWD", "SHLVL", "_", "PYTEST_CURRENT_TEST"}  # environment variables that change nothing imported

_server: _ForkServer | None = None


def can_fork() -> bool:
    """Whether workers are forked on this machine."""
    if sys.platform != "linux":
        return False
    import torch

    return not torch.cuda.is_available()


def prepare() -> _ForkServer:
    """Start the server if none runs with this process's environment; it imports while this process goes on."""
    global _server
    environment = {name: value for name, value in os.environ.items() if name not in _PLACE}
    environment["PYTHON"] = sys.executable
    if _server is not None and (_server.environment != environment or _server.process.poll() is not None):
        _server.leave()
        _server = None
    if _server is None:
        _server = _ForkServer(environment)
        atexit.register(_server.process.terminate)
    return _server


class _ForkServer:
    """A running fork_server.py."""

    def __init__(self, environment: dict[str, str]):
        self.environment, self._lock, self._number = environment, threading.Lock(), 0
        self._forked: list[_ForkedProcess] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "peft_recipes.comparison.fork_server"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def start(self, module: str, arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> _ForkedProcess:
        """Fork a process that is `python -m MODULE ARGUMENTS`."""
        log.touch()  # the process may be killed before it opens it
        request = {"start": module, "arguments": list(arguments), "log": str(log.resolve()), "folder": os.getcwd()}
        try:
            forked = _ForkedProcess(self, self.ask({**request, "environment": dict(environment)})["pid"])
            self._forked.append(forked)
            return forked
        except BaseException:
            self.process.terminate()  # it may have forked a process that nobody knows of, which ends with it
            raise

    def leave(self) -> None:
        """End the server, unless it has processes that still run."""
        if all(forked.poll() is not None for forked in self._forked):
            self.process.terminate()
            self.process.wait()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Send a request and return its answer. Raises OSError or ValueError where the server is gone."""
        with self._lock:
            self._number += 1
            self.process.stdin.write(json.dumps({**request, "number": self._number}).encode() + b"\n")
            self.process.stdin.flush()
            while (answer := json.loads(self.process.stdout.readline()))["number"] != self._number:
                pass  # the answer to a request during which Ctrl-C was pressed
            return answer


class _ForkedProcess:
    """A worker that a server forked; it has what is used here of subprocess.Popen."""

    def __init__(self, server: _ForkServer, pid: int):
        self.pid, self.returncode, self._server = pid, None, server
        self.stdin = self

    def poll(self) -> int | None:
        if self.returncode is None:
            try:
                self.returncode = self._server.ask({"poll": self.pid})["code"]
            except (OSError, ValueError):
                self.returncode = _LOST
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        until = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if until is not None and time.monotonic() >= until:
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout or 0.0)
            time.sleep(_POLL_SECONDS)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(9)

    def write(self, text: bytes) -> None:
        """Write to the worker's stdin. Raises OSError where it has ended."""
        with contextlib.suppress(ValueError):  # the server is gone, and the worker with it
            if self._server.ask({"write": self.pid, "text": text.decode()}).get("error"):
                raise BrokenPipeError(f"process {self.pid} has ended")

    def flush(self) -> None:
        """There is no buffer."""

    def close(self) -> None:
        """Close the worker's stdin, as `Popen.stdin.close` does."""
        with contextlib.suppress(OSError, ValueError):
            self._server.ask({"close": self.pid})
