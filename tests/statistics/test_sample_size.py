"""How many seeds and examples: the estimated variances, and the planned power against simulated comparisons."""

from __future__ import annotations

import numpy as np
import pytest

from peft_recipes.statistics.bootstrap import paired_difference, verdict
from peft_recipes.statistics.sample_size import Variances, examples_needed, margin_reached, seeds_needed, variances

MARGIN = 0.04


def scored(seeds: int, examples: int, gap: float, rng: np.random.Generator, apart: float = 0.2) -> np.ndarray:
    """[2, seeds, examples] scores of arm and full: runs vary by 0.02, the arms differ by example, and by chance."""
    difficulty = rng.normal(0, 1, examples)
    own = rng.normal(0, apart, examples)
    runs = 0.02 * rng.standard_normal((2, seeds, 1))
    return np.array([difficulty + own + gap, difficulty])[:, None, :] + runs + rng.normal(0, 0.3, (2, seeds, examples))


def test_the_variances_of_a_large_pilot_are_the_true_ones():
    found = variances(*scored(40, 4_000, 0.1, np.random.default_rng(0)))
    assert found.apart == pytest.approx(0.2**2, rel=0.05) and found.noise == pytest.approx(2 * 0.3**2, rel=0.02)
    assert found.runs == pytest.approx(2 * 0.02**2, rel=0.3) and found.safe().runs > found.runs
    assert (found.seeds, found.examples, found.right_or_wrong) == (40, 4_000, False)


@pytest.mark.parametrize(
    ("claim", "gap", "wanted"), [("equivalent", 0.0, "equivalent"), ("different", -MARGIN, "worse")]
)
def test_with_the_planned_seeds_a_simulated_comparison_has_the_planned_power(claim, gap, wanted):
    """The interval is a little wider than the plan's: without much run variance it keeps all of its freedom."""
    true, examples = Variances(0.2**2, 2 * 0.3**2, 2 * 0.02**2, 2, 500), 500
    seeds, rng, comparisons, made = seeds_needed(true, claim, MARGIN, examples), np.random.default_rng(1), 250, 0
    planned = true.power(claim, MARGIN, seeds, examples)
    assert planned >= 0.8 > true.power(claim, MARGIN, seeds - 1, examples) or seeds == 3
    for number in range(comparisons):
        found = paired_difference(*scored(seeds, examples, gap, rng), resamples=500, seed=number)
        made += verdict(found, MARGIN, True) == wanted
    assert made / comparisons == pytest.approx(planned, abs=0.09)


def test_more_seeds_or_examples_never_need_more_of_the_other():
    of = Variances(0.3, 0.3, 0.0002, 3, 300)
    for claim in ("equivalent", "different"):
        examples = [examples_needed(of, claim, MARGIN, seeds) for seeds in (3, 5, 10, 30)]
        assert examples == sorted(examples, reverse=True)
        seeds = [seeds_needed(of, claim, MARGIN, count) for count in (5_000, 10_000, 100_000)]
        assert seeds == sorted(seeds, reverse=True)
        for count, needed in zip((3, 5, 10), examples, strict=False):
            assert of.power(claim, MARGIN, count, needed) >= 0.8 > of.power(claim, MARGIN, count, needed - 1)
        assert (examples_needed(of.safe(), claim, MARGIN, 5) or 1e9) > examples[1]


def test_the_margin_within_reach_is_the_smallest_with_the_power():
    of = Variances(0.3, 0.3, 0.0002, 3, 300)
    for claim in ("equivalent", "different"):
        margin = margin_reached(of, claim, 10, 300)
        assert of.power(claim, margin, 10, 300) == pytest.approx(0.8, abs=1e-6)
        assert examples_needed(of, claim, margin, 10) == pytest.approx(300, abs=1)


def test_where_no_number_is_enough_there_is_none():
    assert seeds_needed(Variances(0.5, 0, 0, 2, 100), "equivalent", 0.01, 100) is None  # the examples are too few
    assert examples_needed(Variances(0, 0, 0.01, 2, 100), "equivalent", 0.01, 3) is None  # the runs vary too much


def test_arms_that_always_agree_need_three_examples_in_a_margin():
    same = np.ones((2, 400))
    found = variances(same, same)
    assert found.right_or_wrong and seeds_needed(found, "equivalent", 0.01, 400) == 3
    assert examples_needed(found, "equivalent", 0.01, 3) == 301 and seeds_needed(found, "equivalent", 0.01, 300) is None


def test_one_seed_can_not_tell_runs_from_examples():
    with pytest.raises(ValueError, match="two seeds"):
        variances(np.ones((1, 9)), np.ones((1, 9)))
