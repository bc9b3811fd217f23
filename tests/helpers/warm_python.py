"""A `python` whose processes are forked from one that has imported the libraries: one starts in 0.1 s instead of 5 s.

`install` makes a small program (warm_client.py) `sys.executable`. Started as `python -m peft_recipes ...`, or as
`python --warm` with anything, it asks a server for a process that gets its arguments, folder, environment, limits and
streams; it passes signals on and ends as that process does. Started otherwise, at a terminal, or with another value of
a variable that libraries read when they are imported, it becomes the real Python.

The server is this file as a script. The first client starts it, and it ends with the tests.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import random
import resource
import runpy
import select
import signal
import socket
import sys
import tempfile
import threading
import types
from pathlib import Path
from typing import Any

import warm_client

ROOT = Path(__file__).parents[2]
REAL = sys.executable  # of a process that has not called `install`
FOLDER = "WARM_PYTHON"  # the variable with the folder that the processes of pytest share


def share() -> Path | None:
    """Give the processes of pytest that start from here one server, which ends with this process.

    Returns the folder to remove at the end, or None in a process that was started by one that shares.
    """
    if FOLDER in os.environ:
        return None
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    (folder / "owner").write_text(str(os.getpid()))
    os.environ[FOLDER] = str(folder)
    return folder


def install(folder: Path) -> None:
    """Make `sys.executable` of this process the warm Python; `folder` gets its program."""
    program = folder / "python"
    here = str(Path(__file__).parent)
    given = (REAL, os.environ[FOLDER], warm_client.fingerprint(os.environ))
    program.write_text(
        f"#!{REAL} -SE\nimport sys\n\nsys.path.insert(0, {here!r})\nimport warm_client\n\nwarm_client.main{given!r}\n"
    )
    program.chmod(0o755)
    sys.executable = str(program)


def warm(*words: str) -> list[str]:
    """The command `python WORDS`, forked although it is not `-m peft_recipes`."""
    return [sys.executable, *(["--warm"] if sys.executable != REAL else []), *words]


def import_libraries() -> None:
    """Import what most processes need. Nothing is computed, so that none begins with a thread or a tensor."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, Trainer  # noqa: F401
    from transformers.models.distilbert import modeling_distilbert  # noqa: F401
    from transformers.models.llama import modeling_llama  # noqa: F401

    import peft_recipes.adapters.check_subprocess
    import peft_recipes.cli.app
    import peft_recipes.comparison.compare
    import peft_recipes.training.run  # noqa: F401
    from peft_recipes.recipe.imports import import_module

    for name in ("sft", "dpo", "kto", "reward"):
        import_module(f"trl.trainer.{name}_trainer")


def serve(folder: Path) -> dict[str, Any]:
    """Fork a process for each request. Returns only in such a process, with its request."""
    owner = os.pidfd_open(int((folder / "owner").read_text()))
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(folder / "starting"))
    listener.listen(64)
    os.rename(folder / "starting", folder / "socket")
    poll = select.poll()
    poll.register(owner, select.POLLIN)
    poll.register(listener, select.POLLIN)
    forked: dict[int, tuple[socket.socket, int, int]] = {}  # by both descriptors: the client, the process, its pidfd
    while True:
        descriptor = poll.poll()[0][0]  # one at a time: the next may be closed with the first
        if descriptor == owner:
            for _, _, process in forked.values():
                signal.pidfd_send_signal(process, signal.SIGKILL)
            os._exit(0)
        if descriptor == listener.fileno():
            client, _ = listener.accept()
            if (request := _receive(client)) is None:
                client.close()
                continue
            if not (pid := os.fork()):
                return request
            for stream in request["streams"]:
                os.close(stream)
            process = os.pidfd_open(pid)
            for each in (client.fileno(), process):
                poll.register(each, select.POLLIN)
                forked[each] = client, pid, process
            _tell(client, pid)
            continue
        client, pid, process = forked[descriptor]
        if descriptor != process:  # its client was killed
            signal.pidfd_send_signal(process, signal.SIGKILL)
        _tell(client, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        for each in (client.fileno(), process):
            poll.unregister(each)
            del forked[each]
        os.close(process)
        client.close()


def _receive(client: socket.socket) -> dict[str, Any] | None:
    """A client's request with its three streams; None where it has ended meanwhile."""
    data, streams, _, _ = socket.recv_fds(client, 1 << 20, 3)
    while data and not data.endswith(b"\n") and (more := client.recv(1 << 20)):
        data += more
    return {**json.loads(data), "streams": streams} if data.endswith(b"\n") else None


def _tell(client: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # it was killed
        client.sendall(f"{number}\n".encode())


def become(request: dict[str, Any], path: list[str]) -> None:
    """Be the Python process that a client was started as. path: `sys.path` without what a caller adds."""
    import datasets
    import numpy
    import torch

    os.setsid()
    for number, stream in enumerate(request["streams"]):
        os.dup2(stream, number)
    os.closerange(3, 256)
    sys.stdout.reconfigure(write_through=request["unbuffered"])
    os.chdir(request["folder"])
    os.umask(request["umask"])
    for kind, limits in request["limits"].items():
        resource.setrlimit(int(kind), tuple(limits))
    threads = os.environ.get("OMP_NUM_THREADS")
    os.environ.clear()
    os.environ.update(request["environment"])
    if (wanted := os.environ.get("OMP_NUM_THREADS")) and wanted != threads:
        torch.set_num_threads(int(wanted))  # OpenMP has read the variable already
    if "HF_DATASETS_CACHE" in os.environ:
        datasets.config.HF_DATASETS_CACHE = Path(os.environ["HF_DATASETS_CACHE"])
    random.seed()
    numpy.random.seed()
    sys.executable = request["executable"]
    _run(request["arguments"], [*filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *path])


def _run(words: list[str], path: list[str]) -> None:
    """Run `-m MODULE ...`, `-c CODE ...` or `SCRIPT ...`."""
    first = words[0]
    if first == "-m":
        sys.argv, sys.path[:] = words[1:], [os.getcwd(), *path]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv, sys.path[:] = ["-c", *words[2:]], ["", *path]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(words[1], "<string>", "exec"), vars(main))
    else:
        sys.argv, sys.path[:] = words, [os.path.dirname(os.path.abspath(first)), *path]
        runpy.run_path(first, run_name="__main__")


def main() -> None:
    """The server, and each process that is forked from it."""
    path = [each for each in sys.path[1:] if each != str(ROOT)]
    sys.path[0] = str(ROOT)
    from peft_recipes.distributed.quiet import quiet_libraries

    quiet_libraries()
    with contextlib.redirect_stdout(sys.stderr):
        import_libraries()
    sys.path[0] = ""
    gc.collect()
    gc.freeze()
    request = serve(Path(os.environ[FOLDER]))
    try:
        become(request, path)
    except SystemExit as end:
        if not isinstance(end.code, int | None):
            raise
        leave(end.code or 0)
    leave(0)


def leave(code: int) -> None:
    """Exit as Python does, but without taking all modules apart, for which a process copies their memory: 0.3 s."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
