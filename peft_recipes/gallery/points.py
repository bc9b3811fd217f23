"""The points of the gallery's figure: how far an arm is from full fine-tuning, on scales that comparisons share.

A metric's own values can't share an axis: an accuracy of 0.9 and a loss of 0.9 have nothing in common. Two quantities
can. The first is the difference from the full fine-tune of the same comparison in units of its margin, the difference
that the recipe calls negligible (docs/concepts/statistics.md); it has an interval. The second is the share of full's
gain over the untuned base, (arm - base) / (full - base): 0 is the base, 1 is full.
"""

from __future__ import annotations

from dataclasses import dataclass

from peft_recipes.reporting import facts
from peft_recipes.reporting.facts import Comparison


@dataclass(frozen=True)
class Point:
    """An arm in the figure. None where a quantity is not known; above zero is better, also for a loss.

    parameters: trained parameters; share: of the base's; difference, low, high: from full, in margins; gain: as a share
    of full's.
    """

    parameters: float | None
    share: float | None
    difference: float | None
    low: float | None
    high: float | None
    gain: float | None


def point(comparison: Comparison, name: str) -> Point:
    """Return the point of an arm; full fine-tuning is the zero of the first scale, so it has no difference."""
    arm = facts.arms(comparison)[name]
    margins = in_margins(comparison, name) or (None, None, None)
    trained = facts.number(arm.get("trainable_parameters"))
    gain = None if facts.is_full(name, arm) else share_of_gain(comparison, name)
    return Point(trained if trained else None, facts.parameter_share(arm), *margins, gain)


def in_margins(comparison: Comparison, name: str) -> tuple[float, float, float] | None:
    """Return the difference from full and its 95 % interval in margins; None without one, or without a full arm."""
    entry, against = facts.difference(comparison, name), facts.reference(comparison, name)
    if entry is None or against is None or not facts.is_full(against, facts.arms(comparison)[against]):
        return None
    margin = facts.number(entry.get("margin")) or facts.number(comparison.get("margin"))
    if not margin:
        return None
    unit = abs(margin) if comparison.get("higher_is_better", True) else -abs(margin)
    low, high = sorted(bound / unit for bound in entry["ci95"])
    return entry["estimate"] / unit, low, high


def share_of_gain(comparison: Comparison, name: str) -> float | None:
    """Return the arm's gain over the base as a share of full's.

    None where full gained no more than the margin: then the share is a quotient of noise.
    """
    full = next((other for other, arm in facts.arms(comparison).items() if facts.is_full(other, arm)), None)
    own, whole = facts.gain(comparison, name), facts.gain(comparison, full) if full else None
    entry = facts.difference(comparison, name) or {}
    margin = facts.number(entry.get("margin")) or facts.number(comparison.get("margin")) or 0.0
    return own / whole if own is not None and whole is not None and whole > abs(margin) else None
