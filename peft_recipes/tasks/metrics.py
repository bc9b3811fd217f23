"""Metrics of a split, from per-example results: scikit-learn for classes, SciPy for correlations, else NumPy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np


def class_metrics(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """accuracy, macro_f1 and mcc of class ids [examples]; a class that is never predicted has an F1 of 0.

    Micro F1 is left out: where each example has one class it is the accuracy.
    """
    from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef

    one_class = np.unique([predictions, references]).size == 1  # scikit-learn gives 0 as well, with a warning
    return {
        "accuracy": float(accuracy_score(references, predictions)),
        "macro_f1": float(f1_score(references, predictions, average="macro", zero_division=0)),
        "mcc": 0.0 if one_class else float(matthews_corrcoef(references, predictions)),
    }


def multi_label_metrics(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """micro_f1, macro_f1 and accuracy of 0 and 1 [examples, classes]; accuracy: every class of an example is right."""
    from sklearn.metrics import accuracy_score, f1_score

    micro, macro = (f1_score(references, predictions, average=name, zero_division=0) for name in ("micro", "macro"))
    return {
        "micro_f1": float(micro), "macro_f1": float(macro), "accuracy": float(accuracy_score(references, predictions))
    }  # fmt: skip


def regression_metrics(predictions: np.ndarray, references: np.ndarray) -> dict[str, float]:
    """pearson, spearman and mse of numbers [examples]; a correlation with a constant is 0."""
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import mean_squared_error

    constant = len(references) < 2 or np.ptp(predictions) == 0 or np.ptp(references) == 0
    return {
        "pearson": 0.0 if constant else float(pearsonr(predictions, references).statistic),
        "spearman": 0.0 if constant else float(spearmanr(predictions, references).statistic),
        "mse": float(mean_squared_error(references, predictions)),
    }


def per_class(predictions: np.ndarray, references: np.ndarray, labels: Sequence[str]) -> list[dict[str, Any]]:
    """label, precision, recall, f1 and support of every class, in the order of `labels`; 0 for 0 divided by 0.

    predictions, references: class ids [examples], or 0 and 1 [examples, classes].
    """
    from sklearn.metrics import precision_recall_fscore_support

    columns = precision_recall_fscore_support(references, predictions, labels=range(len(labels)), zero_division=0)
    return [
        {"label": label, "precision": float(precision), "recall": float(recall), "f1": float(f1), "support": int(count)}
        for label, precision, recall, f1, count in zip(labels, *columns, strict=True)
    ]


def token_metrics(losses: np.ndarray, tokens: np.ndarray, correct: np.ndarray) -> dict[str, float]:
    """Mean loss in nats, perplexity and token accuracy over all labelled tokens, not over examples.

    losses: each example's cross-entropy, summed over its labelled tokens. tokens: each example's labelled tokens.
    correct: those the model ranks first. Raises ValueError without a labelled token.
    """
    total = int(tokens.sum())
    if total <= 0:
        raise ValueError("The loss needs at least one labelled token.")
    loss = math.fsum(losses) / total
    perplexity = math.inf if loss > 709 else math.exp(loss)  # beyond exp(709) a float64 overflows
    return {"loss": loss, "perplexity": perplexity, "token_accuracy": int(correct.sum()) / total}


def preference_scores(margins: np.ndarray, tie: float) -> np.ndarray:
    """Score each pair: 1 where its chosen answer is preferred by more than `tie`, 0 where the other is, else 0.5.

    A model without any preference scores 0.5 on average, as one that guesses does.
    """
    return np.where(np.abs(margins) <= tie, 0.5, (margins > 0).astype(float))
