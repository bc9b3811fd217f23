"""The bootstrap: exact properties, then error rates and power over many simulated comparisons."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from peft_recipes.recipe.metrics import margin_for
from peft_recipes.statistics import bootstrap
from peft_recipes.statistics.bootstrap import (
    Difference,
    difference_from,
    metric_interval,
    paired_difference,
    simultaneous,
    verdict,
)

COMPARISONS = 2_000
FEW = 500  # resamples in simulations, instead of 10,000


def right_or_wrong(seeds: int, examples: int, chance: float = 0.8, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random((seeds, examples)) < chance).astype(float)


def losses(seeds: int, examples: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).gamma(2.0, 0.5, (seeds, examples))


# --- exact properties -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
@pytest.mark.parametrize("chance", [0.0, 0.8, 1.0])
def test_without_a_disagreement_among_n_examples_a_rate_of_3_in_n_is_not_excluded(seeds, chance):
    for examples, called in {
        2: "not shown",
        20: "not shown",
        100: "not shown",
        300: "equivalent",
        1000: "equivalent",
    }.items():
        runs = right_or_wrong(seeds, examples, chance)
        difference = paired_difference(runs, runs)
        low, high = difference.ci95
        assert difference.estimate == 0 and low == -high
        assert high == pytest.approx(min(3 / examples, 1), rel=0.01)
        assert verdict(difference, 0.01, True) == called


def test_a_win_rate_is_compared_with_one_half_like_the_metric_of_one_arm():
    wins = np.random.default_rng(0).choice([0.0, 0.5, 1.0], (3, 60), p=[0.2, 0.3, 0.5])
    difference = difference_from(wins, 0.5)
    low, high = metric_interval(wins, share=True)
    assert difference.estimate == pytest.approx(wins.mean() - 0.5) and difference.examples == 60
    assert difference.ci95 == pytest.approx((low - 0.5, high - 0.5)) and difference.note is None
    ties = difference_from(np.full((1, 100), 0.5), 0.5)  # an unseen win or loss moves it by one half
    assert ties.estimate == 0 and ties.ci95 == pytest.approx((-0.015, 0.015), rel=0.02) and ties.note
    assert difference_from(np.ones((1, 20)), 0.5).ci95[1] == 0.5


def test_one_disagreement_widens_the_interval_about_as_clopper_and_pearson():
    """One-sided limits at 95 %, the rate of one event seen; the side without an event keeps 3/n or less."""
    full = np.ones((1, 200))
    arm = full.copy()
    arm[0, 7] = 0
    low, high = paired_difference(arm, full).ci95
    assert low == pytest.approx(-stats.beta.ppf(0.95, 2, 199), rel=0.05) and 0.5 * 3 / 200 < high <= 3 / 200
    assert paired_difference(full, arm).ci95 == (-high, -low)


@pytest.mark.parametrize("seeds", [1, 3])
def test_all_right_or_all_wrong_does_not_mean_certain(seeds):
    assert metric_interval(np.ones((seeds, 20))) == (pytest.approx(0.85, abs=0.002), 1)
    assert metric_interval(np.zeros((seeds, 20))) == (0, pytest.approx(0.15, abs=0.002))
    always = paired_difference(np.ones((seeds, 20)), np.zeros((seeds, 20)))
    assert always.ci95 == (pytest.approx(0.85, abs=0.002), 1)


def test_runs_that_are_all_right_and_all_wrong_have_a_wide_metric():
    low, high = metric_interval(np.array([[1.0] * 30, [0.0] * 30]))
    assert (low, high) == (0, 1)


def test_a_loss_has_no_width_only_where_its_difference_is_constant():
    full = losses(2, 5)
    assert paired_difference(full + 0.25, full).ci95 == (pytest.approx(0.25), pytest.approx(0.25))
    low, high = paired_difference(losses(2, 2), losses(2, 2, seed=1)).ci95
    assert high - low > 1


def test_two_examples_show_nothing_even_where_the_losses_of_the_arms_do_not_overlap():
    """The interval is not cut at the difference of the extreme losses."""
    low, high = paired_difference(np.array([[1.2, 1.3]]), np.array([[1.0, 1.15]])).ci95
    assert low < 0 < high


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("wrong", [0, 1, 4])
def test_swapped_arms_mirror_an_interval_of_few_disagreements_exactly(seeds, wrong):
    arm, full = np.ones((seeds, 40)), np.ones((seeds, 40))
    arm[:, :wrong], full[0, 30:31] = 0, 0
    low, high = paired_difference(arm, full).ci95
    assert paired_difference(full, arm).ci95 == (-high, -low) and low < high
    assert paired_difference(arm, full).ci95 == (low, high)


def test_intervals_that_hold_together_are_wider():
    assert simultaneous(1) == pytest.approx(0.95) and simultaneous(10) == pytest.approx(0.995)
    arm, full = right_or_wrong(3, 200), right_or_wrong(3, 200, seed=1)
    widths = [np.diff(paired_difference(arm, full, confidence=simultaneous(k)).ci95)[0] for k in (1, 2, 12)]
    assert widths == sorted(widths) and widths[2] > 1.3 * widths[0]


@pytest.mark.parametrize("seeds", [1, 2, 3, 5])
def test_the_estimate_is_the_mean_difference_and_is_inside_its_interval(seeds):
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


def test_with_weights_the_metric_is_a_mean_over_tokens():
    arm, full, tokens = losses(2, 40), losses(2, 40, seed=1), np.arange(1, 41)
    weighted = paired_difference(arm, full, weights=tokens, resamples=500).estimate
    assert weighted == pytest.approx(np.average(arm - full, axis=1, weights=tokens).mean())
    assert weighted != pytest.approx((arm - full).mean())


def test_scaling_the_weights_changes_nothing():
    arm, full, tokens = losses(3, 40), losses(3, 40, seed=1), np.arange(1.0, 41.0)
    one = paired_difference(arm, full, weights=tokens, resamples=500)
    assert paired_difference(arm, full, weights=8 * tokens, resamples=500).ci95 == pytest.approx(one.ci95)
    same = paired_difference(arm, full, weights=np.full(40, 7), resamples=500)
    assert same == paired_difference(arm, full, resamples=500)


def test_the_interval_depends_on_the_seed_of_the_bootstrap_only():
    arm, full = losses(3, 60), losses(3, 60, seed=1)
    once = paired_difference(arm, full, resamples=300, seed=4)
    assert paired_difference(arm, full, resamples=300, seed=4) == once
    assert paired_difference(arm, full, resamples=300, seed=5).ci95 != once.ci95


@pytest.mark.parametrize("jitter", [0.0, 1e-9])
def test_resampled_means_have_the_standard_error_of_the_mean(jitter):
    """Few distinct values are drawn as multinomial counts, many by index: the distribution is the same."""
    values = right_or_wrong(1, 400)[0] + jitter * np.arange(400)
    means = bootstrap._resampled_means(values, np.ones(400), 20_000, np.random.default_rng(0))
    assert means.mean() == pytest.approx(values.mean(), abs=5e-4)
    assert means.std() == pytest.approx(values.std() / 20, rel=0.02)


def test_with_one_seed_the_interval_is_the_paired_t_interval():
    arm, full = losses(1, 2_000), losses(1, 2_000, seed=1)
    expected = stats.t.interval(0.95, 1_999, (arm - full).mean(), stats.sem((arm - full)[0]))
    assert paired_difference(arm, full).ci95 == pytest.approx(expected, abs=0.002)


def test_without_variation_between_examples_the_interval_is_that_of_a_t_test_on_run_means():
    """Run means 0, 1, 2 against 1, 2, 0: variance 2/3, four degrees of freedom."""
    arm = np.array([[0.0], [1.0], [2.0]]) + np.zeros((3, 50))
    low, high = paired_difference(arm, arm[[1, 2, 0]]).ci95
    expected = stats.t.ppf(0.975, 4) * np.sqrt(2 / 3)
    assert -low == pytest.approx(high) and high == pytest.approx(expected, rel=0.03)


def test_pairing_cancels_the_difficulty_of_examples():
    difficulty = np.random.default_rng(0).normal(0, 10, 200)
    arm, full = losses(3, 200) + difficulty, losses(3, 200, seed=1) + difficulty
    low, high = paired_difference(arm, full, resamples=1_000).ci95
    assert high - low < 0.6  # unpaired, difficulty alone would make it 4


def test_a_higher_confidence_gives_a_wider_interval():
    arm, full = losses(3, 100), losses(3, 100, seed=1)
    widths = [np.diff(paired_difference(arm, full, confidence=level).ci95)[0] for level in (0.8, 0.95, 0.99)]
    assert widths == sorted(widths) and widths[0] < widths[2]


def test_one_and_two_seeds_come_with_a_note():
    notes = [paired_difference(losses(n, 20), losses(n, 20, seed=1), resamples=50).note for n in (1, 2, 3)]
    assert "One seed" in notes[0] and "Two seeds" in notes[1] and notes[2] is None


def test_to_dict_returns_json_types():
    fields = Difference(0.5, (0.25, 0.75), 3, 10).to_dict()
    assert fields == {"estimate": 0.5, "ci95": [0.25, 0.75], "seeds": 3, "examples": 10}
    assert Difference(0.5, (0.25, 0.75), 1, 10, "careful").to_dict()["note"] == "careful"


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
def test_the_verdict_depends_on_the_interval_only(interval, higher, lower):
    difference = Difference(0.0, interval, 3, 100)
    assert verdict(difference, 0.01, higher_is_better=True) == higher
    assert verdict(difference, 0.01, higher_is_better=False) == lower


def test_the_margin_is_one_point_of_accuracy_or_one_percent_of_the_loss():
    assert margin_for("accuracy", 0.9) == margin_for("macro_f1", 0.9) == margin_for("token_accuracy", 0.4) == 0.01
    assert margin_for("loss", 2.5) == pytest.approx(0.025)
    assert margin_for("perplexity", 12.0) == pytest.approx(0.12)
    with pytest.raises(ValueError, match="Did you mean 'perplexity'"):
        margin_for("perplexty", 12.0)
    with pytest.raises(ValueError, match="nan"):
        margin_for("loss", float("nan"))


def test_a_metric_interval_contains_the_mean_and_stays_in_the_range_of_the_scores():
    runs = right_or_wrong(2, 30, 0.95)
    low, high = metric_interval(runs)
    assert 0 <= low < runs.mean() < high <= 1


@pytest.mark.parametrize(
    ("arm", "full", "weights", "message"),
    [
        (np.ones((2, 5)), np.ones((3, 5)), None, "2 seeds x 5 examples, full has 3 x 5"),
        (np.ones((2, 5)), np.ones((2, 6)), None, "same test examples"),
        (np.ones(5), np.ones(5), None, r"\[seeds, examples\]"),
        (np.ones((2, 0)), np.ones((2, 0)), None, "two test examples"),
        (np.ones((0, 5)), np.ones((0, 5)), None, "at least one seed"),
        (np.array([[1.0, 2.0], [1.0, np.nan]]), np.ones((2, 2)), None, "arm has 1 .* seed row 1, example 1"),
        (np.ones((2, 2)), np.full((2, 2), np.inf), None, "full has 4 .* not finite"),
        (np.ones((2, 5)), np.ones((2, 5)), np.ones(4), r"one number per example \(5\)"),
        (np.ones((2, 2)), np.ones((2, 2)), np.array([1, 0]), "above 0"),
    ],
)
def test_scores_that_cannot_be_compared_are_an_error(arm, full, weights, message):
    with pytest.raises(ValueError, match=message):
        paired_difference(arm, full, weights=weights)


def test_invalid_settings_are_an_error():
    for settings in ({"resamples": 0}, {"confidence": 1.0}, {"confidence": 0.0}):
        with pytest.raises(ValueError, match="resamples >= 1 and 0 < confidence < 1"):
            paired_difference(right_or_wrong(2, 9), right_or_wrong(2, 9, seed=1), **settings)
    with pytest.raises(ValueError, match="margin"):
        verdict(Difference(0, (0, 0), 1, 2), -0.01, True)


# --- many comparisons -------------------------------------------------------------------------------------------------


def accuracy_runs(seeds, examples, run_sd, rng, gap=0.0):
    """Simulate [2, seeds, examples] of 0/1: logit-normal chances, run effects (sd in accuracy) largest near 0.5."""
    chance = 1 / (1 + np.exp(-rng.normal(1.5, 1.5, examples)))
    moves = chance * (1 - chance) / 0.1398  # 1 on average
    effects = rng.normal(0, run_sd, (2, seeds, 1)) + np.array([gap, 0.0])[:, None, None]
    return (rng.random((2, seeds, examples)) < chance + effects * moves).astype(float)


def loss_runs(seeds, examples, run_sd, rng):
    """Simulate [2, seeds, examples] of skewed losses: difficulty, run effect, noise."""
    noise = rng.gamma(2.0, 0.15, (2, seeds, examples)) - 0.3
    return rng.gamma(4.0, 0.25, examples) + rng.normal(0, run_sd, (2, seeds, 1)) + noise


def intervals(make, *shape, **options):
    """Return [2,000, 2] intervals of comparisons with new examples and runs."""
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
def test_three_to_seven_percent_of_intervals_of_equal_arms_exclude_zero(make, seeds, examples, run_sd):
    assert 0.03 <= excluded(intervals(make, seeds, examples, run_sd)) <= 0.07


def test_one_seed_makes_false_claims_where_runs_vary():
    """Why `note` exists; also shows that these simulations can fail."""
    assert excluded(intervals(accuracy_runs, 1, 300, 0.03)) > 0.15


def test_equal_arms_are_rarely_called_better_or_worse():
    bounds = intervals(accuracy_runs, 3, 400, 0.015)
    claims = [verdict(Difference(0.0, tuple(b), 3, 400), 0.01, True) for b in bounds]
    assert 0.005 <= np.mean([claim == "better" for claim in claims]) <= 0.04
    assert 0.005 <= np.mean([claim == "worse" for claim in claims]) <= 0.04


@pytest.mark.parametrize(("seeds", "run_sd"), [(1, 0.0), (3, 0.01), (5, 0.0), (5, 0.02)])
def test_the_power_lies_between_that_of_the_t_test_and_the_z_test(seeds, run_sd):
    """The t test estimates the variance from the run means; the z test knows it. The difference is three points."""
    examples, pool = 500, np.random.default_rng(0).normal(1.5, 1.5, 200_000)
    chance = 1 / (1 + np.exp(-pool))
    variance = (2 * run_sd**2 + 2 * np.mean(chance * (1 - chance)) / examples) / seeds
    shift, df = 0.03 / np.sqrt(variance), 2 * (seeds - 1) or examples - 1
    z_test = stats.norm.sf(stats.norm.ppf(0.975) - shift)
    t_test = stats.nct.sf(stats.t.ppf(0.975, df), df, shift)
    bounds = intervals(accuracy_runs, seeds, examples, run_sd, gap=-0.03)
    power = np.mean(bounds[:, 1] < 0)
    assert t_test - 0.03 <= power <= z_test + 0.03
    assert np.mean(bounds[:, 0] > 0) <= 0.01  # the wrong sign
