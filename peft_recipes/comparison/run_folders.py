"""A run's folder before its process starts and after it has ended, wherever that process runs."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import Any

from peft_recipes.comparison.chunks import report_paused
from peft_recipes.comparison.orders import Order
from peft_recipes.errors import says_out_of_memory
from peft_recipes.guards.runner import NOT_RUN
from peft_recipes.runs.checkpoints import FOLDER as CHECKPOINTS
from peft_recipes.runs.checkpoints import other_note
from peft_recipes.runs.files import clear, make_folder, write_json
from peft_recipes.runs.folder import RUN_FILE, Run, read_run
from peft_recipes.runs.lock import LOCK_FILES, locked
from peft_recipes.runs.subprocesses import GRACE_SECONDS


def clear_folder(order: Order) -> None:
    """Make the folder ready for a start: keep checkpoints to resume from, and a run that is finished already."""
    folder = order.folder
    make_folder(folder)
    # wait: the worker of a comparison that was killed may still be writing its last checkpoint.
    with locked(folder, wait=GRACE_SECONDS):
        if order.overwrite:
            clear(folder, keep=LOCK_FILES)
        elif order.finished is not None and order.finished():
            return  # by that other process; the worker returns it as it is
        (folder / RUN_FILE).unlink(missing_ok=True)
        if order.signature and (lost := other_note(folder / CHECKPOINTS, order.signature)):
            order.report("running", note=lost)
        if not (folder / CHECKPOINTS).is_dir():
            (folder / "log.jsonl").unlink(missing_ok=True)


def conclude(order: Order, code: int, log: Path | None = None) -> None:
    """Report how a run ended, or that it is paused. A worker that died without a run.json gets one with the reason.

    One that died after its run was stored leaves the figures, and its missing checks get the reason. log: what its
    process printed (default: log.txt in the run's folder).
    """
    run, log = read_run(order.folder), log or order.folder / "log.txt"
    if run is None and code == 0 and report_paused(order):
        return
    if run is None:
        run = write_failure(order, failure(code, log))
    elif run.ok and code and explain_missing_checks(run, failure(code, log)["error"]):
        write_json(order.folder / RUN_FILE, run.data)
    failed = "; ".join(f"check {name}: {words}" for name, words in run.failed_checks.items())
    order.report(run.data["status"], error=run.data.get("error") or failed)


def write_failure(order: Order, reason: dict[str, Any]) -> Run:
    """Write the run.json of a run whose process wrote none."""
    arm, seed = order.job
    run = Run(order.folder, {**reason, "recipe": order.recipe.name, "arm": arm, "seed": seed})
    write_json(order.folder / RUN_FILE, run.data)
    return run


def explain_missing_checks(run: Run, reason: str) -> bool:
    """Give the reason for the checks that a run's process did not come to; return whether there are any."""
    checks = run.data.get("checks") or {}
    missing = [name for name, result in checks.items() if str(result).startswith(NOT_RUN)]
    checks.update({name: {"error": f"{NOT_RUN}: {reason}"} for name in missing})
    return bool(missing)


_ERROR = re.compile(r"(\[rank\d+\]: )?(\w+\.)*\w*(Error|Exception|Killed)\b.*:")


def failure(code: int, log: Path) -> dict[str, Any]:
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
