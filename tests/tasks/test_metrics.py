"""Metrics compared with scikit-learn and with arithmetic."""

import math

import numpy as np
import pytest
from sklearn.metrics import accuracy_score, classification_report, f1_score, matthews_corrcoef

from peft_recipes.tasks import metrics


@pytest.fixture
def predicted():
    random = np.random.default_rng(0)
    references = random.choice(5, size=300, p=[0.6, 0.2, 0.1, 0.08, 0.02])
    return np.where(random.random(300) < 0.7, references, random.integers(0, 5, size=300)), references


def test_accuracy_macro_f1_and_mcc_equal_sklearns(predicted):
    predictions, references = predicted
    assert metrics.class_metrics(predictions, references) == {
        "accuracy": accuracy_score(references, predictions),
        "macro_f1": pytest.approx(f1_score(references, predictions, average="macro")),
        "mcc": pytest.approx(matthews_corrcoef(references, predictions)),
    }


def test_the_per_class_report_equals_sklearns(predicted):
    predictions, references = predicted
    labels = ["ham", "spam", "eggs", "milk", "tea"]
    rows = metrics.per_class(predictions, references, labels)
    expected = classification_report(references, predictions, target_names=labels, output_dict=True)
    assert [row["label"] for row in rows] == labels
    for row in rows:
        report = expected[row["label"]]
        assert row["precision"] == report["precision"] and row["recall"] == report["recall"]
        assert row["f1"] == report["f1-score"] and row["support"] == report["support"]


def test_a_class_without_examples_has_zeros_and_is_listed():
    rows = metrics.per_class(np.array([0, 0]), np.array([0, 2]), ["a", "b", "c"])
    assert rows[1] == {"label": "b", "precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0}
    assert rows[2] == {"label": "c", "precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 1}


def test_losses_are_means_over_tokens_not_over_examples():
    found = metrics.token_metrics(
        np.array([2 * math.log(2), math.log(8), 0.0]), np.array([2, 1, 0]), np.array([1, 0, 0])
    )
    assert found == {
        "loss": pytest.approx(5 / 3 * math.log(2)),
        "perplexity": pytest.approx(2 ** (5 / 3)),
        "token_accuracy": 1 / 3,
    }
    assert metrics.token_metrics(np.array([1000.0]), np.array([1]), np.array([0]))["perplexity"] == math.inf
    with pytest.raises(ValueError, match="at least one labelled token"):
        metrics.token_metrics(np.array([1.0]), np.array([0]), np.array([0]))


def test_a_pair_without_a_preference_counts_half():
    scores = metrics.preference_scores(np.array([2.0, -1.0, 0.0, 0.1, -0.1]), 0.1)
    assert scores.tolist() == [1.0, 0.0, 0.5, 0.5, 0.5]
