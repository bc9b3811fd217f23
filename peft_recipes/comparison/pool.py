"""Start the processes of a comparison, follow their logs and record how they ended.

Everything here runs in the process that called `compare`. It starts one worker process (worker.py) for each run, and
after the runs one process that reloads the trained adapters (adapters/check_process.py). It reads what they write to
their run folders; nothing is trained or loaded here. No worker outlives this process.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_recipes.adapters.check_subprocess import TRUSTED, any_quantised
from peft_recipes.comparison.processes import GRACE_SECONDS, ending_together, run_to_end, start
from peft_recipes.comparison.worker import needs_bitsandbytes
from peft_recipes.distributed.launch import Launch
from peft_recipes.errors import says_out_of_memory
from peft_recipes.guards.runner import NOT_RUN
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.checkpoints import FOLDER as CHECKPOINTS
from peft_recipes.runs.checkpoints import other_note
from peft_recipes.runs.files import clear, make_folder, write_json
from peft_recipes.runs.folder import RUN_FILE, Run, read_run, run_folder
from peft_recipes.runs.lock import LOCK_FILES, locked

Job = tuple[str, int]  # arm, seed

_SILENT_SECONDS = 120  # without a new log line, after which a worker is reported as silent


@dataclass(frozen=True)
class Progress:
    """The state of one run of a comparison, as passed to `on_progress`."""

    job: Job
    number: int
    jobs: int
    state: str  # "running", "ok", "failed", "out-of-memory", "kept"
    step: int = 0
    steps: int = 0
    stage: str = ""
    silent_seconds: int = 0  # since its last log line, once that is long ago
    error: str = ""
    note: str = ""  # for the user, whatever the state


@dataclass(frozen=True)
class Order:
    """One run to be trained in a process of its own; under a launch, in several.

    yaml: the resolved recipe. number: of the `jobs` of the comparison. data: the folder of the comparison's prepared
    data. overwrite: ignore the checkpoints of an earlier run. signature: of the run to be trained, if known. finished:
    whether the folder holds this run, finished; called again once the folder is locked.
    """

    output: Path
    recipe: Recipe
    job: Job
    yaml: Path
    number: int = 1
    jobs: int = 1
    on_progress: Callable[[Progress], None] | None = None
    data: Path | None = None
    overwrite: bool = False
    launch: Launch | None = None
    signature: str = ""
    finished: Callable[[], bool] | None = None

    @property
    def folder(self) -> Path:
        return run_folder(self.output, self.recipe, *self.job)

    def report(self, state: str, **details: Any) -> None:
        """Pass the run's state to `on_progress`."""
        if self.on_progress is not None:
            self.on_progress(Progress(self.job, self.number, self.jobs, state, **details))


def run_in_fresh_processes(orders: Sequence[Order], slots: Sequence[dict[str, str]] = ({},)) -> None:
    """Train each run in a process of its own; return when all have ended.

    A fresh process makes a run's peak memory its own, and confines a crash to that run. As many run at a time as there
    are slots; a slot is the environment variables that its processes get in addition.
    """
    waiting, free, working = list(orders), list(slots), []
    with ending_together() as processes:
        while waiting or working:
            while waiting and free:
                worker = _Worker(waiting.pop(0), free.pop(0))
                working.append(worker)
                processes.append(worker.process)
            time.sleep(0.1)
            for worker in [worker for worker in working if worker.has_ended()]:
                working.remove(worker)
                free.append(worker.slot)
                worker.conclude()


class _Worker:
    """The worker process of one run, as seen from the comparison's process."""

    def __init__(self, order: Order, slot: dict[str, str]):
        self.order, self.slot, self.folder = order, slot, order.folder
        self._clear_folder()
        order.report("running")
        (self.folder / "log.txt").unlink(missing_ok=True)
        # In a session of its own, so that Ctrl-C reaches the comparison alone, which then interrupts the worker once.
        # The stdin pipe closes when the comparison's process is killed: the worker (each rank) then ends itself.
        self.process = start(self._command(), self.folder / "log.txt", slot, fork=self._can_fork())
        self._last_line, self._changed, self._position = b"", time.monotonic(), {}

    def _clear_folder(self) -> None:
        make_folder(self.folder)
        # wait: the worker of a comparison that was killed may still be writing its last checkpoint.
        order = self.order
        with locked(self.folder, wait=GRACE_SECONDS):
            if order.overwrite:
                clear(self.folder, keep=LOCK_FILES)
            elif order.finished is not None and order.finished():
                return  # by that other process; the worker returns it as it is
            (self.folder / RUN_FILE).unlink(missing_ok=True)
            if order.signature and (lost := other_note(self.folder / CHECKPOINTS, order.signature)):
                order.report("running", note=lost)
            if not (self.folder / CHECKPOINTS).is_dir():
                (self.folder / "log.jsonl").unlink(missing_ok=True)

    def _command(self) -> list[str]:
        order, module = self.order, "peft_recipes.comparison.worker"
        arm, seed = order.job
        arguments = [str(order.yaml), arm, str(seed), str(order.output), *([str(order.data)] if order.data else [])]
        return order.launch.command(module, *arguments) if order.launch else [sys.executable, "-m", module, *arguments]

    def _can_fork(self) -> bool:
        return self.order.launch is None and not needs_bitsandbytes(self.order.yaml, self.order.job[0])

    def has_ended(self) -> bool:
        """Whether the process has ended; reports the run's progress if not."""
        if self.process.poll() is not None:
            return True
        line = _last_line(self.folder / "log.jsonl")
        if line not in (b"", self._last_line):
            self._last_line, self._changed = line, time.monotonic()
            with contextlib.suppress(ValueError):  # the log was cut off by a full disk
                entry = json.loads(line)
                self._position = {
                    "step": entry.get("step", 0),
                    "steps": entry.get("of", 0),
                    "stage": entry.get("stage", "train"),
                }
                self.order.report("running", **self._position)
        elif (silence := int(time.monotonic() - self._changed)) >= _SILENT_SECONDS:
            self.order.report("running", **self._position, silent_seconds=silence)
        return False

    def conclude(self) -> None:
        """Report how the run ended. A worker that died without a run.json gets one with the reason.

        One that died after its run was stored leaves the figures, and its missing checks get the reason.
        """
        self.process.stdin.close()
        run, code = read_run(self.folder), self.process.returncode
        if run is None:
            failure = _failure(code, self.folder / "log.txt")
            arm, seed = self.order.job
            run = Run(self.folder, {**failure, "recipe": self.order.recipe.name, "arm": arm, "seed": seed})
            write_json(self.folder / RUN_FILE, run.data)
        elif run.ok and code and _explain_missing_checks(run, _failure(code, self.folder / "log.txt")["error"]):
            write_json(self.folder / RUN_FILE, run.data)
        failed = "; ".join(f"check {name}: {words}" for name, words in run.failed_checks.items())
        self.order.report(run.data["status"], error=run.data.get("error") or failed)


def _explain_missing_checks(run: Run, reason: str) -> bool:
    """Give the reason for the checks that a run's process did not come to; return whether there are any."""
    checks = run.data.get("checks") or {}
    missing = [name for name, result in checks.items() if str(result).startswith(NOT_RUN)]
    checks.update({name: {"error": f"{NOT_RUN}: {reason}"} for name in missing})
    return bool(missing)


def check_in_fresh_process(runs: list[Run], trust_remote_code: bool) -> None:
    """Reload the adapters of these runs in one other process; write the result to each run.json.

    An adapter that does not give the same outputs there gets a failed check; its run's figures are kept. The check at
    the end of training reloads an adapter in the process that trained it, which can't notice what exists in that
    process alone. Where the checking process is killed or runs out of memory, the check is "not run", and the next call
    of the comparison makes it.
    """
    if not runs:
        return
    module, words = "peft_recipes.adapters.check_subprocess", [str(run.folder.resolve()) for run in runs]
    command = [sys.executable, "-m", module, *words, *([TRUSTED] if trust_remote_code else [])]
    code, lines = run_to_end(command, fork=not any_quantised(words))
    found = [line for line in lines if line.startswith("{")]
    rows = {row["folder"]: row for row in map(json.loads, found)}
    other = " ".join(line for line in lines if line not in found)
    reason = " ".join(other.split())[-300:] or f"exit code {code}"
    ended = {"error": None, "not_run": f"the checking process ended early: {reason}"}
    for run in runs:
        row = rows.get(str(run.folder.resolve()), ended)
        result: Any = row["error"] is None
        if row["not_run"]:
            result = f"{NOT_RUN}: {row['not_run']}"
        elif row["error"] is not None:
            result = {"error": f"In a fresh process its adapter is not as trained: {row['error']}"}
        run.data["checks"]["fresh-process"] = result
        write_json(run.folder / RUN_FILE, run.data)


def _last_line(path: Path) -> bytes:
    """The last complete line of a log that is being written; empty if there is none."""
    try:
        with path.open("rb") as log:
            log.seek(max(os.fstat(log.fileno()).st_size - 65_536, 0))
            return log.read().rpartition(b"\n")[0].rpartition(b"\n")[2]
    except OSError:
        return b""


_ERROR = re.compile(r"(\[rank\d+\]: )?(\w+\.)*\w*(Error|Exception|Killed)\b.*:")


def _failure(code: int, log: Path) -> dict[str, Any]:
    """The run.json of a worker that wrote none, from its exit code and its output."""
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    # A launcher's own report of its ranks comes last; the error of the run is further up.
    errors = [line for line in lines if _ERROR.match(line) and "ChildFailedError" not in line]
    message = next(iter([*errors, *lines[-1:]]), "no output")
    killed = code == -signal.SIGKILL or any("exitcode" in line and "-9" in line for line in lines[-40:])
    if killed:
        error = "The system killed the process (signal 9), which is what it does when memory runs out."
    elif code < 0:
        error = f"The process was ended by signal {-code}."
    else:
        error = f"The process ended with exit code {code}: {message[:300]}"
    status = "out-of-memory" if killed or says_out_of_memory(message) else "failed"
    return {"schema": 1, "status": status, "error": error}
