"""Plots of loss and validation metric by optimiser step."""

from __future__ import annotations

import math
from typing import Any

from peft_recipes.reporting import facts, figure_style, sentences
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.facts import Comparison
from peft_recipes.reporting.figure_style import Plot

MOST_NAMED = 8  # more lines can't be told apart: the other arms are grey
BINS = 40  # points per curve: the loss of a batch is noisy, and the file stays small


def loss_curves(comparison: Comparison) -> Plot | None:
    """Plot the training loss by step."""
    return _curves(comparison, "loss", "Training loss", "Training loss")


def validation_curves(comparison: Comparison) -> Plot | None:
    """Plot the metric on the validation split by step."""
    metric = fmt.metric_title(facts.selection_metric(comparison))
    return _curves(comparison, "validation", f"Validation {metric} during training", f"Validation {metric}")


def curve(arm: dict, field: str) -> list[tuple[float, float]]:
    """Return an arm's curve as (step, mean over the seeds that have the step), without values that are not finite.

    Of an arm without a finished run, that of the runs that are being trained.
    """
    by_step: dict[float, list[float]] = {}
    for one in arm.get("curves") or [arm.get("progress") or {}]:
        for point in one.get(field) or []:
            if len(point) == 2 and all(facts.number(part) is not None for part in point):
                by_step.setdefault(point[0], []).append(point[1])
    return [(step, sum(values) / len(values)) for step, values in sorted(by_step.items())]


def _binned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Average neighbouring points to at most `BINS`."""
    size = math.ceil(len(points) / BINS) or 1
    bins = [points[start : start + size] for start in range(0, len(points), size)]
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in bins]


def _curves(comparison: Comparison, field: str, title: str, y_title: str) -> Plot | None:
    lines = {arm: _binned(curve(entry, field)) for arm, entry in facts.arms(comparison).items()}
    least = 1 if comparison.get("provisional") and field == "validation" else 2  # the first point is news, too
    lines = {arm: points for arm, points in lines.items() if len(points) >= least}
    if not lines:
        return None
    styles = figure_style.arm_styles(comparison)
    figure, axes = figure_style.canvas()
    share = field == "validation" and fmt.is_share(facts.selection_metric(comparison))
    factor = 100 if share else 1
    named = _named_lines(comparison, list(lines))
    for arm in sorted(lines, key=lambda arm: arm in named):  # grey lines first, below the others
        steps, values = [x for x, _ in lines[arm]], [factor * y for _, y in lines[arm]]
        style = styles[arm]
        look: dict[str, Any] = {"color": figure_style.BASE, "linewidth": 0.9}
        if arm in named:
            look = {
                "color": style.colour, "linestyle": style.line, "linewidth": 1.9, "marker": style.marker,
                "markersize": 6, "markeredgecolor": figure_style.PAPER, "markevery": max(1, len(steps) // 6),
            }  # fmt: skip
        axes.plot(steps, values, **look)
    axes.set_ylim(*_y_limits([factor * y for points in lines.values() for _, y in points]))
    last = max(points[-1][0] for points in lines.values())
    axes.set(xlabel="Optimiser step", ylabel=f"{y_title}{' (%)' if share else ''}", xlim=(0, last * 1.02))
    _name_ends(axes, {arm: factor * lines[arm][-1][1] for arm in named}, styles)
    seeds = max(len(facts.arms(comparison)[arm].get("curves") or []) for arm in lines)
    caption = f"Mean over {seeds} seeds." if seeds > 1 else "One seed."
    size = math.ceil(max(len(curve(arm, field)) for arm in facts.arms(comparison).values()) / BINS)
    caption += f" Each point is the mean of {size} logged steps." if size > 1 else ""
    if len(named) < len(lines):
        caption += f" The {len(named)} best arms are named, full among them; the others are grey."
    show = (lambda value: fmt.quality(value, facts.selection_metric(comparison))) if share else fmt.fixed
    ends = [
        f"{facts.label(comparison, arm)} from {show(points[0][1])} to {show(points[-1][1])}"
        for arm, points in lines.items()
    ]
    return Plot(field, title, caption, f"{y_title} by optimiser step, first to last: {'; '.join(ends)}.", figure)


def _name_ends(axes: Any, ends: dict[str, float], styles: dict[str, figure_style.Style]) -> None:
    """Write the name of each line right of its last value."""
    low, high = axes.get_ylim()
    clipped = [min(max(end, low), high) for end in ends.values()]
    positions = figure_style.spread_out(clipped, 0.062 * (high - low), low, high)
    for arm, position in zip(ends, positions, strict=True):
        height = (position - low) / (high - low)
        figure_style.mark(axes, 1.03, height, styles[arm], 7, zorder=2, transform=axes.transAxes, clip_on=False)
        axes.annotate(facts.shorten(arm, 16), (1.055, height), xycoords="axes fraction", va="center", fontsize=11)


def _named_lines(comparison: Comparison, arms: list[str]) -> list[str]:
    """Return the arms to name and colour: all, or full, the headline arm and the best ones."""
    if len(arms) <= MOST_NAMED:
        return arms
    sign = -1 if comparison.get("higher_is_better", True) else 1
    first = [facts.reference(comparison), sentences.headline_arm(comparison)]
    means = {arm: facts.mean(facts.arms(comparison)[arm]) for arm in arms}
    ranked = sorted(arms, key=lambda arm: (arm not in first, means[arm] is None, sign * (means[arm] or 0)))
    return [arm for arm in arms if arm in ranked[:MOST_NAMED]]


def _y_limits(values: list[float]) -> tuple[float, float]:
    """Return limits up to the 98th percentile, so that a few high first losses don't flatten the curves."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[min(len(ordered) - 1, math.floor(0.98 * len(ordered)))]
    room = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
    return low - room, max(high, low) + room
