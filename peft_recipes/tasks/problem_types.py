"""The three things a classifier may learn: one class, several classes or a number. Loss, metrics and predictions.

The names are transformers' `problem_type`, and each loss is the one transformers uses for it: cross-entropy, binary
cross-entropy with logits, mean squared error.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from scipy.special import expit, log_softmax
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from peft_recipes.data.packing import IGNORED
from peft_recipes.recipe.dataset import CLASSES, MULTI_LABEL, REGRESSION
from peft_recipes.tasks import example_scores, metrics


class ProblemType(ABC):
    """Loss, metrics and predictions of one problem type.

    logits: [examples, outputs]. labels: class ids [examples]; 0 and 1 for each class [examples, classes]; numbers
    [examples].
    """

    name: str

    @abstractmethod
    def loss(self, logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
        """The summed loss of all labels but those of masked examples; its mean is transformers' own loss."""

    @abstractmethod
    def losses(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """[examples] the loss of each example."""

    @abstractmethod
    def predicted(self, logits: np.ndarray) -> np.ndarray:
        """What the model predicts, in the form of the labels."""

    @abstractmethod
    def scores(self, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """The metrics other than the loss."""

    @abstractmethod
    def example_scores(self, predicted: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
        """For each metric but the loss, one value per example [examples], whose mean is the metric."""

    def metrics(self, logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        """All metrics of a split."""
        return {**self.scores(self.predicted(logits), labels), "loss": float(self.losses(logits, labels).mean())}

    def per_class(
        self, predicted: np.ndarray, labels: np.ndarray, names: Sequence[str] | None
    ) -> list[dict[str, Any]] | None:
        """The metrics of each class; None for numbers."""
        return metrics.per_class(predicted, labels, names) if names else None

    def column(self, values: np.ndarray) -> list[Any]:
        """Labels or predictions as a column of predictions.parquet."""
        return values.tolist()

    def targets(self, labels: Sequence[Any], classes: int) -> list[Any]:
        """The labels of a dataset (a class id, a list of them, a number) as the trainer takes them."""
        return list(labels)

    def blank_labels(self, size: int, classes: int) -> torch.Tensor:
        """Labels of a batch whose only use is to measure a step."""
        return torch.zeros(size, dtype=torch.long)


class SingleLabel(ProblemType):
    """One class per example: cross-entropy over all outputs."""

    name = CLASSES

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
        return cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)

    def losses(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return -log_softmax(logits.astype(np.float64), axis=1)[np.arange(len(labels)), labels]

    def predicted(self, logits: np.ndarray) -> np.ndarray:
        return logits.argmax(axis=1)

    def scores(self, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return metrics.class_metrics(predicted, labels)

    def example_scores(self, predicted: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
        return example_scores.class_scores(predicted, labels)


class MultiLabel(ProblemType):
    """Any number of classes per example: a sigmoid and binary cross-entropy for each, the mean over classes."""

    name = MULTI_LABEL

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
        labels, counted = labels.float(), labels != IGNORED
        return (binary_cross_entropy_with_logits(logits, labels, reduction="none") * counted).sum()

    def losses(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        logits = logits.astype(np.float64)
        return (np.logaddexp(0, logits) - labels * logits).mean(axis=1)

    def predicted(self, logits: np.ndarray) -> np.ndarray:
        return (expit(logits) > 0.5).astype(int)

    def scores(self, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return metrics.multi_label_metrics(predicted, labels)

    def example_scores(self, predicted: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
        return example_scores.multi_label_scores(predicted, labels)

    def column(self, values: np.ndarray) -> list[Any]:
        return [np.flatnonzero(row).tolist() for row in values]

    def targets(self, labels: Sequence[Any], classes: int) -> list[Any]:
        rows = np.zeros((len(labels), classes))
        for row, ids in zip(rows, labels, strict=True):
            row[ids] = 1
        return rows.tolist()

    def blank_labels(self, size: int, classes: int) -> torch.Tensor:
        return torch.zeros(size, classes)


class Regression(ProblemType):
    """A number per example: one output and the mean squared error, which is the loss and a metric alike."""

    name = REGRESSION

    def loss(self, logits: torch.Tensor, labels: torch.Tensor, smoothing: float) -> torch.Tensor:
        labels, counted = labels.float(), labels != IGNORED
        return (mse_loss(logits.squeeze(-1), labels, reduction="none") * counted).sum()

    def losses(self, logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return (self.predicted(logits) - labels) ** 2

    def predicted(self, logits: np.ndarray) -> np.ndarray:
        return logits.reshape(len(logits)).astype(np.float64)

    def scores(self, predicted: np.ndarray, labels: np.ndarray) -> dict[str, float]:
        return metrics.regression_metrics(predicted, labels)

    def example_scores(self, predicted: np.ndarray, labels: np.ndarray) -> dict[str, np.ndarray]:
        return example_scores.regression_scores(predicted, labels)

    def blank_labels(self, size: int, classes: int) -> torch.Tensor:
        return torch.zeros(size)


PROBLEM_TYPES: dict[str, ProblemType] = {each.name: each for each in (SingleLabel(), MultiLabel(), Regression())}
