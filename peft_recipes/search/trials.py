"""One short run of a scan in a process of its own, on any machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from peft_recipes.recipe.recipe import Recipe
from peft_recipes.search.budget import Budget
from peft_recipes.search.candidates import Candidate
from peft_recipes.search.halving import keep_training, run_entry
from peft_recipes.search.scanner import Scanner


def one_trial(recipe: Recipe, trial: dict[str, Any]) -> dict[str, Any]:
    """Do one run; return its entry of scan.json. trial: as remote_trials.py writes it.

    Its loading time includes the process's imports and the data, since every run of such a scan needs them.
    """
    import psutil

    learning_rate = trial["learning_rate"]
    candidate = Candidate(trial["arm"], recipe.arms[trial["arm"]], (learning_rate,), trial["arm"])
    scanner = Scanner(recipe, [candidate], trial["seed"], Budget(trial["seconds"]), Path())
    scanner.prepare(load_base=False)
    run = scanner.train(
        scanner.candidates[0],
        learning_rate,
        trial["steps"],
        trial["evaluate_after"],
        keep_training=lambda run: keep_training(run, trial["others"]),
        deadline=scanner.budget.deadline,
    )
    run.seconds["load"] += time.time() - psutil.Process().create_time() - run.seconds["total"]
    return run_entry(run)
