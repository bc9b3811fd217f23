"""Start the processes of a comparison, each in a session of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from peft_recipes.comparison import forking
from peft_recipes.runs.subprocesses import Process, ending_together


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
