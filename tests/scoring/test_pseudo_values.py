"""Pseudo-values: their mean is the metric, their spread that of the metric over samples of examples."""

import numpy as np
import pytest

from peft_recipes.scoring.pseudo_values import pseudo_values


def _f1(sums):
    correct, predicted, true = sums
    return 2 * correct / (predicted + true) if predicted + true else 0.0


@pytest.fixture(scope="module")
def counts():
    random = np.random.default_rng(0)
    true, predicted = random.integers(0, 5, 300), random.integers(0, 5, 300)
    return np.stack([random.binomial(np.minimum(true, predicted), 0.7), predicted, true], axis=1)


def test_their_mean_is_the_metric(counts):
    assert pseudo_values(_f1, counts).mean() == pytest.approx(_f1(counts.sum(axis=0)), abs=1e-12)


def test_of_a_mean_they_are_the_values_themselves():
    values = np.random.default_rng(1).random(50)
    ones = np.ones_like(values)
    mean = pseudo_values(lambda sums: sums[0] / sums[1], np.stack([values, ones], axis=1))
    assert np.allclose(mean, values)


def test_their_standard_error_is_that_of_the_metric_over_samples(counts):
    random, count = np.random.default_rng(2), len(counts)
    resampled = [_f1(counts[random.integers(0, count, count)].sum(axis=0)) for _ in range(2_000)]
    error = pseudo_values(_f1, counts).std(ddof=1) / np.sqrt(count)
    assert error == pytest.approx(np.std(resampled), rel=0.06)


def test_one_example_has_the_metric_as_its_value():
    assert pseudo_values(_f1, np.array([[1, 1, 2]])).tolist() == [pytest.approx(2 / 3)]
