"""The scores of a run's test examples, from its predictions.parquet, and the paired difference of two sets of runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from peft_recipes.recipe.metrics import PREFERENCE
from peft_recipes.recipe.options import TOKEN_TASKS
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.runs.folder import Run
from peft_recipes.runs.predictions import PREFERENCES
from peft_recipes.statistics.bootstrap import Difference, paired_difference

if TYPE_CHECKING:
    import pandas

Scores = tuple[np.ndarray, np.ndarray, np.ndarray | None]  # ids, scores and weights of the examples of a split


def scores(run: Run, recipe: Recipe, split: str = "test", metric: str | None = None) -> Scores:
    """Return ids, scores and weights of a split's examples; the weighted mean of the scores is the metric.

    metric: the recipe's, if None; of a benchmark its own.
    """
    import pandas

    metric = metric or recipe.metric
    examples = pandas.read_parquet(run.folder / (PREFERENCES if metric == PREFERENCE else "predictions.parquet"))
    return example_scores(examples[examples["split"] == split], recipe.task, metric)


def example_scores(examples: pandas.DataFrame, task: str, metric: str) -> Scores:
    """Return ids, scores and weights of the rows of predictions.parquet that one split has.

    Examples without a score are left out: those beyond test_generations have no answer.
    """
    if metric == "accuracy" and "accuracy" not in examples:
        examples = examples.assign(accuracy=examples["label"] == examples["prediction"])
    examples = examples[examples[metric].notna()]
    weights = None
    if metric in ("loss", "token_accuracy") and task in TOKEN_TASKS:
        weights = examples["tokens"].to_numpy(dtype=float)
    return examples["id"].to_numpy(), examples[metric].to_numpy(dtype=float), weights


def weighted_mean(made: Scores) -> float:
    """Return the metric of a run from its examples' scores."""
    _, values, weights = made
    return float(np.average(values, weights=weights))


def paired(
    ours: list[Scores],
    theirs: list[Scores],
    names: str,
    share: bool,
    confidence: float = 0.95,
    resamples: int = 10_000,
) -> Difference:
    """Compare the runs of two arms, example by example. Raises RuntimeError where they have not the same examples."""
    ids = ours[0][0]
    if any(not np.array_equal(other[0], ids) for other in [*ours, *theirs]):
        raise RuntimeError(f"The runs of {names} were not tested on the same examples.")
    stacked = (np.stack([s for _, s, _ in runs]) for runs in (ours, theirs))
    options = {"weights": ours[0][2], "confidence": confidence, "resamples": resamples, "share": share}
    return paired_difference(*stacked, **options)
