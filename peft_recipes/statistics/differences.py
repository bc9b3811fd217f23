"""The differences between arms, with interval and verdict: entries of `differences` in comparison.json."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from peft_recipes.recipe.metrics import METRICS, PREFERENCE, margin_for
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.folder import Run
from peft_recipes.statistics.bootstrap import Difference, difference_from, simultaneous, verdict
from peft_recipes.statistics.scores import paired, scores, weighted_mean
from peft_recipes.statistics.sequential import SequentialPlan, resamples_for

FULL = "full"


def differences(
    recipe: Recipe,
    runs: dict[tuple[str, int], Run],
    arms: Sequence[str],
    seeds: Sequence[int],
    margin: float | None = None,
    plan: SequentialPlan | None = None,
) -> dict[str, dict[str, Any]]:
    """Compare each arm with full; return `differences` of comparison.json.

    plan: as for `comparison_data`. Before its first look there is none; the margin is then each difference's own, from
    the seeds that it has: a later seed of full changes no interval or verdict.
    """
    if FULL not in arms:
        return {}
    others = [arm for arm in arms if arm != FULL and shared_seeds(recipe, runs, arm, FULL, seeds)]
    together = plan.comparisons if plan else len(others)
    made = {arm: difference(recipe, runs, arm, seeds, margin, FULL, together, plan) for arm in others}
    return {arm: entry for arm, entry in made.items() if entry is not None}


def difference(
    recipe: Recipe,
    runs: dict[tuple[str, int], Run],
    arm: str,
    seeds: Sequence[int],
    margin: float | None,
    against: str = FULL,
    together: int = 1,
    plan: SequentialPlan | None = None,
) -> dict[str, Any] | None:
    """Compare an arm with another, paired by test example and seed, over the seeds that both finished.

    together: with two differences or more, each has a second interval and verdict, which all hold together.
    """
    shared = shared_seeds(recipe, runs, arm, against, seeds)
    if not shared or (plan is not None and len(shared) < plan.first):
        return None
    ours, theirs = ([scores(runs[name, seed], recipe) for seed in shared] for name in (arm, against))
    if plan is not None:
        margin = recipe.margin or margin_for(recipe.metric, statistics.fmean(map(weighted_mean, theirs)))

    def compared(comparisons: int) -> Difference:
        confidence = plan.confidence(len(shared), comparisons) if plan else simultaneous(comparisons)
        resamples = resamples_for(confidence) if plan else 10_000
        if recipe.metric == PREFERENCE and against == FULL:  # the win rate is against full already
            values = np.stack([values for _, values, _ in ours])
            return difference_from(values, 0.5, confidence=confidence, resamples=resamples)
        share = METRICS[recipe.metric].share
        return paired(ours, theirs, f"'{arm}' and '{against}'", share, confidence, resamples)

    found = compared(1)
    entry = {
        "against": against,
        **found.to_dict(),
        "margin": margin,
        "verdict": verdict(found, margin, recipe.higher_is_better),
    }
    if plan is not None:
        entry["look_confidence"] = plan.confidence(len(shared))
    if together > 1:
        wider = compared(together)
        entry["ci95_simultaneous"] = list(wider.ci95)
        entry["verdict_simultaneous"] = verdict(wider, margin, recipe.higher_is_better)
    return entry


def shared_seeds(
    recipe: Recipe, runs: dict[tuple[str, int], Run], arm: str, against: str, seeds: Sequence[int]
) -> list[int]:
    """Return the seeds that two arms finished with a value of the metric.

    A score may fail on an arm's answers, and answers may not be judged yet.
    """

    def measured(run: Run) -> bool:
        return run.ok and recipe.metric in run.metrics["test"]

    return [seed for seed in seeds if measured(runs[arm, seed]) and measured(runs[against, seed])]
