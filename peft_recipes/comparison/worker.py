"""The process of one run: `python -m peft_recipes.comparison.worker RECIPE ARM SEED OUTPUT [DATA]`.

pool.py starts it, once for each run of a comparison; under `--launch`, Accelerate starts it once for each rank. The run
is trained here, by `training.run.train`; the comparison's process only reads the files that it writes.
"""

from __future__ import annotations

import os
import signal
import stat
import sys
import threading
from pathlib import Path

from peft_recipes.distributed.processes import OtherRankFailed
from peft_recipes.distributed.quiet import quiet_libraries, skip_bitsandbytes
from peft_recipes.errors import RecipeError
from peft_recipes.models.quantisation import OPTIMIZERS
from peft_recipes.recipe.serialization import read_yaml
from peft_recipes.training.interruption import EXIT_CODES


def work(recipe_file: str, arm: str, seed: int, output: str, data: str | None = None) -> int:
    """Train one run; return the exit code: 0 done, 1 failed (run.json holds the error), 2 an error in the recipe.

    data: the folder of the data prepared by the comparison; without it the run prepares its own.
    """
    end_with_parent()
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
        train(recipe, arm, seed=seed, output=output, resume=True, data=data, wait=True)
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


def end_with_parent() -> None:
    """Send this process SIGTERM when its stdin is closed, which happens when the comparison's process ends."""

    def watch() -> None:
        while os.read(0, 1):  # not sys.stdin: this thread would hold its lock when Python exits
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    if stat.S_ISFIFO(os.fstat(0).st_mode):
        threading.Thread(target=watch, daemon=True).start()


if __name__ == "__main__":
    sys.exit(work(sys.argv[1], sys.argv[2], int(sys.argv[3]), *sys.argv[4:6]))
