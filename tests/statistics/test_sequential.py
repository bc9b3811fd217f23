"""Intervals over several looks: their levels against the literature and simulation, false claims at most 5 %."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from peft_recipes.statistics import sequential
from peft_recipes.statistics.bootstrap import paired_difference, verdict
from peft_recipes.statistics.sequential import SequentialPlan, levels_of, plan_seeds, resamples_for


def test_the_boundaries_are_those_of_the_textbook():
    """Pocock's constant boundary for five equal looks is 2.413 (Jennison & Turnbull 2000, table 2.1)."""
    times = np.arange(1, 6) / 5
    pocock = np.full(5, 2.413)
    walks = np.cumsum(np.random.default_rng(0).standard_normal((200_000, 5)), axis=1) / np.sqrt(np.arange(1, 6))
    spent = np.array([(np.abs(walks[:, : look + 1]) > pocock[: look + 1]).any(axis=1).mean() for look in range(5)])
    assert spent[-1] == pytest.approx(0.05, abs=0.002)
    assert sequential._boundaries(times, spent) == pytest.approx(pocock, abs=0.03)


@pytest.mark.parametrize(("first", "most", "alpha"), [(3, 10, 0.05), (3, 5, 0.05), (5, 20, 0.05), (3, 10, 0.05 / 12)])
def test_over_all_looks_a_brownian_motion_leaves_the_boundaries_with_probability_alpha(first, most, alpha):
    levels = np.array(levels_of(first, most, alpha))
    steps = np.random.default_rng(1).standard_normal((200_000, most))
    statistics = (np.cumsum(steps, axis=1) / np.sqrt(np.arange(1, most + 1)))[:, first - 1 :]
    beyond = np.abs(statistics) > stats.norm.isf(levels / 2)
    spent = beyond.cumsum(axis=1).astype(bool).mean(axis=0)
    allowed = alpha * (np.arange(first, most + 1) / most) ** 2
    assert spent == pytest.approx(allowed, abs=4 * np.sqrt(alpha / 200_000))


def test_a_single_look_is_a_fixed_design():
    assert plan_seeds((), 3, 1).confidence(3) == 0.95
    assert plan_seeds((), 3, 4).confidence(3, 4) == 1 - 0.05 / 4


def test_a_plan_begins_with_the_given_seeds_and_goes_on_with_the_smallest_others():
    plan = plan_seeds([7, 1], 5, 2)
    assert plan == SequentialPlan((7, 1, 0, 2, 3), 3, 2)
    assert plan_seeds(range(4), 6, 1).first == 4 and plan.confidence(2) is None
    confidences = [plan_seeds((), 10, 1).confidence(seeds) for seeds in range(3, 11)]
    assert all(0.95 < confidence < 1 for confidence in confidences) and confidences[0] > confidences[-1]
    assert all(plan.confidence(n, 2) > plan.confidence(n) for n in (3, 4, 5))
    assert SequentialPlan.from_dict(plan.to_dict()) == plan
    for given, most in (((), 2), (range(6), 5)):
        with pytest.raises(ValueError, match=r"look|given"):
            plan_seeds(given, most, 1)


def test_an_interval_of_high_confidence_has_resamples_in_its_tails():
    assert resamples_for(0.95) == resamples_for(0.998) == 10_000 and resamples_for(0.9999) > 99_999


@pytest.mark.parametrize(("gap", "false"), [(0.0, ("better", "worse")), (-0.03, ("equivalent", "better"))])
def test_adding_seeds_until_it_is_decided_makes_at_most_5_percent_false_claims(gap, false):
    """Equal arms, and an arm that is worse by just the margin; looked at with 95 % each time, it would be 13 %."""
    plan, rng, comparisons, made = plan_seeds((), 6, 1), np.random.default_rng(0), 250, {"plan": 0, "naive": 0}
    for number in range(comparisons):
        chance = 1 / (1 + np.exp(-rng.normal(1.5, 1.5, 300)))
        effects = 0.02 * rng.standard_normal((2, 6, 1)) + np.array([gap, 0])[:, None, None]
        arm, full = (rng.random((2, 6, 300)) < chance + effects * chance * (1 - chance) / 0.1398).astype(float)
        for kind in made:
            for seeds in range(3, 7):
                confidence = plan.confidence(seeds) if kind == "plan" else 0.95
                options = {"resamples": 1_000, "seed": number, "confidence": confidence}
                claim = verdict(paired_difference(arm[:seeds], full[:seeds], **options), 0.03, True)
                if claim != "not shown":
                    made[kind] += claim in false
                    break
    assert made["plan"] / comparisons < 0.05 + 2 * np.sqrt(0.05 * 0.95 / comparisons)
    assert made["plan"] < made["naive"]
