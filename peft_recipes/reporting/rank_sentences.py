"""Which rank is enough, in words and for the table and the figures. How it is told: peft_recipes/search/ranks.py."""

from __future__ import annotations

from typing import Any

from peft_recipes.reporting import facts, sentences
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.facts import Comparison


def groups(comparison: Comparison) -> list[dict[str, Any]]:
    """The groups of ranks of a comparison whose arms it has, in the order of the recipe."""
    known = facts.measured(comparison)
    return [group for group in comparison.get("ranks") or [] if group["against"] in known and group["enough"] in known]


def rank_lines(comparison: Comparison) -> list[str]:
    """A verdict a group: "r=8 is enough: ..."."""
    return [_told(comparison, group) for group in groups(comparison)]


def _told(comparison: Comparison, group: dict[str, Any]) -> str:
    ranks, best, enough = group["ranks"], group["against"], group["enough"]
    method = facts.display_method(best, facts.arms(comparison)[best])
    all_ranks = fmt.listed([str(rank) for rank in ranks.values()])
    smaller = [name for name in ranks if ranks[name] < ranks[best] and name in group["differences"]]
    if enough == best and not smaller:
        return (
            f"r={ranks[best]} is enough: of {method}'s ranks {all_ranks} the smallest is also the best on the "
            "validation split."
        )
    if enough == best:
        nearest = difference(comparison, group, smaller[-1])
        return (
            f"No rank below r={ranks[best]} is shown to be enough: of {method}'s ranks {all_ranks} it is the best on "
            f"the validation split, and r={ranks[smaller[-1]]} may be worse by more than {nearest.margin} (difference "
            f"{nearest})."
        )
    told = difference(comparison, group, enough)
    arms = facts.arms(comparison)
    share = facts.ratio(arms[enough], arms[best], "trainable_parameters")
    fewer = f", with {fmt.percent(share)} of its trained parameters" if share is not None else ""
    return (
        f"r={ranks[enough]} is enough: of {method}'s ranks {all_ranks} it is the smallest that is not worse than "
        f"r={ranks[best]} by more than {told.margin} (difference {told}){fewer}."
    )


def difference(comparison: Comparison, group: dict[str, Any], name: str) -> sentences.Difference | None:
    """A rank's difference from its group's best, as text."""
    told = {name: group["differences"].get(name)} if group["differences"].get(name) else {}
    return sentences.describe_difference({**comparison, "differences": told}, name)


def of_arm(comparison: Comparison, name: str) -> tuple[dict[str, Any], sentences.Difference | None] | None:
    """The group that an arm is in, and its difference from that group's best; None where it is in none."""
    for group in groups(comparison):
        if name in group["ranks"]:
            return group, difference(comparison, group, name)
    return None
