"""One value per example for each metric of a classifier, whose mean is the metric: what two arms are paired by.

A metric that is no mean over examples (F1, MCC, a correlation) has pseudo-values, see scoring/pseudo_values.py. The
formulas here are those of scikit-learn and SciPy, written as functions of sums over examples.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from peft_recipes.scoring.pseudo_values import jackknife, pseudo_values
from peft_recipes.tasks import metrics

Scores = dict[str, np.ndarray]
_PAIRS_AT_ONCE = 4_000_000  # of examples, when ranks are taken without each of them: 32 MB


def class_scores(predictions: np.ndarray, references: np.ndarray) -> Scores:
    """accuracy, macro_f1 and mcc of class ids [examples]."""
    classes, ids = np.unique([predictions, references], return_inverse=True)
    # Examples of one cell of the confusion matrix are alike: with many classes that saves memory and time.
    cells, cell, sizes = np.unique(ids.reshape(2, -1), axis=1, return_inverse=True, return_counts=True)
    predicted, labelled = np.eye(len(classes))[cells]
    right = (cells[0] == cells[1]).astype(float)[:, None]

    def scores(statistic: Callable[[np.ndarray], float], counts: np.ndarray) -> np.ndarray:
        total = sizes @ counts
        if len(predictions) < 2:
            return np.array([statistic(total)])
        without = np.array([statistic(total - count) for count in counts])
        return jackknife(statistic(total), without[cell.reshape(-1)])

    return {
        "accuracy": (predictions == references).astype(float),
        "macro_f1": scores(_present_f1, _f1_counts(predicted, labelled)),
        "mcc": scores(_mcc, np.hstack([right, predicted, labelled])),
    }


def multi_label_scores(predictions: np.ndarray, references: np.ndarray) -> Scores:
    """micro_f1, macro_f1 and accuracy of 0 and 1 [examples, classes]."""
    counts = _f1_counts(predictions, references)
    return {
        "micro_f1": pseudo_values(_micro_f1, counts),
        "macro_f1": pseudo_values(_macro_f1, counts),
        "accuracy": (predictions == references).all(axis=1).astype(float),
    }


def regression_scores(predictions: np.ndarray, references: np.ndarray) -> Scores:
    """pearson, spearman and mse of numbers [examples]."""
    x, y = predictions - predictions.mean(), references - references.mean()  # large means would cost digits
    counts = np.stack([np.ones_like(x), x, y, x * x, y * y, x * y], axis=1)
    spearman = metrics.regression_metrics(predictions, references)["spearman"]
    return {
        "pearson": pseudo_values(_pearson, counts),
        "spearman": jackknife(spearman, _spearman_without_each(predictions, references)),
        "mse": (predictions - references) ** 2,
    }


def _f1_counts(predicted: np.ndarray, labelled: np.ndarray) -> np.ndarray:
    """[examples, 3 x classes] true positives, predictions and references of each class. predicted, labelled: 0, 1."""
    return np.hstack([predicted * labelled, predicted, labelled])


def _f1s(sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """F1 = 2 TP / (predictions + references) of each class, 0 for 0 / 0, and whether the class occurs."""
    hits, predicted, labelled = sums.reshape(3, -1)
    total = predicted + labelled
    return np.divide(2 * hits, total, out=np.zeros_like(hits), where=total > 0), total > 0


def _present_f1(sums: np.ndarray) -> float:
    """Macro F1 over the classes that occur, as scikit-learn's of class ids."""
    scores, present = _f1s(sums)
    return float(scores[present].mean())


def _macro_f1(sums: np.ndarray) -> float:
    """Macro F1 over all classes, as scikit-learn's of indicator columns."""
    return float(_f1s(sums)[0].mean())


def _micro_f1(sums: np.ndarray) -> float:
    return float(_f1s(sums.reshape(3, -1).sum(axis=1))[0][0])


def _mcc(sums: np.ndarray) -> float:
    """Matthews' correlation of a confusion matrix (Gorodkin 2004): right ones, then its column and row sums."""
    right, (predicted, labelled) = sums[0], sums[1:].reshape(2, -1)
    total = predicted.sum()
    spread = (total**2 - predicted @ predicted) * (total**2 - labelled @ labelled)
    return float((right * total - predicted @ labelled) / np.sqrt(spread)) if spread > 0 else 0.0


def _pearson(sums: np.ndarray) -> float:
    count, x, y, xx, yy, xy = sums
    spread = (count * xx - x * x) * (count * yy - y * y)
    return float((count * xy - x * y) / np.sqrt(spread)) if spread > 0 else 0.0


def _spearman_without_each(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """[examples] Spearman's correlation without each example: leaving one out moves the ranks above it down by one."""
    from scipy.stats import rankdata

    count, ranks = len(x), (rankdata(x), rankdata(y))
    mean = count / 2  # of the ranks 1 to count - 1
    without = []
    for chosen in np.array_split(np.arange(count), max(1, count * count // _PAIRS_AT_ONCE)):
        moved = []
        for values, rank in zip((x, y), ranks, strict=True):
            above, tied = values > values[chosen, None], values == values[chosen, None]
            left = rank - above - 0.5 * tied - mean
            left[np.arange(len(chosen)), chosen] = 0  # the one that is left out
            moved.append(left)
        spread = (moved[0] ** 2).sum(axis=1) * (moved[1] ** 2).sum(axis=1)
        shared = (moved[0] * moved[1]).sum(axis=1)
        without.append(np.divide(shared, np.sqrt(spread), out=np.zeros_like(shared), where=spread > 0))
    return np.concatenate(without)
