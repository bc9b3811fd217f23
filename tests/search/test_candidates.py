"""Candidates of a scan: parsing of learning rates, ranks and budgets."""

from __future__ import annotations

import itertools

import pytest

from peft_recipes import RecipeError
from peft_recipes.search.candidates import (
    candidates,
    middle_first,
    read_learning_rates,
    read_ranks,
    read_seconds,
    with_learning_rates,
)


def test_a_range_is_logarithmically_spaced_and_includes_its_ends():
    rates = read_learning_rates("1e-5:3e-3:6")
    assert len(rates) == 6 and rates[0] == 1e-5 and rates[-1] == 3e-3
    factors = [high / low for low, high in itertools.pairwise(rates)]
    assert all(factor == pytest.approx(300 ** (1 / 5), rel=0.05) for factor in factors)
    assert read_learning_rates("3e-4,1e-4,1e-4") == [1e-4, 3e-4] and read_learning_rates("") is None


@pytest.mark.parametrize(
    "text", ["1e-5:3e-3", "1e-3:1e-5:4", "1e-5:1e-3:1", "0:1e-3:4", "x", "1e-3,-1", "1e-5:a:3", "nan"]
)
def test_an_invalid_range_names_the_expected_format(text):
    with pytest.raises(RecipeError, match="expected LOW:HIGH:COUNT"):
        read_learning_rates(text)


def test_ranks_and_budgets_are_parsed():
    assert read_ranks("2,8") == [2, 8] and read_ranks("") is None
    assert [read_seconds(text) for text in ("10m", "90s", "1.5h", "600", "1h30m")] == [600, 90, 5400, 600, 5400]
    for wrong in ("0", "2,x", "-1"):
        with pytest.raises(RecipeError, match="--ranks"):
            read_ranks(wrong)
    for wrong in ("0", "ten", "-1m", "5d", "", "h", "30m1h", "0m", "1h30", "2 hours"):
        with pytest.raises(RecipeError, match="--budget"):
            read_seconds(wrong)


def test_a_changed_rank_keeps_the_arms_scale(classify):
    recipe = classify()
    found = {one.name: one for one in candidates(recipe, ["full", "lora"], [1e-3], [2, 4, 8])}
    assert list(found) == ["full", "lora-r2", "lora", "lora-r8"]
    assert [(found[n].arm.peft.r, found[n].arm.peft.lora_alpha) for n in ("lora-r2", "lora", "lora-r8")] == [
        (2, 4), (4, 8), (8, 16)]  # fmt: skip
    assert recipe.arms["lora"].peft.r == 4 and {one.of for one in found.values()} == {"full", "lora"}
    with pytest.raises(RecipeError, match="has a rank"):
        candidates(recipe, ["full"], [1e-3], [2])


def test_default_learning_rates_are_around_each_arms_own(classify):
    found = {one.name: one.learning_rates for one in candidates(classify(), ["full", "lora"])}
    assert found["full"] == (5e-4, 1.5e-3, 5e-3, 1.5e-2, 5e-2) and found["lora"][2] == 2e-2


def test_the_middle_learning_rate_comes_first():
    assert middle_first([1, 2, 3, 4, 5]) == [3, 2, 4, 1, 5]


def test_with_learning_rates_changes_only_the_chosen_arms(classify):
    recipe = classify()
    one = candidates(recipe, ["lora"], [1e-3, 1e-2], [8])[0]
    made = with_learning_rates(recipe, {"lora-r8": (one, 1e-2)})
    assert made.arms["lora-r8"].learning_rate == 1e-2 and made.arms["lora-r8"].peft.r == 8
    assert made.arms["full"] == recipe.arms["full"] and made.from_yaml  # a recipe like any other
