"""Trains the runs of a list, one after another, in every process that `accelerate launch` starts with this script.

python tests/distributed_runs.py JOBS.json: [[recipe.yaml, arm, output, {options of train}], ...]. A job "kill-at" or
"signal-at" sends its signal to the named process at the end of that step.
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


def at_step(process: int, step: int, number: int) -> None:
    """Sends a signal to this process, if it is that one, when that step has ended."""
    log_step = stages.log_step

    def logged(lines, now, *rest):
        log_step(lines, now, *rest)
        if now == step and processes.index() == process:
            stages.log_step = log_step
            os.kill(os.getpid(), number)

    stages.log_step = logged


def main(jobs: list[list]) -> None:
    """Each job, in order; what one raises is printed and the next one goes on (an interruption is no end here)."""
    quiet_libraries()
    for yaml, arm, output, options in jobs:
        if signalled := options.pop("signal", None):
            at_step(*signalled)
        try:
            train(resolved_recipe(Path(yaml)), arm, output=output, **options)
        except BaseException as error:
            print(
                f"process {processes.index()}: {arm} of {output}: {type(error).__name__}: {processes.said(error)}",
                flush=True,
            )
            if os.environ.get("TRACE"):
                import traceback

                traceback.print_exc()
            if isinstance(error, Exception):
                raise SystemExit(1) from error


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
