"""Which rank is enough: sentences and figures for reports. The verdict comes from statistics/ranks.py."""

from __future__ import annotations

from typing import Any

from peft_recipes.reporting import facts, sentences
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.facts import Comparison


def groups(comparison: Comparison) -> list[dict[str, Any]]:
    """Return the groups of ranks whose reference and verdict are measured arms, in the recipe's order."""
    known = facts.measured(comparison)
    return [group for group in comparison.get("ranks") or [] if group["against"] in known and group["enough"] in known]


def rank_lines(comparison: Comparison) -> list[str]:
    """Return a verdict per group: "r=8 is enough: ..."."""
    return [_verdict(comparison, group) + _learning_rates(comparison, group) for group in groups(comparison)]


def _learning_rates(comparison: Comparison, group: dict[str, Any]) -> str:
    """Return a sentence if the ranks of a group have different learning rates."""
    rates = {facts.arms(comparison)[name].get("learning_rate") for name in group["ranks"]}
    return " Each rank has its own learning rate." if len(rates - {None}) > 1 else ""


def _verdict(comparison: Comparison, group: dict[str, Any]) -> str:
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
    gap = difference(comparison, group, enough)
    arms = facts.arms(comparison)
    share = facts.ratio(arms[enough], arms[best], "trainable_parameters")
    fewer = f", with {fmt.percent(share)} of its trained parameters" if share is not None else ""
    return (
        f"r={ranks[enough]} is enough: of {method}'s ranks {all_ranks} it is the smallest that is not worse than "
        f"r={ranks[best]} by more than {gap.margin} (difference {gap}){fewer}."
    )


def difference(comparison: Comparison, group: dict[str, Any], name: str) -> sentences.Difference | None:
    """Return a rank's difference from its group's best as text; None for the best itself."""
    return sentences.describe_difference({**comparison, "differences": group["differences"]}, name)


def of_arm(comparison: Comparison, name: str) -> tuple[dict[str, Any], sentences.Difference | None] | None:
    """Return an arm's group and its difference from the best of the group; None if it is in no group."""
    for group in groups(comparison):
        if name in group["ranks"]:
            return group, difference(comparison, group, name)
    return None
