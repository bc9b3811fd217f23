"""Short runs of a scan in another process than the scan's: what is passed to it, and how its end is read."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft_recipes.recipe.recipe import Recipe
from peft_recipes.search.candidates import Candidate, with_learning_rates
from peft_recipes.search.preparation import Preparation
from peft_recipes.search.trials import Trial


def write_recipe(recipe: Recipe, candidates: Iterable[Candidate], path: Path) -> None:
    """Write the recipe with the candidates among its arms, each at its lowest learning rate."""
    with_learning_rates(recipe, {one.name: (one, one.learning_rates[0]) for one in candidates}).to_yaml(path)


def prepared_for(recipe: Recipe, arms: Iterable[str]) -> Preparation:
    """Prepare the data and some arms of a recipe that `write_recipe` wrote; the scan has checked them."""
    candidates = [Candidate(arm, recipe.arms[arm], (recipe.arms[arm].learning_rate,), arm) for arm in arms]
    prepared = Preparation(recipe, candidates)
    prepared.prepare(checked=True)
    return prepared


def trial_of(prepared: Preparation, options: dict[str, Any]) -> Trial:
    """The trial that `Trial.options` described."""
    candidate = next(one for one in prepared.candidates if one.name == options["arm"])
    names = ("learning_rate", "steps", "evaluate_after", "seed", "others")
    return Trial(candidate, **{name: options[name] for name in names})
