"""The process of one run: `python -m peft_recipes.comparison.worker RECIPE ARM SEED OUTPUT [DATA] [--pause-at=STEP]`.

pool.py starts it, once for each run of a comparison; under `--launch`, Accelerate starts it once for each rank. The run
is trained here, by `training.run.train`; the comparison's process only reads the files that it writes.

Where the arms take turns, `python -m peft_recipes.comparison.worker --orders ANSWERS` trains one chunk after another:
it reads each order as a line of JSON on its stdin and appends a line to the file ANSWERS when it is done. It imports
the libraries once, and keeps the untrained base and the data (training/kept.py). An error ends it, so that the next
order gets a process without a trace of the failed run.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import signal
import stat
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from peft_recipes.distributed.processes import OtherRankFailed
from peft_recipes.distributed.quiet import quiet_libraries, skip_bitsandbytes
from peft_recipes.errors import RecipeError
from peft_recipes.models.quantisation import OPTIMIZERS
from peft_recipes.recipe.serialization import read_yaml
from peft_recipes.training.interruption import EXIT_CODES

PAUSE_AT, ORDERS = "--pause-at=", "--orders"


def work(
    recipe_file: str, arm: str, seed: int, output: str, data: str | None = None, pause_at: int | None = None
) -> int:
    """Train one run; return the exit code: 0 done or paused, 1 failed (see run.json), 2 an error in the recipe.

    data: the folder of the data prepared by the comparison; without it the run prepares its own. pause_at: the step
    after which the run pauses.
    """
    quiet_libraries()
    if not needs_bitsandbytes(Path(recipe_file), arm):
        skip_bitsandbytes()
    from peft_recipes.runs.files import make_folder, write_json
    from peft_recipes.runs.folder import RUN_FILE, read_run, resolved_recipe, run_folder
    from peft_recipes.runs.lock import locked
    from peft_recipes.training.run import train

    recipe = resolved_recipe(Path(recipe_file))
    try:
        # wait: a worker of an interrupted comparison may still be writing its last checkpoint.
        train(recipe, arm, seed=seed, output=output, resume=True, data=data, wait=True, pause_at=pause_at)
        return 0
    except RecipeError as error:
        folder = run_folder(Path(output), recipe, arm, seed)
        make_folder(folder)
        failure = {"schema": 1, "status": "failed", "error": str(error)}
        with locked(folder, wait=True):
            run = read_run(folder)
            if run is None or not run.ok:  # another process may have finished a run meanwhile
                write_json(folder / RUN_FILE, {**failure, "recipe": recipe.name, "arm": arm, "seed": seed})
        print(error, file=sys.stderr)
        return 2
    except OtherRankFailed:  # the rank that failed reports the error
        return 0
    except tuple(EXIT_CODES) as error:
        return EXIT_CODES[type(error)]


def needs_bitsandbytes(recipe_file: Path, arm: str) -> bool:
    """Whether the run has a quantised base or an 8-bit optimizer; read from plain YAML, since a Recipe imports PEFT."""
    recipe = read_yaml(recipe_file) or {}
    arms = recipe.get("arms") or {}
    options = arms.get(arm) or {}
    if arm not in arms and any((each or {}).get("quantise") for each in arms.values()):
        return True  # the untrained base, which may be stored quantised
    optim = str(options.get("optim") or (recipe.get("training") or {}).get("optim") or "")
    return bool(options.get("quantise")) or any(mark in optim for mark in OPTIMIZERS)


def serve(answers: str) -> int:
    """Train what the lines on stdin order until it is closed or a run ends with an error; return its exit code."""
    quiet_libraries()
    skip_bitsandbytes()  # a run that needs it gets a process of its own
    from peft_recipes.comparison.fork_server import import_libraries
    from peft_recipes.training import kept

    import_libraries()
    gc.collect()
    gc.freeze()  # each run makes several collections: half a second each with all that the libraries have
    orders: queue.Queue[dict[str, Any] | None] = queue.Queue()
    working, closed = threading.Event(), threading.Event()
    threading.Thread(target=_read_orders, args=(orders, working, closed), daemon=True).start()
    code = 0
    while code == 0 and (order := orders.get()) is not None:
        working.set()
        if closed.is_set():  # the comparison's process has ended while this one imported
            break
        _log_to(order["log"])
        kept.keep(order["memory_bytes"])
        try:
            code = work(*(order[name] for name in ("recipe_file", "arm", "seed", "output", "data", "pause_at")))
        except Exception:
            traceback.print_exc()
            code = 1
        kept.release()
        with open(answers, "a", encoding="utf-8") as file:
            file.write(json.dumps({"number": order["number"], "code": code}) + "\n")
        working.clear()
    return code


def _read_orders(orders: queue.Queue[dict[str, Any] | None], working: threading.Event, closed: threading.Event) -> None:
    """Put each line on stdin into the queue. When it is closed, end: a run in progress as SIGTERM does."""
    rest = b""
    while part := os.read(0, 2**16):  # not sys.stdin: this thread would hold its lock when Python exits
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            orders.put(json.loads(line))
    closed.set()  # before `working` is asked, as the other side sets `working` before it asks
    orders.put(None)
    if working.is_set():
        os.kill(os.getpid(), signal.SIGTERM)


def _log_to(log: str) -> None:
    """Let this process's output go to a run's log."""
    sys.stdout.flush()
    sys.stderr.flush()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.close(file)


def end_with_parent() -> None:
    """Send this process SIGTERM when its stdin is closed, which happens when the comparison's process ends."""

    def watch() -> None:
        while os.read(0, 1):  # not sys.stdin: this thread would hold its lock when Python exits
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=watch, daemon=True).start()


def main(words: list[str]) -> int:
    """Do what the command line says."""
    if words[0] == ORDERS:
        try:
            return serve(words[1])
        except KeyboardInterrupt:  # between two runs
            return EXIT_CODES[KeyboardInterrupt]
    end_with_parent()
    pauses = [word for word in words if word.startswith(PAUSE_AT)]
    recipe_file, arm, seed, output, *data = [word for word in words if word not in pauses]
    pause_at = int(pauses[0].removeprefix(PAUSE_AT)) if pauses else None
    return work(recipe_file, arm, int(seed), output, data[0] if data else None, pause_at)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
