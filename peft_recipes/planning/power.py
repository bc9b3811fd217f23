"""`plan --power`: seeds and test examples that a verdict takes, from runs that are there already, and their time."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peft_recipes.errors import RecipeError
from peft_recipes.recipe.metrics import METRICS
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.folder import Run, read_run
from peft_recipes.statistics.differences import FULL
from peft_recipes.statistics.sample_size import (
    POWER,
    Claim,
    Variances,
    examples_needed,
    margin_reached,
    seeds_needed,
    variances,
)
from peft_recipes.statistics.scores import scores, weighted_mean

CLAIMS: tuple[Claim, ...] = ("equivalent", "different")
SEEDS = (3, 5, 10)  # for which the test examples are given
PILOT_SEEDS = 2


Pilots = dict[str, dict[int, Run]]  # finished runs by arm and seed


def read_pilots(recipe: Recipe, names: Sequence[str], margin: float, output: Path) -> Pilots:
    """Read the runs below `output` from which the variances are estimated.

    Raises RecipeError for a margin that is none, and where full and an arm don't share two seeds, with the command that
    makes them.
    """
    if not (math.isfinite(margin) and margin > 0):
        raise RecipeError(f"--power {margin:g}: expected a margin above 0 in points of the metric, as in --power 1.")
    others = [name for name in names if name != FULL]
    if not others:
        raise RecipeError(f"--power is about how arms compare with '{FULL}': name another arm in --arms.")
    runs = {name: _pilot_runs(recipe, name, output) for name in (FULL, *others)}
    lacking = [name for name in others if len(runs[name].keys() & runs[FULL].keys()) < PILOT_SEEDS]
    if lacking:
        raise RecipeError(
            f"--power needs pilot runs: {PILOT_SEEDS} seeds or more of '{FULL}' and of {', '.join(map(repr, lacking))} "
            f"below {output / recipe.name}, of this model and data, to estimate how much runs and examples vary. Make "
            f"them by `peft-recipes compare` with the same recipe, --embedded, --set and --output, and "
            f"`--arms {','.join([FULL, *lacking])} --seeds 0,1`; a later comparison keeps them."
        )
    return runs


def power_plan(recipe: Recipe, margin: float, runs: Pilots, arms: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return `power` of a plan: what a verdict at a margin takes for each arm.

    margin: points of a share, or percent of full's mean; 1 is the default margin. runs: from `read_pilots`. arms: the
    plan's, with `steps` and perhaps the time of a `trial`. Raises RecipeError for runs with different test examples.
    """
    return {
        "margin": margin,
        "unit": "points" if METRICS[recipe.metric].share else "percent",
        "metric": recipe.metric,
        "power": POWER,
        "arms": {name: _arm(recipe, name, runs, margin, arms) for name in runs if name != FULL},
        "notes": _notes(runs, arms),
    }


def _pilot_runs(recipe: Recipe, name: str, output: Path) -> dict[int, Run]:
    """The finished runs of an arm by seed, of this model and data, with a value of the metric."""
    found = {}
    for path in sorted((output / recipe.name / name).glob("seed-*/run.json")):
        run = read_run(path.parent)
        if run is None or not run.ok or (run.data["model"], run.data["dataset"]) != (recipe.model, recipe.data_name):
            continue
        if recipe.metric in run.metrics.get("test", {}):
            found[run.data["seed"]] = run
    return found


def _arm(
    recipe: Recipe, name: str, runs: Pilots, margin: float, arms: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    seeds = sorted(runs[name].keys() & runs[FULL].keys())
    ours, theirs = ([scores(runs[each][seed], recipe) for seed in seeds] for each in (name, FULL))
    if any(not np.array_equal(one[0], ours[0][0]) for one in (*ours, *theirs)):
        raise RecipeError(
            f"The pilot runs of '{name}' and '{FULL}' were not tested on the same examples: train them again with "
            "`peft-recipes compare`."
        )
    of = variances(np.stack([one[1] for one in ours]), np.stack([one[1] for one in theirs]), ours[0][2])
    unit = (1.0 if METRICS[recipe.metric].share else abs(statistics.fmean(map(weighted_mean, theirs)))) / 100
    size = margin * unit
    seconds = [_seconds(each, runs[each], arms.get(each, {})) for each in (name, FULL)]
    a_seed = None if None in seconds else sum(seconds)
    return {
        "pilot": {"seeds": list(seeds), "examples": of.examples},
        "sd": {"runs": of.runs**0.5, "noise": of.noise**0.5, "examples": of.apart**0.5},
        "seconds_per_seed": a_seed,
        "seeds": {c: _both(of, lambda v, c=c: seeds_needed(v, c, size, of.examples)) for c in CLAIMS},
        "examples": {
            str(count): {c: _both(of, lambda v, c=c, n=count: examples_needed(v, c, size, n)) for c in CLAIMS}
            for count in SEEDS
        },
        "margin_of_10_seeds": {
            c: _both(of, lambda v, c=c: margin_reached(v, c, SEEDS[-1], of.examples) / unit) for c in CLAIMS
        },
    }


def _both(of: Variances, needed: Callable[[Variances], float | None]) -> dict[str, float | None]:
    """What is needed by the variances that the pilot shows, and by the upper limit of that between runs."""
    return {"likely": needed(of), "safe": needed(of.safe())}


def _seconds(name: str, runs: Mapping[int, Run], planned: Mapping[str, Any]) -> float | None:
    """Seconds of a run: of its steps and answers by the trial, else all of a pilot run (the median)."""
    if (trial := planned.get("trial")) and trial["estimated_seconds"] is not None:
        return trial["estimated_seconds"] + (trial["answer_seconds"] or 0.0)
    taken = [(run.data.get("seconds") or {}).get("total") for run in runs.values()]
    return statistics.median(taken) if taken and None not in taken else None


def _notes(runs: Pilots, arms: Mapping[str, Mapping[str, Any]]) -> list[str]:
    notes = []
    for name, planned in arms.items():
        steps = sorted({run.data["training"]["steps"] for run in runs.get(name, {}).values() if run.data["training"]})
        if planned["steps"] is not None and steps and steps != [planned["steps"]]:
            notes.append(
                f"The pilot runs of '{name}' had {', '.join(map(str, steps))} steps, and {planned['steps']} are "
                "planned: the variation between longer runs may be another."
            )
    return notes
