"""What tuning made a model forget: each arm against the untuned base, on further evaluation sets and benchmarks."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from peft_recipes.recipe.metrics import METRICS
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.folder import Run
from peft_recipes.statistics.bootstrap import verdict
from peft_recipes.statistics.scores import paired, scores
from peft_recipes.statistics.sequential import SequentialPlan, resamples_for


def forgetting(
    recipe: Recipe,
    runs: dict[tuple[str, int], Run],
    base: Run,
    arms: Sequence[str],
    seeds: Sequence[int],
    plan: SequentialPlan | None = None,
) -> dict[str, dict[str, Any]]:
    """Compare each arm with the untuned base on the `evaluate_also` splits and the benchmarks: after minus before.

    Each is compared by its own `metric`: the recipe's, or the benchmark's. The base is the same for every seed. The
    margin is 1 point, or 1 % of the base's value where that is no share. plan: of seeds that were added until it was
    decided; the intervals then hold over its looks, and an arm with fewer seeds than its first look has none.
    """
    changes: dict[str, dict[str, Any]] = {}
    if not base.ok:
        return changes
    for split, (metric, higher, share) in _compared_with_base(recipe, base).items():
        before, value = scores(base, recipe, split, metric), base.metrics[split][metric]
        margin = 0.01 if share else 0.01 * abs(value)
        changes[split] = {"metric": metric, "higher_is_better": higher, "share": share}
        changes[split]["benchmark"] = split in (base.data.get("benchmarks") or {})
        changes[split] |= {"before": value, "margin": margin, "arms": {}}
        for arm in arms:
            done = [runs[arm, seed] for seed in seeds if runs[arm, seed].ok and split in runs[arm, seed].metrics]
            if done and (plan is None or len(done) >= plan.first):
                confidence = plan.confidence(len(done)) if plan else 0.95
                resamples = resamples_for(confidence) if plan else 10_000
                after = [scores(run, recipe, split, metric) for run in done]
                change = paired(after, [before] * len(done), f"'{arm}'", share, confidence, resamples)
                changes[split]["arms"][arm] = {
                    "after": statistics.fmean(run.metrics[split][metric] for run in done),
                    **change.to_dict(),
                    "verdict": verdict(change, margin, higher),
                }
    return changes


def _compared_with_base(recipe: Recipe, base: Run) -> dict[str, tuple[str, bool, bool]]:
    """What forgetting is measured on: name -> metric, whether higher is better, whether it is shown in percent."""
    found = {}
    for split in recipe.evaluate_also:
        if split in base.metrics:
            metric = recipe.metric if recipe.metric in base.metrics[split] else recipe.selection_metric
            found[split] = (metric, METRICS[metric].higher_is_better, METRICS[metric].share)
    for name, facts in (base.data.get("benchmarks") or {}).items():
        found[name] = (facts["metric"], facts["higher_is_better"], facts["share"])
    return found
