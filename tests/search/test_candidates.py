"""What a scan tries: rates, ranks and budgets as they are written."""

from __future__ import annotations

import itertools

import pytest

from peft_recipes import RecipeError
from peft_recipes.search.candidates import candidates, from_the_middle, read_ranks, read_rates, read_seconds, with_rates


def test_a_range_is_even_on_a_logarithmic_scale_and_ends_where_it_says():
    rates = read_rates("1e-5:3e-3:6")
    assert len(rates) == 6 and rates[0] == 1e-5 and rates[-1] == 3e-3
    factors = [high / low for low, high in itertools.pairwise(rates)]
    assert all(factor == pytest.approx(300 ** (1 / 5), rel=0.05) for factor in factors)
    assert read_rates("3e-4,1e-4,1e-4") == [1e-4, 3e-4] and read_rates("") is None


@pytest.mark.parametrize(
    "text", ["1e-5:3e-3", "1e-3:1e-5:4", "1e-5:1e-3:1", "0:1e-3:4", "x", "1e-3,-1", "1e-5:a:3", "nan"]
)
def test_a_range_that_is_none_says_how_one_looks(text):
    with pytest.raises(RecipeError, match="expected LOW:HIGH:COUNT"):
        read_rates(text)


def test_ranks_and_budgets():
    assert read_ranks("2,8") == [2, 8] and read_ranks("") is None
    assert [read_seconds(text) for text in ("10m", "90s", "1.5h", "600")] == [600, 90, 5400, 600]
    for wrong in ("0", "2,x", "-1"):
        with pytest.raises(RecipeError, match="--ranks"):
            read_ranks(wrong)
    for wrong in ("0", "ten", "-1m", "5d"):
        with pytest.raises(RecipeError, match="--budget"):
            read_seconds(wrong)


def test_a_rank_keeps_its_arms_scale_and_only_adapters_have_one(classify):
    recipe = classify()
    found = {one.name: one for one in candidates(recipe, ["full", "lora"], [1e-3], [2, 4, 8])}
    assert list(found) == ["full", "lora-r2", "lora", "lora-r8"]
    assert [(found[n].arm.peft.r, found[n].arm.peft.lora_alpha) for n in ("lora-r2", "lora", "lora-r8")] == [
        (2, 4), (4, 8), (8, 16)]  # fmt: skip
    assert recipe.arms["lora"].peft.r == 4 and {one.of for one in found.values()} == {"full", "lora"}
    with pytest.raises(RecipeError, match="has a rank"):
        candidates(recipe, ["full"], [1e-3], [2])


def test_without_rates_each_arm_is_tried_around_its_own(classify):
    found = {one.name: one.rates for one in candidates(classify(), ["full", "lora"])}
    assert found["full"] == (5e-4, 1.5e-3, 5e-3, 1.5e-2, 5e-2) and found["lora"][2] == 2e-2


def test_the_middle_is_tried_first():
    assert from_the_middle([1, 2, 3, 4, 5]) == [3, 2, 4, 1, 5]


def test_the_winners_recipe_has_their_rates_and_leaves_the_others(classify):
    recipe = classify()
    one = candidates(recipe, ["lora"], [1e-3, 1e-2], [8])[0]
    made = with_rates(recipe, {"lora-r8": (one, 1e-2)})
    assert made.arms["lora-r8"].learning_rate == 1e-2 and made.arms["lora-r8"].peft.r == 8
    assert made.arms["full"] == recipe.arms["full"] and made.from_yaml  # a recipe like any other
