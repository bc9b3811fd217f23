"""Find the smallest rank that is enough.

Arms that differ only in rank (and alpha) form a group. The rank that is best on the validation split is the reference:
the others are compared with it on the test split, paired by example and seed. A rank is enough if the interval
excludes that it is worse by more than the margin.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from peft_recipes.recipe.arm import Arm
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.recipe.serialization import peft_to_dict

_RANK_OPTIONS = ("r", "lora_alpha", "alpha")  # may differ between the arms of a group


def rank_groups(arms: dict[str, Arm]) -> list[list[str]]:
    """Group the names of arms that differ only in rank, lowest rank first; groups of two ranks or more."""
    groups: dict[str, dict[int, str]] = {}
    for name, arm in arms.items():
        rank = getattr(arm.peft, "r", None)
        if isinstance(rank, int) and rank > 0:
            shared = {key: value for key, value in peft_to_dict(arm.peft).items() if key not in _RANK_OPTIONS}
            groups.setdefault(json.dumps(shared, sort_keys=True, default=str), {}).setdefault(rank, name)
    return [[group[rank] for rank in sorted(group)] for group in groups.values() if len(group) > 1]


def rank_verdicts(
    recipe: Recipe,
    arms: Sequence[str],
    validation: dict[str, float],
    difference: Callable[[str, str], dict[str, Any] | None],
    margin: float,
) -> list[dict[str, Any]]:
    """Return for each group its reference, every rank's difference from it, and the smallest rank that is enough.

    validation: the mean of the metric on the validation split, by arm. difference: returns the difference of an arm
    from a reference (an entry of `differences` in comparison.json), or None.
    """
    measured = {name: recipe.arms[name] for name in arms if name in validation}
    sign = 1 if recipe.higher_is_better else -1
    verdicts = []
    for group in rank_groups(measured):
        best = max(group, key=lambda name: (sign * validation[name], measured[name].peft.r))  # of equals the largest
        differences = {name: entry for name in group if name != best and (entry := difference(name, best))}
        enough = [name for name in group if name == best or _not_worse(recipe, differences.get(name), margin)]
        verdicts.append({
            "ranks": {name: measured[name].peft.r for name in group},
            "against": best,
            "differences": differences,
            "margin": margin,
            "enough": enough[0],
        })  # fmt: skip
    return verdicts


def _not_worse(recipe: Recipe, difference: dict[str, Any] | None, margin: float) -> bool:
    """Return whether the interval excludes that the arm is worse by more than the margin."""
    if difference is None:
        return False
    low, high = difference["ci95"]
    return low >= -margin if recipe.higher_is_better else high <= margin
