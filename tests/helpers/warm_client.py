"""The program that warm_python.py makes `sys.executable`. It imports little, since it is started for each process."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Mapping

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
# Variables that libraries read when they are imported, by their first letters, and those of them that change nothing.
READ_AT_IMPORT = ("HF_", "HUGGING", "TRANSFORMERS_", "DATASETS_", "TORCH", "PYTORCH", "CUDA", "LD_", "MPL", "PYTHON",
                  "BNB_", "USE_", "WANDB_", "MLFLOW_", "TRACKIO_", "TENSORBOARD_", "MKL_", "HOME")  # fmt: skip
LEFT_OUT = ("TRANSFORMERS_VERBOSITY", "HF_HUB_VERBOSITY", "HF_DATASETS_DISABLE_PROGRESS_BARS", "HF_HUB_DISABLE_",
            "HF_XET_", "MLFLOW_HTTP_", "PYTHONBREAKPOINT", "TORCH_CPP_LOG_LEVEL", "TORCH_NCCL_", "TORCHELASTIC_",
            "TORCHINDUCTOR_CACHE_DIR")  # fmt: skip
MODULES = ("peft_recipes", "accelerate.commands.launch", "timeit")  # what `-m` is given, by its first letters
SCRIPTS = ("distributed_runs.py", "llama_cpp_scripts.py")
FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)
LIMITS = (resource.RLIMIT_AS, resource.RLIMIT_DATA, resource.RLIMIT_FSIZE)
SECONDS = 120  # for the server to import the libraries


def fingerprint(environment: Mapping[str, str]) -> str:
    """What decides whether the server's libraries are those that a process with this environment would import."""
    found = {name: value for name, value in environment.items()
             if name.startswith(READ_AT_IMPORT) and not name.startswith(LEFT_OUT)}  # fmt: skip
    path = [each for each in found.pop("PYTHONPATH", "").split(os.pathsep) if os.path.isdir(f"{each}/peft_recipes")]
    path = [each for each in path if each != ROOT]
    return hashlib.sha256(json.dumps([path, sorted(found.items())]).encode()).hexdigest()


def is_warm(words: list[str], folder: str) -> bool:
    """Whether a process with these arguments is forked."""
    limited = any(resource.getrlimit(kind)[1] != resource.RLIM_INFINITY for kind in LIMITS)
    if (limited and not os.path.exists(os.path.join(folder, "socket"))) or any(map(os.isatty, (0, 1, 2))):
        return False  # a server that it started would be limited, too
    module = words[:1] == ["-m"] and words[1].startswith(MODULES)
    return module or os.path.basename(words[0] if words else "") in SCRIPTS


def main(real: str, folder: str, expected: str) -> None:
    """Be the process that was asked for: forked from the server, or the real Python."""
    words = sys.argv[1:]
    forced, unbuffered = words[:1] == ["--warm"], "-u" in words[:1] or "PYTHONUNBUFFERED" in os.environ
    if words[:1] in (["--warm"], ["-u"]):
        words = words[1:]
    if not (forced or is_warm(words, folder)) or fingerprint(os.environ) != expected:
        os.execv(real, [real, *(["-u"] if unbuffered else []), *words])
    process = Forwarding()
    umask = os.umask(0)
    os.umask(umask)
    request = {"arguments": words, "unbuffered": unbuffered, "folder": os.getcwd(), "environment": dict(os.environ),
               "umask": umask, "limits": {kind: resource.getrlimit(kind) for kind in LIMITS},
               "executable": sys.argv[0]}  # fmt: skip
    server = connect(real, folder)
    data = json.dumps(request).encode() + b"\n"
    server.sendall(data[socket.send_fds(server, [data], [0, 1, 2]) :])
    nothing = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nothing, stream)  # a pipe ends when the process itself closes it
    answers = server.makefile()
    process.started(int(answers.readline()))
    end_with(int(answers.readline()))


class Forwarding:
    """Passes signals on to the process, from its start."""

    def __init__(self) -> None:
        self.pid, self.waiting = 0, []
        for number in FORWARDED:
            signal.signal(number, self.forward)

    def forward(self, number: int, _frame: object = None) -> None:
        if not self.pid:
            self.waiting.append(number)
            return
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def started(self, pid: int) -> None:
        self.pid = pid
        for number in self.waiting:
            self.forward(number)


def connect(real: str, folder: str) -> socket.socket:
    """Connect to the server, which is started if there is none."""
    deadline = time.monotonic() + SECONDS
    server = socket.socket(socket.AF_UNIX)
    while True:
        try:
            server.connect(os.path.join(folder, "socket"))
            return server
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
            if time.monotonic() > deadline:
                raise SystemExit(f"warm_python.py does not answer; see {folder}/log.txt") from None
        start_server(real, folder)
        time.sleep(0.02)


def start_server(real: str, folder: str) -> None:
    """Start the server, unless another client has."""
    try:
        started = os.open(os.path.join(folder, "started"), os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return
    if pid := os.fork():
        os.write(started, str(pid).encode())
        os.close(started)
        return
    os.setsid()
    for number in FORWARDED:
        signal.signal(number, signal.SIG_DFL)
    log = os.open(os.path.join(folder, "log.txt"), os.O_CREAT | os.O_WRONLY, 0o666)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, number in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, number)
    os.closerange(3, 256)
    os.chdir("/")
    os.execv(real, [real, os.path.join(HERE, "warm_python.py")])


def end_with(code: int) -> None:
    """End as the process did: with its exit code, or by its signal."""
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        with contextlib.suppress(OSError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)
