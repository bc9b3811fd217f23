"""Runs in processes of their own: started, followed by their log, ended with their comparison, and explained."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_recipes.adapters.check_subprocess import TRUSTED
from peft_recipes.distributed.launch import Launch
from peft_recipes.errors import Terminated, says_out_of_memory
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.checkpoints import FOLDER as CHECKPOINTS
from peft_recipes.runs.files import clear, make_folder, write_json
from peft_recipes.runs.folder import RUN_FILE, Run, read_run, run_folder
from peft_recipes.runs.lock import LOCK_FILES, locked

Job = tuple[str, int]  # arm, seed

_GRACE_SECONDS = 120  # what a worker gets to end its step and write a checkpoint when the comparison is interrupted
_SILENT_SECONDS = 120  # after which a worker that tells nothing is shown as silent


@dataclass(frozen=True)
class Progress:
    """What a comparison tells while it works: one of its jobs, how far it is, or how it ended."""

    job: Job
    number: int
    jobs: int
    state: str  # "running", "ok", "failed", "out-of-memory", "kept"
    step: int = 0
    steps: int = 0
    stage: str = ""
    silent_seconds: int = 0  # since its last sign of life, where that is long ago
    error: str = ""


def teller(on_progress: Callable[[Progress], None] | None, job: Job, number: int, jobs: int) -> Callable[..., None]:
    """Tells of one job, the same way each time."""

    def tell(state: str, **more: Any) -> None:
        if on_progress is not None:
            on_progress(Progress(job, number, jobs, state, **more))

    return tell


@dataclass(frozen=True)
class Order:
    """One run to be done in a process of its own (under a launch, in several).

    yaml: the resolved recipe. data: where the comparison keeps what it prepared once for all its runs. anew: not from
    an earlier checkpoint.
    """

    output: Path
    recipe: Recipe
    job: Job
    yaml: Path
    tell: Callable[..., None]
    data: Path | None = None
    anew: bool = False
    launch: Launch | None = None


def run_in_fresh_processes(orders: Sequence[Order], slots: Sequence[dict[str, str]] = ({},)) -> None:
    """Runs in their own processes: the peak memory of each is its own, and its crash is a row of the table.

    slots: as many at a time, each with what its entry says in its environment.
    """
    waiting, free, working = list(orders), list(slots), []
    with _interruptible(working):
        while waiting or working:
            while waiting and free:
                slot = free.pop(0)
                working.append(_Worker(waiting.pop(0), slot))
            time.sleep(0.1)
            for worker in [worker for worker in working if worker.ended()]:
                working.remove(worker)
                free.append(worker.slot)
                worker.conclude()


def run_in_fresh_process(output: Path, recipe: Recipe, job: Job, yaml: Path, tell: Callable[..., None]) -> None:
    """One run in its own process."""
    run_in_fresh_processes([Order(output, recipe, job, yaml, tell)])


class _Worker:
    """The process of one run, its log followed."""

    def __init__(self, order: Order, slot: dict[str, str]):
        self.order, self.slot = order, slot
        self.folder = run_folder(order.output, order.recipe, *order.job)
        self._make_room()
        order.tell("running")
        self._log = (self.folder / "log.txt").open("wb")
        # A session of its own: Ctrl-C reaches the comparison, which tells its worker once. The pipe tells the worker
        # (each of its processes) when the comparison itself is killed.
        self.process = subprocess.Popen(
            self._command(),
            stdout=self._log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.PIPE,
            start_new_session=True,
            env={**os.environ, **slot},
        )
        self._follow, self._heard, self._news = _Follower(self.folder / "log.jsonl"), time.monotonic(), {}

    def _make_room(self) -> None:
        make_folder(self.folder)
        # A `train` in another process may be at it; a worker of a comparison that was killed is soon done.
        with locked(self.folder, wait=_GRACE_SECONDS):
            (self.folder / RUN_FILE).unlink(missing_ok=True)
            if self.order.anew:
                clear(self.folder, keep=LOCK_FILES)
            if not (self.folder / CHECKPOINTS).is_dir():
                (self.folder / "log.jsonl").unlink(missing_ok=True)

    def _command(self) -> list[str]:
        order, module = self.order, "peft_recipes.comparison.worker"
        arm, seed = order.job
        given = [str(order.yaml), arm, str(seed), str(order.output), *([str(order.data)] if order.data else [])]
        return order.launch.command(module, *given) if order.launch else [sys.executable, "-m", module, *given]

    def ended(self) -> bool:
        """Whether it has ended; where not, how far it is is told."""
        if self.process.poll() is not None:
            return True
        if found := self._follow.news():
            self._heard, self._news = time.monotonic(), found
            self.order.tell("running", **found)
        elif (silence := int(time.monotonic() - self._heard)) >= _SILENT_SECONDS:
            self.order.tell("running", **self._news, silent_seconds=silence)
        return False

    def conclude(self) -> None:
        """Tells how it ended; of one that left no word, run.json is written."""
        self.process.stdin.close()
        self._log.close()
        run = read_run(self.folder)
        if run is None:
            died = _died(self.order.recipe, self.order.job, self.process.returncode, self.folder / "log.txt")
            write_json(self.folder / RUN_FILE, died)
            run = read_run(self.folder)
        assert run is not None
        self.order.tell(run.data["status"], error=run.data.get("error") or "")


def check_in_fresh_process(runs: list[Run], trust_remote_code: bool) -> None:
    """Loads the adapters of these runs in one process that trained none of them, and writes into each run.json whether
    it answers as it was trained to. A run whose adapter does not is a failed one.

    The runs' own check loads what was saved in the process that trained it, which can't tell what only lives there.
    """
    if not runs:
        return
    command = [sys.executable, "-m", "peft_recipes.adapters.check_subprocess", *(str(run.folder) for run in runs)]
    command += [TRUSTED] if trust_remote_code else []
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.PIPE, start_new_session=True
    )
    with _interruptible([process]):
        said, complaint = process.communicate()
    answers = {row["folder"]: row["error"] for row in map(json.loads, said.decode().splitlines())}
    lost = " ".join(complaint.decode(errors="replace").split())[-300:] or f"exit code {process.returncode}"
    for run in runs:
        error = answers.get(str(run.folder), f"the checking process ended early: {lost}")
        run.data["checks"]["fresh-process"] = error is None
        if error is not None:
            run.data |= {"status": "failed", "error": f"In a fresh process its adapter is not as trained: {error}"}
        write_json(run.folder / RUN_FILE, run.data)


@contextlib.contextmanager
def _interruptible(working: list[Any]) -> Iterator[None]:
    """No process outlives the comparison that started it. working: processes, or workers, as they are by then."""
    try:
        yield
    except BaseException:
        _end([getattr(worker, "process", worker) for worker in working])
        raise
    finally:
        for worker in working:
            getattr(worker, "process", worker).stdin.close()


def _end(started: list[subprocess.Popen[bytes]]) -> None:
    for process in started:
        process.send_signal(signal.SIGINT)
    last = time.monotonic() + _GRACE_SECONDS
    try:
        for process in started:
            process.wait(max(last - time.monotonic(), 0))
    except (subprocess.TimeoutExpired, KeyboardInterrupt, Terminated):  # asked twice: at once
        for process in started:
            process.kill()
            process.wait()


class _Follower:
    """Reads what a run writes to its log.jsonl while it writes."""

    def __init__(self, path: Path):
        self.path, self.place, self.file = path, 0, 0

    def news(self) -> dict[str, Any] | None:
        """step, steps and stage of the last whole line written since the last call; None when there is none."""
        try:
            with self.path.open("rb") as log:
                found = os.fstat(log.fileno())
                if found.st_ino != self.file or found.st_size < self.place:  # written anew by a run that goes on
                    self.file, self.place = found.st_ino, 0
                log.seek(self.place)
                text = log.read()
        except OSError:
            return None
        whole = text[: text.rfind(b"\n") + 1]
        self.place += len(whole)
        lines = whole.splitlines()
        if not lines:
            return None
        try:
            last = json.loads(lines[-1])
        except ValueError:  # the place was in the middle of a line of a log that had been there before
            return None
        return {"step": last.get("step", 0), "steps": last.get("of", 0), "stage": last.get("stage", "train")}


_ERROR = re.compile(r"(\[rank\d+\]: )?(\w+\.)*\w*(Error|Exception|Killed)\b.*:")


def _died(recipe: Recipe, job: Job, code: int, log: Path) -> dict[str, Any]:
    """run.json of a worker that wrote none: it was killed, or broke before it could."""
    killed = code == -signal.SIGKILL
    lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    # Under a launcher the last lines are its own, on whichever process ended first; the run's words come before.
    tail = [line for line in lines if _ERROR.match(line) and "ChildFailedError" not in line][:1] or lines[-1:]
    tail = tail or ["no output"]
    killed = killed or any("exitcode" in line and "-9" in line for line in lines[-40:])
    if killed:
        error = "The system killed the process (signal 9), which is what it does when memory runs out."
    elif code < 0:
        error = f"The process was ended by signal {-code}."
    else:
        error = f"The process ended with exit code {code}: {tail[0][:300]}"
    status = "out-of-memory" if killed or says_out_of_memory(tail[0]) else "failed"
    return {"schema": 1, "status": status, "error": error, "recipe": recipe.name, "arm": job[0], "seed": job[1]}
