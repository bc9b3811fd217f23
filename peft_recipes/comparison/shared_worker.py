"""The process of runs that share a base: `python -m peft_recipes.comparison.shared_worker RECIPE OUTPUT DATA JOBS`.

shared_runs.py starts it. DATA: the folder of the comparison's prepared data, or an empty string. JOBS: arms and seeds,
as JSON. The runs are trained here, by `training.together.train_together`.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from peft_recipes.comparison.worker import end_with_parent, needs_bitsandbytes
from peft_recipes.distributed.quiet import quiet_libraries, skip_bitsandbytes
from peft_recipes.training.interruption import EXIT_CODES


def work(recipe_file: str, output: str, data: str, jobs: list[tuple[str, int]]) -> int:
    """Train the runs; return the exit code: 0 where each has ended or has said why not, else that of the signal."""
    end_with_parent()
    quiet_libraries()
    if not any(needs_bitsandbytes(Path(recipe_file), arm) for arm, _ in jobs):
        skip_bitsandbytes()
    from peft_recipes.runs.folder import resolved_recipe
    from peft_recipes.training.together import train_together

    options = {"output": output, "resume": True, "wait": True, "data": data or None}
    try:
        outcomes = train_together(resolved_recipe(Path(recipe_file)), jobs, **options)
    except tuple(EXIT_CODES) as error:
        sys.stderr.flush()
        os._exit(EXIT_CODES[type(error)])  # after a second signal, threads may still be running
    for (arm, seed), outcome in outcomes.items():
        if isinstance(outcome, BaseException):
            print(f"{arm} seed {seed}: {type(outcome).__name__}: {outcome}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(work(*sys.argv[1:4], [(arm, seed) for arm, seed in json.loads(sys.argv[4])]))
