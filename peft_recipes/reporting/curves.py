"""The figures of what happened during training: loss and validation by optimiser step."""

from __future__ import annotations

import math

from peft_recipes.reporting import facts, figure_style, sentences
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.facts import Comparison
from peft_recipes.reporting.figure_style import Plot

MOST_NAMED = 8  # lines that can be told from each other; of more arms the others are grey
BINS = 40  # points a curve is drawn with: a batch's loss is noisy, and a file should stay small


def loss_curves(comparison: Comparison) -> Plot | None:
    """Training loss by step."""
    return _curves(comparison, "loss", "loss", "Training loss", "Training loss")


def validation_curves(comparison: Comparison) -> Plot | None:
    """The metric on the validation split during training."""
    metric = fmt.metric_title(facts.metric(comparison))
    return _curves(
        comparison, "validation", "validation", f"Validation {metric} during training", f"Validation {metric}"
    )


def curve(arm: dict, field: str) -> list[tuple[float, float]]:
    """An arm's curve as (step, mean over its seeds), also steps that some seeds lack; values not finite left out."""
    by_step: dict[float, list[float]] = {}
    for one in arm.get("curves") or []:
        for point in one.get(field) or []:
            if len(point) == 2 and all(facts.number(part) is not None for part in point):
                by_step.setdefault(point[0], []).append(point[1])
    return [(step, sum(values) / len(values)) for step, values in sorted(by_step.items())]


def _binned(points: list[tuple[float, float]], bins: int = BINS) -> list[tuple[float, float]]:
    """At most `bins` points, each the mean of its neighbours."""
    size = math.ceil(len(points) / bins)
    groups = (
        [points[start : start + size] for start in range(0, len(points), size)] if size > 1 else [[p] for p in points]
    )
    return [(sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group)) for group in groups]


def _curves(comparison: Comparison, field: str, name: str, title: str, y_title: str) -> Plot | None:
    lines = {arm: _binned(curve(found, field)) for arm, found in facts.arms(comparison).items()}
    lines = {arm: points for arm, points in lines.items() if len(points) > 1}
    if not lines:
        return None
    styles, figure_axes = figure_style.arm_styles(comparison), figure_style.canvas()
    figure, axes = figure_axes
    share = field == "validation" and fmt.is_share(facts.metric(comparison))
    factor = 100 if share else 1
    last = max(points[-1][0] for points in lines.values())
    named = _named_lines(comparison, list(lines))
    for arm in (arm for arm in lines if arm not in named):
        axes.plot(*zip(*((x, factor * y) for x, y in lines[arm]), strict=True), color=figure_style.BASE, linewidth=0.9)
    for arm, points in ((arm, lines[arm]) for arm in named):
        style, xs, ys = styles[arm], [x for x, _ in points], [factor * y for _, y in points]
        axes.plot(xs, ys, color=style.colour, linestyle=style.line, linewidth=1.9, marker=style.marker, markersize=6,
                  markeredgecolor=figure_style.PAPER, markevery=max(1, len(points) // 6))  # fmt: skip
    axes.set_ylim(*_focus([factor * y for points in lines.values() for _, y in points]))
    axes.set(xlabel="Optimiser step", ylabel=f"{y_title}{' (%)' if share else ''}", xlim=(0, last * 1.02))
    low, high = axes.get_ylim()
    ends = [min(max(factor * lines[arm][-1][1], low), high) for arm in named]
    places = figure_style.spread_out(ends, 0.062 * (high - low), low, high)
    for arm, place in zip(named, places, strict=True):
        height, style = (place - low) / (high - low), styles[arm]
        axes.plot(1.03, height, style.marker, color=style.colour, markersize=7, markeredgecolor=figure_style.PAPER,
                  transform=axes.transAxes, clip_on=False)  # fmt: skip
        axes.annotate(facts.shorten(arm, 16), (1.055, height), xycoords="axes fraction", va="center", fontsize=11)
    seeds = max(len(facts.arms(comparison)[arm].get("curves") or []) for arm in lines)
    caption = (f"Mean over {seeds} seeds." if seeds > 1 else "One seed.") + _binning_words(comparison, field)
    if len(named) < len(lines):
        caption += f" The {len(named)} that ended best are named, full among them; the others are grey."
    show = (lambda v: fmt.quality(v, facts.metric(comparison))) if share else fmt.fixed
    told = "; ".join(
        f"{facts.label(comparison, arm)} from {show(p[0][1])} to {show(p[-1][1])}" for arm, p in lines.items()
    )
    return Plot(name, title, caption, f"{y_title} by optimiser step, first to last: {told}.", figure)


def _named_lines(comparison: Comparison, arms: list[str]) -> list[str]:
    """The arms that a figure of lines can name and colour: all, or where they are many full and the best."""
    if len(arms) <= MOST_NAMED:
        return arms
    sign = -1 if comparison.get("higher_is_better", True) else 1
    found = facts.arms(comparison)
    first = [facts.reference(comparison), sentences.headline_arm(comparison)]
    means = {arm: facts.mean(found[arm]) for arm in arms}
    ranked = sorted(arms, key=lambda arm: (arm not in first, means[arm] is None, sign * (means[arm] or 0)))
    return [arm for arm in arms if arm in ranked[:MOST_NAMED]]


def _binning_words(comparison: Comparison, field: str) -> str:
    longest = max(len(curve(arm, field)) for arm in facts.arms(comparison).values())
    size = math.ceil(longest / BINS)
    return f" Each point is the mean of {size} logged steps." if size > 1 else ""


def _focus(values: list[float]) -> tuple[float, float]:
    """Axis limits that a few far-off first losses can't squash: up to the 98th percentile and some room."""
    ordered = sorted(values)
    low, high = ordered[0], ordered[min(len(ordered) - 1, math.floor(0.98 * len(ordered)))]
    room = 0.06 * (high - low) or 0.05 * abs(high) or 0.05
    return low - room, max(high, low) + room
