"""Decide whether the metrics of a reproduced run agree with the original ones.

Under the same conditions (machine, versions, threads, data) they must be equal up to float noise. A run is then
deterministic, except for what a library chooses by the alignment of memory: a kernel, hence an order of summation. That
gives a relative difference of about 1e-7 in a step, which training amplifies. So losses may differ by `NOISE` of their
size, and of every `FLIPS` test examples one may change sides in a counted metric.

Under other conditions the order of summation differs from the first step on, and the two trainings drift apart. There
the new metric must lie within the 95 % bootstrap interval of the original one over its test examples.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas

from peft_recipes.recipe.metrics import PREFERENCE
from peft_recipes.recipe.options import TOKEN_TASKS
from peft_recipes.reporting.formats import is_share
from peft_recipes.statistics.bootstrap import metric_interval

NOISE = 1e-3
FLIPS = 1_000
_CORRELATIONS = ("mcc", "pearson", "spearman")  # from -1 to 1
_CONTINUOUS = ("pearson", "spearman")  # of numbers that are not rounded: nothing flips
_RESAMPLES = 10_000
_RULE_OF_THREE = 3.0  # without an error in n examples, the error rate is below 3 / n at 95 % confidence

Interval = tuple[float, float]


@dataclass(frozen=True)
class MetricComparison:
    """One figure: the original value (evidence), the new one (here), the bounds for the new one, and whether it held.

    bounds and held are None if the figure can't be compared.
    """

    split: str
    metric: str
    evidence: float | None
    here: float | None
    bounds: Interval | None
    held: bool | None


def changed_conditions(evidence: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """List what differs between two environments (machine, versions, data): "threads: 2, here 4"."""
    keys = ("device", "device_name", "precision", "threads", "platform", "python", "attention", "peft_recipes")
    pairs = [(key, evidence.get(key), here.get(key)) for key in keys]
    pairs.append(("processes", evidence.get("processes") or 1, here.get("processes") or 1))
    versions, new_versions = evidence.get("versions") or {}, here.get("versions") or {}
    pairs += [(name, versions[name], new_versions.get(name)) for name in sorted(versions) if name != "evaluate"]
    pairs.append(("data", evidence.get("dataset_fingerprint"), here.get("dataset_fingerprint")))
    return [f"{name}: {before}, here {now}" for name, before, now in pairs if before != now]


def compare_metrics(
    evidence: dict[str, dict[str, float]],
    here: dict[str, dict[str, float]],
    predictions: pandas.DataFrame | None,
    task: str,
    same_conditions: bool,
) -> list[MetricComparison]:
    """Compare every metric of every split. predictions: those of the original run, one row per example."""
    rows = []
    for split, metrics in evidence.items():
        table = None if predictions is None else predictions[predictions["split"] == split]
        for metric, value in metrics.items():
            new, bounds = here.get(split, {}).get(metric), None
            if metric == PREFERENCE:  # computed from the answers of two runs, by a judge
                bounds = None
            elif value is not None and same_conditions:
                bounds = _noise_bounds(value, metric, table)
            elif value is not None:
                bounds = _bootstrap_interval(table, metric, task, metrics)
            held = None if bounds is None else new is not None and bounds[0] <= new <= bounds[1]
            rows.append(MetricComparison(split, metric, value, new, bounds, held))
    return rows


def _noise_bounds(value: float, metric: str, table: pandas.DataFrame | None) -> Interval:
    """Return where a metric may lie that differs by float noise only."""
    if metric in _CONTINUOUS:
        return value - NOISE, value + NOISE
    if not is_share(metric):
        return value - NOISE * abs(value), value + NOISE * abs(value)
    examples = 0 if table is None else len(table)
    margin = max(1, examples // FLIPS) / examples if examples else 1 / FLIPS
    if "f1" in metric or metric.startswith("entity_") or metric == "mcc":
        # One example changes accuracy by 1 / n, and what is no mean over examples by its pseudo-values' range / n.
        column = table[metric].to_numpy(dtype=float) if examples and metric in table else np.zeros(1)
        margin *= max(2.0, float(np.ptp(column)))
    return value - margin - 1e-12, value + margin + 1e-12


def _bootstrap_interval(
    table: pandas.DataFrame | None, metric: str, task: str, metrics: dict[str, float]
) -> Interval | None:
    """Return the 95 % bootstrap interval of a metric over the test examples; None if these are not stored.

    metrics: all of the split's.
    """
    if table is None or len(table) < 2:
        return None
    if metric == "macro_f1" and "macro_f1" not in table and {"label", "prediction"} <= set(table):
        low, high = _macro_f1_interval(table)
    elif metric == "perplexity":
        bounds = _bootstrap_interval(table, "loss", task, metrics) or (-math.inf, math.inf)
        low, high = (math.exp(bound) for bound in bounds)
    elif metric == "bits_per_byte" and metrics.get("loss"):  # the loss in another unit
        bounds = _bootstrap_interval(table, "loss", task, metrics) or (-math.inf, math.inf)
        low, high = (bound * metrics[metric] / metrics["loss"] for bound in bounds)
    elif (scores := example_scores(table, metric, task)) is not None:
        bounded = is_share(metric) and metric not in _CORRELATIONS
        low, high = metric_interval(scores[0][None], weights=scores[1], resamples=_RESAMPLES, share=bounded)
    else:
        return None
    if high - low < 1e-12 and is_share(metric):  # macro F1 of all right or all wrong: no variation
        low, high = max(0.0, low - _RULE_OF_THREE / len(table)), min(1.0, high + _RULE_OF_THREE / len(table))
    return low, high


def example_scores(table: pandas.DataFrame, metric: str, task: str) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Return per-example scores whose (weighted) mean is the metric, and the weights; None if they are not stored."""
    counted = task in TOKEN_TASKS and "tokens" in table and table["tokens"].notna().all()  # not of a benchmark
    tokens = table["tokens"].to_numpy(dtype=float) if counted else None
    if metric == "accuracy" and metric not in table and {"label", "prediction"} <= set(table):
        return (table["label"] == table["prediction"]).to_numpy(dtype=float), None
    if metric == "token_accuracy" and tokens is not None and "correct_tokens" in table:
        return table["correct_tokens"].to_numpy(dtype=float) / tokens, tokens
    if metric == "empty_answers" and "answer" in table:
        return (table["answer"].dropna() == "").to_numpy(dtype=float), None
    if metric == "ended" and metric in table:
        return table[metric].dropna().to_numpy(dtype=float), None
    if metric in table and pandas.api.types.is_numeric_dtype(table[metric]):
        # Examples beyond test_generations have no answer, hence no score of it.
        return table[metric].dropna().to_numpy(dtype=float), tokens if metric == "loss" else None
    return None


def _macro_f1_interval(table: pandas.DataFrame) -> Interval:
    """Bootstrap the mean of the classes' F1, by resampling the cells of the confusion matrix."""
    labels, predictions = table["label"].to_numpy(dtype=int), table["prediction"].to_numpy(dtype=int)
    classes = int(max(labels.max(), predictions.max())) + 1
    cells = np.bincount(labels * classes + predictions, minlength=classes * classes)
    used = np.flatnonzero(cells)
    resampled = np.zeros((_RESAMPLES // 5, cells.size))
    resampled[:, used] = np.random.default_rng(0).multinomial(len(table), cells[used] / len(table), len(resampled))
    matrices = resampled.reshape(-1, classes, classes)
    correct = matrices.diagonal(axis1=1, axis2=2)
    total = matrices.sum(axis=1) + matrices.sum(axis=2)
    f1 = np.divide(2 * correct, total, out=np.zeros_like(correct), where=total > 0)
    present = np.union1d(labels, predictions)
    low, high = np.quantile(f1[:, present].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)
