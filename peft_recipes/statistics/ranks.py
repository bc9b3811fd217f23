"""Ranks side by side: the smallest that is enough, as a verdict.

Arms that differ in their rank (and the alpha that goes with it) alone are one group. Its best rank on the validation
split is what the others are held against on the test split, paired by example and seed like any difference. A rank is
enough where the interval excludes that it is worse by more than the margin.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from peft_recipes.recipe.arm import Arm
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.recipe.serialization import peft_to_dict

_SCALED = ("r", "lora_alpha", "alpha")  # what may differ between two ranks of one arm


def rank_groups(arms: dict[str, Arm]) -> list[list[str]]:
    """The names of arms that differ in nothing but their rank, from the lowest; groups of two ranks or more."""
    groups: dict[str, dict[int, str]] = {}
    for name, arm in arms.items():
        rank = getattr(arm.peft, "r", None)
        if isinstance(rank, int) and rank > 0:
            same = {key: value for key, value in peft_to_dict(arm.peft).items() if key not in _SCALED}
            groups.setdefault(json.dumps(same, sort_keys=True, default=str), {}).setdefault(rank, name)
    return [[group[rank] for rank in sorted(group)] for group in groups.values() if len(group) > 1]


def rank_verdicts(
    recipe: Recipe,
    arms: Sequence[str],
    validation: dict[str, float],
    against: Callable[[str, str], dict[str, Any] | None],
    margin: float,
) -> list[dict[str, Any]]:
    """For each group of ranks: its reference, every rank's difference from it, and the smallest rank that is enough.

    validation: the metric's mean on the validation split, of the arms that have one. against: the difference of an arm
    from a reference (as `differences` of comparison.json has it), None where there is none.
    """
    measured = {name: recipe.arms[name] for name in arms if name in validation}
    found = []
    for group in rank_groups(measured):
        sign = 1 if recipe.higher_is_better else -1
        # Of equal ones the larger: what is asked is whether less will do.
        best = max(group, key=lambda name: (sign * validation[name], measured[name].peft.r))
        differences = {name: told for name in group if name != best and (told := against(name, best))}
        enough = [name for name in group if name == best or _not_worse(recipe, differences.get(name), margin)]
        found.append({
            "ranks": {name: measured[name].peft.r for name in group},
            "against": best,
            "differences": differences,
            "margin": margin,
            "enough": enough[0],
        })  # fmt: skip
    return found


def _not_worse(recipe: Recipe, difference: dict[str, Any] | None, margin: float) -> bool:
    """Whether the interval excludes that the arm is worse by more than the margin."""
    if difference is None:
        return False
    low, high = difference["ci95"]
    return low >= -margin if recipe.higher_is_better else high <= margin
