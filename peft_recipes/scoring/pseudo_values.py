"""Pseudo-values: one value per example of a metric that is no mean over examples, for paired intervals."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


def pseudo_values(statistic: Callable[[np.ndarray], float], counts: np.ndarray) -> np.ndarray:
    """Return one value per example [examples], whose mean is the metric and whose variance that of the metric.

    counts: [examples, k], what each example adds to the k sums that the metric is a function of (for an F1 its true
    positives, predictions and references). statistic: the metric of k sums.

    They are the jackknife's pseudo-values n * metric - (n - 1) * metric without the example (Tukey 1958; Efron &
    Tibshirani 1993, "An Introduction to the Bootstrap", 11.5), shifted by the jackknife's estimate of bias, so that
    their mean is the metric itself. A bootstrap of their mean has the variance of the metric's own to first order, and
    two models tested on the same examples stay paired. Of a mean they are the examples' own values.
    """
    counts = np.asarray(counts, dtype=np.float64)
    total, count = counts.sum(axis=0), len(counts)
    metric = statistic(total)
    if count < 2:
        return np.full(count, metric)
    _, first, which = np.unique(counts, axis=0, return_index=True, return_inverse=True)  # most examples are alike
    without = np.array([statistic(total - counts[i]) for i in first])[which.reshape(-1)]
    return jackknife(metric, without)


def jackknife(metric: float, without: np.ndarray) -> np.ndarray:
    """Return the pseudo-values of `pseudo_values` from the metric without each example [examples]."""
    count = len(without)
    values = count * metric - (count - 1) * without
    return values - values.mean() + metric
