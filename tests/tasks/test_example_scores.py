"""Per-example scores of a classifier: their mean is the metric, and they are the jackknife of the library's metric."""

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import f1_score, matthews_corrcoef

from peft_recipes.tasks import example_scores, metrics


def classes(count=60, seed=0):
    random = np.random.default_rng(seed)
    labels = random.choice(4, size=count, p=[0.5, 0.3, 0.15, 0.05])
    return np.where(random.random(count) < 0.7, labels, random.integers(0, 4, count)), labels


def several(count=60, seed=0):
    random = np.random.default_rng(seed)
    labels = (random.random((count, 5)) < [0.5, 0.3, 0.2, 0.1, 0.0]).astype(int)
    return np.where(random.random(labels.shape) < 0.8, labels, 1 - labels), labels


def numbers(count=60, seed=0):
    random = np.random.default_rng(seed)
    labels = np.round(random.normal(3, 1, count), 1)  # with ties
    return np.round(labels + random.normal(0, 1, count), 1), labels


KINDS = {
    "classes": (classes, metrics.class_metrics, example_scores.class_scores),
    "several": (several, metrics.multi_label_metrics, example_scores.multi_label_scores),
    "numbers": (numbers, metrics.regression_metrics, example_scores.regression_scores),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("count", [2, 60])
def test_the_mean_of_an_examples_scores_is_the_metric(kind, count):
    make, measure, score = KINDS[kind]
    predicted, labels = make(count)
    found, scores = measure(predicted, labels), score(predicted, labels)
    assert set(found) == set(scores)
    for name, value in found.items():
        assert scores[name].shape == (count,)
        assert scores[name].mean() == pytest.approx(value, abs=1e-12), name


@pytest.mark.parametrize(
    ("kind", "name", "library"),
    [
        ("classes", "macro_f1", lambda p, y: f1_score(y, p, average="macro", zero_division=0)),
        ("classes", "mcc", lambda p, y: matthews_corrcoef(y, p)),
        ("several", "macro_f1", lambda p, y: f1_score(y, p, average="macro", zero_division=0)),
        ("several", "micro_f1", lambda p, y: f1_score(y, p, average="micro", zero_division=0)),
        ("numbers", "pearson", lambda p, y: pearsonr(p, y).statistic),
        ("numbers", "spearman", lambda p, y: spearmanr(p, y).statistic),
    ],
)
def test_an_examples_score_follows_from_the_librarys_metric_without_it(kind, name, library):
    make, _, score = KINDS[kind]
    predicted, labels = make()
    count = len(labels)
    without = np.array([library(np.delete(predicted, i, 0), np.delete(labels, i, 0)) for i in range(count)])
    pseudo = count * library(predicted, labels) - (count - 1) * without
    expected = pseudo - pseudo.mean() + library(predicted, labels)
    assert score(predicted, labels)[name] == pytest.approx(expected, abs=1e-9)


def test_ranks_in_parts_give_the_same_spearman_scores(monkeypatch):
    predicted, labels = numbers()
    expected = example_scores.regression_scores(predicted, labels)["spearman"]
    monkeypatch.setattr(example_scores, "_PAIRS_AT_ONCE", 200)
    assert np.array_equal(example_scores.regression_scores(predicted, labels)["spearman"], expected)


def test_a_constant_prediction_has_no_correlation():
    found = metrics.regression_metrics(np.full(4, 2.0), np.array([1.0, 2.0, 3.0, 4.0]))
    assert (found["pearson"], found["spearman"], found["mse"]) == (0.0, 0.0, 1.5)
    scores = example_scores.regression_scores(np.full(4, 2.0), np.array([1.0, 2.0, 3.0, 4.0]))
    assert scores["pearson"].tolist() == [0.0] * 4 and scores["spearman"].tolist() == [0.0] * 4


def test_several_labels_are_right_only_together():
    predicted, labels = np.array([[1, 0], [1, 1], [0, 0]]), np.array([[1, 0], [1, 0], [0, 0]])
    assert example_scores.multi_label_scores(predicted, labels)["accuracy"].tolist() == [1, 0, 1]
    assert metrics.multi_label_metrics(predicted, labels)["accuracy"] == pytest.approx(2 / 3)
    assert metrics.per_class(predicted, labels, ["a", "b"])[1] == {
        "label": "b", "precision": 0.0, "recall": 0.0, "f1": 0.0, "support": 0
    }  # fmt: skip
