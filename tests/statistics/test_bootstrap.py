"""The bootstrap: exact properties first, then those that only many simulated comparisons can show."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from peft_recipes.statistics import bootstrap as st
from peft_recipes.statistics.bootstrap import (
    Difference,
    margin_for,
    metric_interval,
    paired_difference,
    summary,
    verdict,
)

COMPARISONS = 2_000
FEW = 500  # resamples inside simulations; the procedure is that of 10,000


def right_or_wrong(seeds: int, examples: int, chance: float = 0.8, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random((seeds, examples)) < chance).astype(float)


def losses(seeds: int, examples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).gamma(2.0, 0.5, (seeds, examples))


# --- exact properties -------------------------------------------------------------------------------------------------


def test_an_arm_against_its_own_runs_differs_by_exactly_nothing():
    runs = right_or_wrong(3, 50)
    difference = paired_difference(runs, runs)
    assert difference.estimate == 0 and difference.ci95 == (0, 0)
    assert verdict(difference, 0.01, True) == "equivalent"


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_the_estimate_is_the_mean_difference_and_lies_in_its_interval(seeds):
    arm, full = right_or_wrong(seeds, 120, 0.7), right_or_wrong(seeds, 120, 0.8, seed=1)
    difference = paired_difference(arm, full, resamples=1_000)
    assert difference.estimate == pytest.approx(arm.mean() - full.mean())
    assert difference.ci95[0] < difference.estimate < difference.ci95[1]
    assert (difference.seeds, difference.examples) == (seeds, 120)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("make", [right_or_wrong, losses])
def test_swapped_arms_mirror_the_interval(make, weighted):
    arm, full = make(3, 90, seed=2), make(3, 90, seed=3)
    weights = np.arange(1, 91) if weighted else None
    one = paired_difference(arm, full, weights=weights, resamples=500)
    other = paired_difference(full, arm, weights=weights, resamples=500)
    assert other.estimate == pytest.approx(-one.estimate)
    assert other.ci95 == pytest.approx((-one.ci95[1], -one.ci95[0]))


def test_weights_make_the_metric_a_mean_over_tokens():
    arm, full, tokens = losses(2, 40), losses(2, 40, seed=1), np.arange(1, 41)
    weighted = paired_difference(arm, full, weights=tokens, resamples=500).estimate
    assert weighted == pytest.approx(np.average(arm - full, axis=1, weights=tokens).mean())
    assert weighted != pytest.approx((arm - full).mean())


def test_only_the_proportions_of_weights_matter():
    arm, full, tokens = losses(3, 40), losses(3, 40, seed=1), np.arange(1.0, 41.0)
    one = paired_difference(arm, full, weights=tokens, resamples=500)
    assert paired_difference(arm, full, weights=8 * tokens, resamples=500).ci95 == pytest.approx(one.ci95)
    same = paired_difference(arm, full, weights=np.full(40, 7), resamples=500)
    assert same == paired_difference(arm, full, resamples=500)


def test_one_seed_gives_one_interval_and_another_gives_another():
    arm, full = losses(3, 60), losses(3, 60, seed=1)
    once = paired_difference(arm, full, resamples=300, seed=4)
    assert paired_difference(arm, full, resamples=300, seed=4) == once
    assert paired_difference(arm, full, resamples=300, seed=5).ci95 != once.ci95


@pytest.mark.parametrize("jitter", [0.0, 1e-9])
def test_resampled_means_spread_as_theory_says_counted_or_drawn(jitter):
    """Few distinct values are counted, many are drawn row by row: the same distribution."""
    values = right_or_wrong(1, 400)[0] + jitter * np.arange(400)
    means = st._resampled_means(values, np.ones(400), 20_000, np.random.default_rng(0))
    assert means.mean() == pytest.approx(values.mean(), abs=5e-4)
    assert means.std() == pytest.approx(values.std() / 20, rel=0.02)


def test_one_seed_gives_the_textbook_interval_of_paired_differences():
    arm, full = losses(1, 2_000), losses(1, 2_000, seed=1)
    textbook = stats.t.interval(0.95, 1_999, (arm - full).mean(), stats.sem((arm - full)[0]))
    assert paired_difference(arm, full).ci95 == pytest.approx(textbook, abs=0.002)


def test_runs_that_differ_far_more_than_examples_give_the_interval_of_a_t_test():
    """Run means 0, 1, 2 against 0, 1, 2 and nothing else: variance 2/3, four degrees of freedom."""
    arm = np.array([[0.0], [1.0], [2.0]]) + np.zeros((3, 50))
    low, high = paired_difference(arm, arm[[1, 2, 0]]).ci95
    expected = stats.t.ppf(0.975, 4) * np.sqrt(2 / 3)
    assert -low == pytest.approx(high) and high == pytest.approx(min(expected, 2.0), rel=0.03)


def test_pairing_by_example_cancels_difficulty():
    difficulty = np.random.default_rng(0).normal(0, 10, 200)
    arm, full = losses(3, 200) + difficulty, losses(3, 200, seed=1) + difficulty
    low, high = paired_difference(arm, full, resamples=1_000).ci95
    assert high - low < 0.6  # unpaired, difficulty alone would make it 4


def test_more_confidence_is_a_wider_interval():
    arm, full = losses(3, 100), losses(3, 100, seed=1)
    widths = [np.diff(paired_difference(arm, full, confidence=level).ci95)[0] for level in (0.8, 0.95, 0.99)]
    assert widths == sorted(widths) and widths[0] < widths[2]


def test_one_and_two_seeds_say_what_they_cannot_show():
    notes = [paired_difference(losses(n, 20), losses(n, 20, seed=1), resamples=50).note for n in (1, 2, 3)]
    assert "One seed" in notes[0] and "Two seeds" in notes[1] and notes[2] is None


def test_to_dict_is_plain_json():
    fields = Difference(0.5, (0.25, 0.75), 3, 10).to_dict()
    assert fields == {"estimate": 0.5, "ci95": [0.25, 0.75], "seeds": 3, "examples": 10}
    assert Difference(0.5, (0.25, 0.75), 1, 10, "careful").to_dict()["note"] == "careful"


@pytest.mark.parametrize("df", [1, 1.1, 1.5, 2, 3.7, 10, 250, 1e6])
@pytest.mark.parametrize("probability", [0.9, 0.975, 0.995])
def test_student_quantiles_agree_with_scipy(df, probability):
    assert st._student_quantile(probability, df) == pytest.approx(stats.t.ppf(probability, df), rel=1e-4)


@pytest.mark.parametrize(
    ("interval", "higher", "lower"),
    [
        ((-0.009, 0.009), "equivalent", "equivalent"),
        ((-0.01, 0.01), "equivalent", "equivalent"),
        ((0.002, 0.008), "equivalent", "equivalent"),
        ((0.002, 0.02), "better", "worse"),
        ((-0.02, -0.002), "worse", "better"),
        ((-0.002, 0.02), "not shown", "not shown"),
        ((-0.02, 0.02), "not shown", "not shown"),
        ((0.0, 0.02), "not shown", "not shown"),
    ],
)
def test_the_verdict_follows_from_the_interval_alone(interval, higher, lower):
    difference = Difference(0.0, interval, 3, 100)
    assert verdict(difference, 0.01, higher_is_better=True) == higher
    assert verdict(difference, 0.01, higher_is_better=False) == lower


def test_margins_are_a_point_of_accuracy_and_a_percent_of_the_loss():
    assert margin_for("accuracy", 0.9) == margin_for("macro_f1", 0.9) == margin_for("token_accuracy", 0.4) == 0.01
    assert margin_for("loss", 2.5) == pytest.approx(0.025)
    with pytest.raises(ValueError, match="perplexity"):
        margin_for("perplexity", 12.0)
    with pytest.raises(ValueError, match="nan"):
        margin_for("loss", float("nan"))


def test_summary_has_no_deviation_for_one_value():
    assert summary([0.5]) == (0.5, None)
    assert summary([1.0, 3.0]) == (2.0, pytest.approx(np.sqrt(2)))
    with pytest.raises(ValueError):
        summary([])


def test_a_metric_interval_holds_the_mean_and_stays_within_what_scores_can_be():
    runs = right_or_wrong(2, 30, 0.95)
    low, high = metric_interval(runs)
    assert 0 <= low < runs.mean() < high <= 1
    assert metric_interval(np.ones((3, 20))) == (1, 1)


@pytest.mark.parametrize(
    ("arm", "full", "weights", "message"),
    [
        (np.ones((2, 5)), np.ones((3, 5)), None, "2 seeds x 5 examples, full has 3 x 5"),
        (np.ones((2, 5)), np.ones((2, 6)), None, "same test examples"),
        (np.ones(5), np.ones(5), None, r"\[seeds, examples\]"),
        (np.ones((2, 0)), np.ones((2, 0)), None, "two test examples"),
        (np.ones((0, 5)), np.ones((0, 5)), None, "at least one seed"),
        (np.array([[1.0, 2.0], [1.0, np.nan]]), np.ones((2, 2)), None, "arm holds 1 .* seed row 1, example 1"),
        (np.ones((2, 2)), np.full((2, 2), np.inf), None, "full holds 4 .* not finite"),
        (np.ones((2, 5)), np.ones((2, 5)), np.ones(4), r"one number an example \(5\)"),
        (np.ones((2, 2)), np.ones((2, 2)), np.array([1, 0]), "above 0"),
    ],
)
def test_scores_that_cannot_be_compared_are_refused(arm, full, weights, message):
    with pytest.raises(ValueError, match=message):
        paired_difference(arm, full, weights=weights)


def test_settings_that_make_no_interval_are_refused():
    for settings in ({"resamples": 0}, {"confidence": 1.0}, {"confidence": 0.0}):
        with pytest.raises(ValueError, match="resamples >= 1 and 0 < confidence < 1"):
            paired_difference(right_or_wrong(2, 9), right_or_wrong(2, 9, seed=1), **settings)
    with pytest.raises(ValueError, match="margin"):
        verdict(Difference(0, (0, 0), 1, 2), -0.01, True)


# --- many comparisons -------------------------------------------------------------------------------------------------


def accuracy_runs(seeds, examples, run_sd, rng, gap=0.0):
    """[2, seeds, examples] of 0/1: chances logit normal; a run effect (sd in accuracy) moves the undecided most."""
    chance = 1 / (1 + np.exp(-rng.normal(1.5, 1.5, examples)))
    moves = chance * (1 - chance) / 0.1398  # 1 on average
    effects = rng.normal(0, run_sd, (2, seeds, 1)) + np.array([gap, 0.0])[:, None, None]
    return (rng.random((2, seeds, examples)) < chance + effects * moves).astype(float)


def loss_runs(seeds, examples, run_sd, rng):
    """[2, seeds, examples] of skewed losses: difficulty, run effect, noise."""
    noise = rng.gamma(2.0, 0.15, (2, seeds, examples)) - 0.3
    return rng.gamma(4.0, 0.25, examples) + rng.normal(0, run_sd, (2, seeds, 1)) + noise


def intervals(make, *shape, **options):
    """[2,000, 2] intervals of comparisons on fresh examples with fresh runs."""
    rng = np.random.default_rng(7)
    weights = rng.integers(10, 200, shape[1]) if make is loss_runs else None
    pairs = (make(*shape, rng, **options) for _ in range(COMPARISONS))
    return np.array(
        [
            paired_difference(arm, full, weights=weights, resamples=FEW, seed=number).ci95
            for number, (arm, full) in enumerate(pairs)
        ]
    )


def excluded(bounds: np.ndarray) -> float:
    return float(np.mean((bounds[:, 0] > 0) | (bounds[:, 1] < 0)))


@pytest.mark.parametrize(
    ("make", "seeds", "examples", "run_sd"),
    [
        (accuracy_runs, 1, 300, 0.0),
        (accuracy_runs, 2, 300, 0.01),
        (accuracy_runs, 3, 300, 0.0),
        (accuracy_runs, 3, 300, 0.01),
        (accuracy_runs, 3, 200, 0.04),
        (accuracy_runs, 5, 500, 0.02),
        (loss_runs, 3, 200, 0.0),
        (loss_runs, 3, 200, 0.02),
        (loss_runs, 5, 200, 0.1),
    ],
)
def test_without_a_difference_three_to_seven_percent_of_intervals_exclude_zero(make, seeds, examples, run_sd):
    assert 0.03 <= excluded(intervals(make, seeds, examples, run_sd)) <= 0.07


def test_one_seed_cannot_protect_against_what_another_seed_would_change():
    """Why the note exists, and that these simulations can fail."""
    assert excluded(intervals(accuracy_runs, 1, 300, 0.03)) > 0.15


def test_an_arm_against_itself_under_other_seeds_is_seldom_better_or_worse():
    bounds = intervals(accuracy_runs, 3, 400, 0.015)
    claims = [verdict(Difference(0.0, tuple(b), 3, 400), 0.01, True) for b in bounds]
    assert 0.005 <= np.mean([claim == "better" for claim in claims]) <= 0.04
    assert 0.005 <= np.mean([claim == "worse" for claim in claims]) <= 0.04


@pytest.mark.parametrize(("seeds", "run_sd"), [(1, 0.0), (3, 0.01), (5, 0.0), (5, 0.02)])
def test_three_points_are_found_as_often_as_theory_says(seeds, run_sd):
    """Between the t test that learns the variance from the runs' means and the z test that knows it."""
    examples, pool = 500, np.random.default_rng(0).normal(1.5, 1.5, 200_000)
    chance = 1 / (1 + np.exp(-pool))
    variance = (2 * run_sd**2 + 2 * np.mean(chance * (1 - chance)) / examples) / seeds
    shift, df = 0.03 / np.sqrt(variance), 2 * (seeds - 1) or examples - 1
    best = stats.norm.sf(stats.norm.ppf(0.975) - shift)
    learned = stats.nct.sf(stats.t.ppf(0.975, df), df, shift)
    bounds = intervals(accuracy_runs, seeds, examples, run_sd, gap=-0.03)
    found = np.mean(bounds[:, 1] < 0)
    assert learned - 0.03 <= found <= best + 0.03
    assert np.mean(bounds[:, 0] > 0) <= 0.01  # the wrong sign
