"""How near a run that was done again must come to its evidence: equal where all is the same, else within an interval.

Equal means up to float noise. On one kind of machine with the same versions and threads a run is deterministic here,
but for what a library may choose by the alignment of memory (which kernel, hence which order of sums): a relative
difference of some 1e-7 in a step, which training multiplies. So losses may differ by `NOISE` of their size, and of
counted metrics one test example in `FLIPS` may fall on the other side. Elsewhere sums run in another order from the
first step on and the trainings drift apart: there the run's own 95 % bootstrap interval over its test examples holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas

from peft_recipes.reporting.formats import is_share
from peft_recipes.statistics.bootstrap import metric_interval

NOISE = 1e-3
FLIPS = 1_000
_RESAMPLES = 10_000
_RULE_OF_THREE = 3.0  # no error in n examples leaves, at 95 %, room for 3 / n

Interval = tuple[float, float]


@dataclass(frozen=True)
class Row:
    """One figure: as the evidence has it, as it came out here, where it had to lie, and whether it does.

    bounds is None and held is None where nothing can be asked of it.
    """

    split: str
    metric: str
    evidence: float | None
    here: float | None
    bounds: Interval | None
    held: bool | None


def differing(evidence: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What of the machine, the versions and the data is not as it was: "threads: 2, here 4"."""
    keys = ("device", "device_name", "precision", "threads", "platform", "python", "attention", "peft_recipes")
    found = [(key, evidence.get(key), here.get(key)) for key in keys]
    found.append(("processes", evidence.get("processes") or 1, here.get("processes") or 1))
    mine, theirs = here.get("versions") or {}, evidence.get("versions") or {}
    found += [(name, theirs[name], mine.get(name)) for name in sorted(theirs) if name != "evaluate"]
    found.append(("data", evidence.get("dataset_fingerprint"), here.get("dataset_fingerprint")))
    return [f"{name}: {was}, here {now}" for name, was, now in found if was != now]


def rows(
    evidence: dict[str, dict[str, float]],
    here: dict[str, dict[str, float]],
    predictions: pandas.DataFrame | None,
    task: str,
    same: bool,
) -> list[Row]:
    """Every metric of every split of the evidence beside the one here. predictions: the evidence's, one row an example.

    same: all conditions are, so the two must be equal up to float noise.
    """
    found = []
    for split, values in evidence.items():
        table = None if predictions is None else predictions[predictions["split"] == split]
        for metric, value in values.items():
            now = here.get(split, {}).get(metric)
            bounds = None
            if value is not None:
                examples = None if table is None or not len(table) else len(table)
                bounds = _noise(value, metric, examples) if same else _interval(table, metric, value, task)
            held = None if bounds is None else now is not None and bounds[0] <= now <= bounds[1]
            found.append(Row(split, metric, value, now, bounds, held))
    return found


def _noise(value: float, metric: str, examples: int | None) -> Interval:
    """Where a metric may lie that differs by float noise only."""
    if not is_share(metric):
        return value - NOISE * abs(value), value + NOISE * abs(value)
    room = max(1, math.floor((examples or 0) / FLIPS)) / examples if examples else 1 / FLIPS
    # A flip of one example moves accuracy by 1 / n; macro F1 is a mean over classes, which moves by more.
    room *= 2 if "f1" in metric else 1
    return value - room - 1e-12, value + room + 1e-12


def _interval(table: pandas.DataFrame | None, metric: str, value: float, task: str) -> Interval | None:
    """The 95 % bootstrap interval of a metric over the test examples; None where these are not stored."""
    if table is None or len(table) < 2:
        return None
    if metric == "macro_f1" and {"label", "prediction"} <= set(table):
        low, high = _macro_f1_interval(table)
    elif metric == "perplexity":
        low, high = (math.exp(bound) for bound in _interval(table, "loss", value, task) or (-math.inf, math.inf))
    elif (found := scores(table, metric, task)) is not None:
        low, high = metric_interval(found[0][None], weights=found[1], resamples=_RESAMPLES)
    else:
        return None
    if high - low < 1e-12 and is_share(metric):  # all right, or all wrong: no example tells how others would vary
        low, high = max(0.0, low - _RULE_OF_THREE / len(table)), min(1.0, high + _RULE_OF_THREE / len(table))
    return low, high


def scores(table: pandas.DataFrame, metric: str, task: str) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Per-example scores whose (weighted) mean is the metric, and the weights; None where they are not stored."""
    by_token = task in ("sft", "language-modeling") and "tokens" in table
    tokens = table["tokens"].to_numpy(dtype=float) if by_token else None
    if metric == "accuracy" and {"label", "prediction"} <= set(table):
        return (table["label"] == table["prediction"]).to_numpy(dtype=float), None
    if metric == "token_accuracy" and tokens is not None and "correct_tokens" in table:
        return table["correct_tokens"].to_numpy(dtype=float) / tokens, tokens
    if metric in table and pandas.api.types.is_numeric_dtype(table[metric]):
        return table[metric].to_numpy(dtype=float), tokens
    return None


def _macro_f1_interval(table: pandas.DataFrame) -> Interval:
    """Of the mean of the classes' F1, by drawing the cells of the confusion matrix."""
    labels, guesses = table["label"].to_numpy(dtype=int), table["prediction"].to_numpy(dtype=int)
    classes = int(max(labels.max(), guesses.max())) + 1
    cells = np.bincount(labels * classes + guesses, minlength=classes * classes)
    used = np.flatnonzero(cells)
    drawn = np.zeros((_RESAMPLES // 5, cells.size))
    drawn[:, used] = np.random.default_rng(0).multinomial(len(table), cells[used] / len(table), size=len(drawn))
    matrix = drawn.reshape(-1, classes, classes)
    right = matrix.diagonal(axis1=1, axis2=2)
    whole = matrix.sum(axis=1) + matrix.sum(axis=2)
    f1 = np.divide(2 * right, whole, out=np.zeros_like(right), where=whole > 0)
    there = np.union1d(np.unique(labels), np.unique(guesses))
    low, high = np.quantile(f1[:, there].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)
