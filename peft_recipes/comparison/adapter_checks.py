"""Reload the trained adapters of a comparison in one process that trained none of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from peft_recipes.adapters.check_subprocess import TRUSTED, any_quantised
from peft_recipes.comparison.collecting import run_or_failure
from peft_recipes.comparison.orders import Job
from peft_recipes.comparison.processes import run_to_end
from peft_recipes.guards.runner import NOT_RUN
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.files import write_json
from peft_recipes.runs.folder import BASE, RUN_FILE, Run


def check_adapters(output: Path, recipe: Recipe, jobs: list[Job]) -> None:
    """Reload every adapter that was not yet reloaded outside the process that trained it."""
    if {"reload", "fresh-process"} & set(recipe.skip_checks):
        return
    adapters = [job for job in jobs if job[0] != BASE and recipe.arms[job[0]].peft is not None]
    runs = [run_or_failure(output, recipe, job) for job in adapters]
    unchecked = [run for run in runs if run.ok and not _checked_in_fresh_process(run)]
    check_in_fresh_process(unchecked, recipe.trust_remote_code)


def _checked_in_fresh_process(run: Run) -> bool:
    result = run.data["checks"].get("fresh-process", NOT_RUN)
    return not (isinstance(result, str) and result.startswith(NOT_RUN))


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
