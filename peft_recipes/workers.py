"""Runs in processes of their own: started, followed by their log, ended with their comparison, and explained."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_recipes.checker import TRUSTED
from peft_recipes.checkpoints import FOLDER as CHECKPOINTS
from peft_recipes.errors import says_out_of_memory
from peft_recipes.interruption import Terminated
from peft_recipes.recipe import Recipe
from peft_recipes.runs import LOCK_FILES, RUN_FILE, Run, clear, locked, make_folder, read_run, run_folder, write_json

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


def run_in_fresh_process(
    output: Path,
    recipe: Recipe,
    job: Job,
    yaml: Path,
    tell: Callable[..., None],
    data: Path | None = None,
    *,
    anew: bool = False,
) -> None:
    """One run in its own process: its peak memory is its own, and its crash is a row of the table.

    data: where the comparison keeps what it prepared once for all its runs. anew: not from an earlier checkpoint.
    """
    arm, seed = job
    folder = run_folder(output, recipe, arm, seed)
    make_folder(folder)
    # A `train` in another process may be at it; a worker of a comparison that was killed is soon done.
    with locked(folder, wait=_GRACE_SECONDS):
        (folder / RUN_FILE).unlink(missing_ok=True)
        if anew:
            clear(folder, keep=LOCK_FILES)
        if not (folder / CHECKPOINTS).is_dir():
            (folder / "log.jsonl").unlink(missing_ok=True)
    command = [
        sys.executable,
        "-m",
        "peft_recipes.worker",
        str(yaml),
        arm,
        str(seed),
        str(output),
        *([str(data)] if data else []),
    ]
    tell("running")
    with (
        (folder / "log.txt").open("wb") as log,
        _interruptible(
            # A session of its own: Ctrl-C reaches the comparison, which tells its worker once. The pipe tells the
            # worker when the comparison itself is killed.
            subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.PIPE, start_new_session=True
            )
        ) as worker,
    ):
        follow, heard, news = _Follower(folder / "log.jsonl"), time.monotonic(), {}
        while worker.poll() is None:
            if found := follow.news():
                heard, news = time.monotonic(), found
                tell("running", **news)
            elif (silence := int(time.monotonic() - heard)) >= _SILENT_SECONDS:
                tell("running", **news, silent_seconds=silence)
            time.sleep(0.1)
    run = read_run(folder)
    if run is None:
        write_json(folder / RUN_FILE, _died(recipe, job, worker.returncode, folder / "log.txt"))
        run = read_run(folder)
    assert run is not None
    tell(run.data["status"], error=run.data.get("error") or "")


def check_in_fresh_process(runs: list[Run], trust_remote_code: bool) -> None:
    """Loads the adapters of these runs in one process that trained none of them, and writes into each run.json whether
    it answers as it was trained to. A run whose adapter does not is a failed one.

    The runs' own check loads what was saved in the process that trained it, which can't tell what only lives there.
    """
    if not runs:
        return
    command = [sys.executable, "-m", "peft_recipes.checker", *(str(run.folder) for run in runs)]
    command += [TRUSTED] if trust_remote_code else []
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.PIPE, start_new_session=True
    )
    with _interruptible(process):
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
def _interruptible(worker: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    """A worker never outlives the comparison that started it."""
    try:
        yield worker
    except BaseException:
        worker.send_signal(signal.SIGINT)
        try:
            worker.wait(_GRACE_SECONDS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt, Terminated):  # asked twice: at once
            worker.kill()
            worker.wait()
        raise
    finally:
        worker.stdin.close()


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


def _died(recipe: Recipe, job: Job, code: int, log: Path) -> dict[str, Any]:
    """run.json of a worker that wrote none: it was killed, or broke before it could."""
    killed = code == -signal.SIGKILL
    tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] or ["no output"]
    if killed:
        error = "The system killed the process (signal 9), which is what it does when memory runs out."
    elif code < 0:
        error = f"The process was ended by signal {-code}."
    else:
        error = f"The process ended with exit code {code}: {tail[0][:300]}"
    status = "out-of-memory" if killed or says_out_of_memory(tail[0]) else "failed"
    return {"schema": 1, "status": status, "error": error, "recipe": recipe.name, "arm": job[0], "seed": job[1]}
