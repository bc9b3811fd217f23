"""A process that has imported the libraries and forks the workers of a comparison: one starts in 0.1 s instead of 4 s.

`python -m peft_recipes.comparison.fork_server`; forking.py starts it and sends it requests, a JSON line each, on its
stdin; it answers each with one line on its stdout. It imports and computes nothing else, so a worker begins as a fresh
process does: without a tensor, a thread or a device.

Not `multiprocessing`'s own fork server: that imports the caller's main module in every worker, and a script that calls
`compare` would call it again there.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import runpy
import sys
from typing import Any

from peft_recipes.distributed.quiet import quiet_libraries, skip_bitsandbytes
from peft_recipes.recipe.imports import import_module

_stdins: dict[int, int] = {}  # of each worker, by its process id: our end of the pipe, whose closing ends the worker


def import_libraries() -> None:
    """Import what every run needs."""
    import datasets  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import pandas  # noqa: F401
    import peft  # noqa: F401
    import scipy.stats  # noqa: F401
    import sklearn.metrics  # noqa: F401
    from transformers import Trainer  # noqa: F401

    import peft_recipes.training.run  # noqa: F401

    import_module("trl.trainer.sft_trainer")


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Answer a request of forking.py: to `start` a worker, to `poll` one, to `write` to its stdin or to `close` it.

    In the worker itself, `start` raises SystemExit once the worker is done.
    """
    if "start" in request:
        return {"pid": _fork(request)}
    if "write" in request:
        try:
            os.write(_stdins[request["write"]], request["text"].encode())
            return {}
        except (OSError, KeyError) as error:
            return {"error": str(error)}
    if "close" in request:
        if (stdin := _stdins.pop(request["close"], None)) is not None:
            os.close(stdin)
        return {}
    pid, status = os.waitpid(request["poll"], os.WNOHANG)
    return {"code": os.waitstatus_to_exitcode(status) if pid else None}


def _fork(request: dict[str, Any]) -> int:
    read, write = os.pipe()
    if pid := os.fork():
        os.close(read)
        _stdins[pid] = write
        return pid
    os.setsid()
    for descriptor in (write, *_stdins.values()):  # another worker's stdin would stay open with this process
        os.close(descriptor)
    _work(request, read)
    raise SystemExit(0)


def _work(request: dict[str, Any], stdin: int) -> None:
    """Be `python -m MODULE ARGUMENTS`: its folder, environment, stdin and log."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for descriptor, number in ((stdin, 0), (log, 1), (log, 2)):
        os.dup2(descriptor, number)
    os.close(stdin)
    os.close(log)
    os.chdir(request["folder"])
    loaded = os.environ.get("OMP_NUM_THREADS")
    os.environ.clear()
    os.environ.update(request["environment"])
    if (threads := os.environ.get("OMP_NUM_THREADS")) != loaded:
        import torch

        torch.set_num_threads(int(threads))  # OpenMP read the variable when it was loaded; a slot of --jobs has its own
    sys.path[0] = request["folder"]
    sys.argv = [request["start"], *request["arguments"]]
    runpy.run_module(request["start"], run_name="__main__", alter_sys=True)


def serve() -> None:
    """Answer requests until stdin is closed, which closes the workers' stdin as well."""
    quiet_libraries()
    skip_bitsandbytes()
    with contextlib.redirect_stdout(sys.stderr):  # transformers prints a line where WANDB_MODE is offline
        import_libraries()
    gc.collect()
    gc.freeze()  # the pages of what was imported stay shared
    while line := sys.stdin.buffer.readline():
        request = json.loads(line)
        print(json.dumps({**answer(request), "number": request["number"]}), flush=True)


if __name__ == "__main__":
    serve()
