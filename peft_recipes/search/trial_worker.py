"""Processes that do short runs of a scan.

`python -m peft_recipes.search.trial_worker one RECIPE OPTIONS RESULT` does one run: remote_trials.py has it started on
a node. `... trial_worker serve RECIPE FOLDER ARM ...` does one after another on this machine: local_trials.py writes
each to the folder. Either prepares the data again, as the scan has done, and once.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from pathlib import Path
from typing import Any

from peft_recipes.comparison.worker import end_with_parent
from peft_recipes.distributed.quiet import quiet_libraries
from peft_recipes.errors import RecipeError

_POLL_SECONDS = 0.02


def one(recipe_file: str, options_file: str, result: str) -> None:
    """Do one run; `result` is its entry of scan.json. Its loading time includes the process's imports and the data.

    The seconds of its budget begin with the process.
    """
    import psutil

    from peft_recipes.runs.files import write_json
    from peft_recipes.search.here import train
    from peft_recipes.search.own_process import prepared_for, trial_of

    options, age = json.loads(Path(options_file).read_text(encoding="utf-8")), _age(psutil.Process())
    deadline = time.monotonic() + options["seconds"] - age
    prepared = prepared_for(_recipe(recipe_file), [options["arm"]])
    entry = train(prepared, trial_of(prepared, options), deadline)
    if entry["ended"] != "failed":
        before = _age(psutil.Process()) - entry["seconds"]["total"]
        entry["seconds"]["load"] = round(entry["seconds"]["load"] + before, 3)
    write_json(Path(result), entry)


def serve(recipe_file: str, folder: str, *arms: str) -> None:
    """Do the runs that are written to a folder: 0.json, 1.json, ...; write the entry of N.json to N.result.json."""
    from peft_recipes.runs.files import write_json
    from peft_recipes.search.here import train
    from peft_recipes.search.own_process import prepared_for, trial_of

    prepared = prepared_for(_recipe(recipe_file), arms)
    for number in itertools.count():
        while not (path := Path(folder) / f"{number}.json").exists():
            time.sleep(_POLL_SECONDS)
        options = json.loads(path.read_text(encoding="utf-8"))
        deadline = time.monotonic() + options["ends_at"] - time.time()
        write_json(path.with_suffix(".result.json"), train(prepared, trial_of(prepared, options), deadline))


def _recipe(path: str) -> Any:
    from peft_recipes.runs.folder import resolved_recipe

    return resolved_recipe(Path(path))


def _age(process: Any) -> float:
    return time.time() - process.create_time()


def work(kind: str, *arguments: str) -> int:
    """Do what the process is for; return its exit code: 0 done, 2 an error in the recipe, which it prints."""
    end_with_parent()
    quiet_libraries()
    try:
        {"one": one, "serve": serve}[kind](*arguments)
    except RecipeError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(work(*sys.argv[1:]))
