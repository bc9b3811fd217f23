"""The rule of `compare --drop`: who leaves a race, and who never does."""

from __future__ import annotations

import numpy as np
import pytest

from peft_recipes.statistics.dropping import ALPHA, Race


@pytest.fixture
def race():
    return Race(rounds=8, seeds=3, arms=4, margin=0.01)


def right(share, examples=400, seed=0):
    """Scores of which this share is 1; with one seed, the examples of a lower share are among those of a higher."""
    return (np.random.default_rng(seed).permutation(examples) < share * examples).astype(float)


def test_an_arm_that_is_far_behind_and_flat_leaves_with_its_figures(race):
    now = {"full": right(0.9), "lora": right(0.88), "head": right(0.6)}
    (behind,) = race.behind(4, now, {**now, "lora": right(0.85)})
    assert (behind.arm, behind.leader) == ("head", "full")
    assert behind.difference == pytest.approx(0.3) and 0.01 < behind.low < 0.3
    assert behind.projected == pytest.approx(0.3)  # it has not improved


def test_an_arm_that_would_catch_up_stays(race):
    now = {"full": right(0.9), "lora": right(0.6)}
    assert race.behind(4, now, {"full": right(0.9), "lora": right(0.5)}) == []  # 10 points a round, 4 rounds to go
    assert race.behind(6, now, {"full": right(0.9), "lora": right(0.5)})  # 2 rounds to go
    assert race.behind(4, now, {"full": right(0.8), "lora": right(0.7)})  # it gets worse


def test_what_is_within_the_margin_or_the_noise_stays(race):
    full = right(0.9)
    assert race.behind(4, {"full": full, "lora": right(0.895)}, {"full": full, "lora": right(0.895)}) == []
    few = {"full": right(0.9, 40), "lora": right(0.75, 40, seed=1)}
    assert race.behind(4, few, few) == []


def test_full_is_never_dropped_and_can_be_the_one_that_others_are_behind(race):
    now = {"full": right(0.5), "lora": right(0.9), "head": right(0.4)}
    assert [each.arm for each in race.behind(5, now, now)] == ["head"]
    assert {each.arm for each in race.behind(5, now, now, keep=())} == {"full", "head"}


def test_nothing_is_dropped_in_the_first_half_nor_when_a_run_has_ended(race):
    now = {"full": right(0.9), "head": right(0.1)}
    dropped = [number for number in range(1, 9) if race.behind(number, now, now)]
    assert dropped == [4, 5, 6, 7] and race.first == 4 and race.looks == 3 * 4
    assert [Race(rounds, 1, 2, 0.01).first for rounds in (2, 3, 4, 5)] == [2, 2, 2, 3]


def test_the_error_is_spent_over_looks_and_arms(race):
    assert race.level * race.looks * 3 == pytest.approx(ALPHA)
    assert Race(2, 1, 2, 0.01).level == ALPHA  # no look at all


def test_a_race_needs_examples_that_are_the_same_and_finite(race):
    now = {"full": right(0.9), "head": right(0.1)}
    with pytest.raises(ValueError, match="validated on"):
        race.behind(4, {**now, "head": right(0.1, 100)}, now)
    assert race.behind(4, {**now, "head": np.full(400, np.nan)}, now) == []
    few = {"full": right(1.0, 20), "head": right(0.0, 20)}
    assert race.behind(4, few, few) == [] and race.behind(4, {"full": right(0.9)}, {}) == []


def test_losses_are_scores_with_a_minus(race):
    rng = np.random.default_rng(0)
    full = -rng.lognormal(0, 0.5, 200)
    now = {"full": full, "lora": 1.005 * full, "head": 1.5 * full}
    assert [each.arm for each in race.behind(4, now, now)] == ["head"]
