"""Trains a list of runs one after another, on every rank that `accelerate launch` starts with this script.

python tests/helpers/distributed_runs.py JOBS.json: [[recipe.yaml, arm, output, {options of train}], ...]. The option
"signal": [rank, step, number] sends that signal to a rank at the end of a step; "diverge": step has rank 0 call a
collective once more there than rank 1.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from peft_recipes import train
from peft_recipes.distributed import processes
from peft_recipes.distributed.quiet import quiet_libraries
from peft_recipes.runs.folder import resolved_recipe
from peft_recipes.training import stages


def signal_at_step(rank: int, step: int, number: int) -> None:
    """Send a signal to this process at the end of a step, if it has that rank."""
    at_step(rank, step, lambda: os.kill(os.getpid(), number))


def at_step(rank: int, step: int, act) -> None:
    """Call `act` once at the end of a step, on that rank."""
    log_step = stages.log_step

    def logged(lines, now, *rest):
        log_step(lines, now, *rest)
        if now == step and processes.rank() == rank:
            stages.log_step = log_step
            act()

    stages.log_step = logged


def main(jobs: list[list]) -> None:
    """Run the jobs in order. An error is printed and ends the process; after an interruption the next job starts."""
    quiet_libraries()
    for yaml, arm, output, options in jobs:
        if signalled := options.pop("signal", None):
            signal_at_step(*signalled)
        if step := options.pop("diverge", None):
            at_step(0, step, lambda: processes.all_reduce_max(0, 0))
        try:
            train(resolved_recipe(Path(yaml)), arm, output=output, **options)
        except BaseException as error:
            message = processes.error_message(error)
            print(f"rank {processes.rank()}: {arm} of {output}: {type(error).__name__}: {message}", flush=True)
            if os.environ.get("TRACE"):
                import traceback

                traceback.print_exc()
            if isinstance(error, Exception):
                raise SystemExit(1) from error


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
