"""Find the smallest rank that is enough.

A rank group is one method at several ranks: the arms differ in the rank and in what follows from it alone. The rank
that is best on the validation split is the reference: the others are compared with it on the test split, paired by
example and seed. A rank is enough if the interval excludes that it is worse by more than the margin.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Sequence
from typing import Any

from peft_recipes.recipe.arm import Arm, rank_of
from peft_recipes.recipe.metrics import METRICS
from peft_recipes.recipe.recipe import Recipe
from peft_recipes.recipe.serialization import peft_to_dict

# OFT's r is the number of blocks and RandLoRA's the width of its random bases: more of it trains fewer parameters.
_NOT_A_CAPACITY = ("OFT", "RANDLORA")
_RANKS = ("init_r", "rank_pattern")  # may be the same at every rank, or proportional to it
_ALPHAS = ("lora_alpha", "alpha", "alpha_pattern")  # or proportional to its square root, the scaling of rsLoRA
_POWERS = (1.0, 0.0, 0.5)


def rank_groups(arms: dict[str, Arm]) -> list[list[str]]:
    """Group the names of arms that differ in the rank alone, lowest rank first; groups of two ranks or more.

    Alpha and the patterns of ranks and alphas may follow the rank: by one rule for the whole group, constant or
    proportional. The learning rate may differ, because it is the arm's own and is tuned for each. Everything else is
    the same: the PEFT config, the quantisation, the optimizer, LoRA+'s ratio. Of two arms of one rank in a group, the
    first counts.
    """
    families: dict[str, list[str]] = {}
    for name, arm in arms.items():
        rank = rank_of(arm)
        if isinstance(rank, int) and rank > 0 and arm.method_name not in _NOT_A_CAPACITY:
            families.setdefault(_same_at_every_rank(arm), []).append(name)
    order = list(arms)
    groups = [group for family in families.values() for group in _by_rule(arms, family)]
    return sorted(groups, key=lambda group: min(order.index(name) for name in group))


def _same_at_every_rank(arm: Arm) -> str:
    """Return the part of an arm that all ranks of a group share, as text."""
    own = {field.name: getattr(arm, field.name) for field in dataclasses.fields(arm)}
    own["method"] = {k: v for k, v in peft_to_dict(arm.peft).items() if k not in ("r", "target_r", *_RANKS, *_ALPHAS)}
    del own["learning_rate"]
    return json.dumps(own, sort_keys=True, default=str)


def _by_rule(arms: dict[str, Arm], family: list[str]) -> list[list[str]]:
    """Split a family into groups whose alphas and patterns follow the rank by one rule, the largest group first."""
    groups = []
    while family:
        candidates: dict[tuple, dict[int, str]] = {}
        for powers in itertools.product(_POWERS, _POWERS[:2]):
            for name in family:
                candidates.setdefault((powers, _follows(arms[name], *powers)), {}).setdefault(rank_of(arms[name]), name)
        largest = max(candidates.values(), key=len)
        if len(largest) < 2:
            break
        groups.append([largest[rank] for rank in sorted(largest)])
        taken = {name for name in family if rank_of(arms[name]) in largest and name in largest.values()}
        family = [name for name in family if name not in taken]
    return groups


def _follows(arm: Arm, alpha_power: float, rank_power: float) -> str:
    """Return an arm's alphas and patterns divided by its rank to these powers: equal where they follow that rule."""
    divisors = dict.fromkeys(_ALPHAS, rank_of(arm) ** alpha_power) | dict.fromkeys(_RANKS, rank_of(arm) ** rank_power)
    values = {name: getattr(arm.peft, name, None) for name in divisors}
    return json.dumps({name: _divided(value, divisors[name]) for name, value in values.items()}, sort_keys=True)


def _divided(value: Any, divisor: float) -> Any:
    """Return a number, or the numbers of a mapping, divided and rounded so that equal ratios are equal."""
    if isinstance(value, dict):
        return {str(key): _divided(one, divisor) for key, one in value.items()}
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return str(value)
    return float(f"{value / divisor:.9g}")


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
    sign = 1 if METRICS[recipe.selection_metric].higher_is_better else -1
    verdicts = []
    for group in rank_groups(measured):
        best = max(group, key=lambda name: (sign * validation[name], rank_of(measured[name])))  # of equals the largest
        differences = {name: entry for name in group if name != best and (entry := difference(name, best))}
        enough = [name for name in group if name == best or _not_worse(recipe, differences.get(name), margin)]
        verdicts.append({
            "ranks": {name: rank_of(measured[name]) for name in group},
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
