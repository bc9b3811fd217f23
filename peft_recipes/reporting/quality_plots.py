"""Plots of quality against trained parameters, training time and rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from peft_recipes.reporting import facts, figure_style, rank_sentences
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.facts import Comparison
from peft_recipes.reporting.figure_style import Plot


class _Axis:
    """The quality axis: fractions are shown in percent, a loss unchanged."""

    def __init__(self, comparison: Comparison):
        self.metric = facts.metric(comparison)
        self.share = fmt.is_share(self.metric)
        self.title = f"Test {fmt.metric_title(self.metric)}{' (%)' if self.share else ''}"
        self.better = "up" if comparison.get("higher_is_better", True) else "down"

    def scale(self, value: float) -> float:
        return 100 * value if self.share else value

    def show(self, value: float | None) -> str:
        return fmt.quality(value, self.metric)


def _error(comparison: Comparison, arm: dict) -> float | None:
    """Return half the length of an arm's error bar: one sd over seeds, or the 95 % interval of one seed's fraction."""
    deviation, value = facts.spread(arm), facts.mean(arm)
    if deviation is not None:
        return deviation
    examples = facts.number((comparison.get("rows") or {}).get("test"))
    if fmt.is_share(facts.metric(comparison)) and examples and value is not None and 0 <= value <= 1:
        return 1.96 * math.sqrt(value * (1 - value) / examples)  # normal approximation of a proportion
    return None


def _bar_caption(comparison: Comparison) -> str:
    measured = facts.measured(comparison).values()
    seeds = max((facts.seeds_done(arm) for arm in measured), default=0)
    if any(facts.spread(arm) is not None for arm in measured):
        return f" Bars: one standard deviation over {seeds} seeds."
    if any(_error(comparison, arm) is not None for arm in measured):
        return " Bars: 95 % interval over the test examples, one seed."
    return ""


def _base_line(comparison: Comparison, axes: Any, axis: _Axis) -> str:
    """Draw the untuned base as a horizontal line; return its caption."""
    base = facts.base_value(comparison)
    if base is None:
        return ""
    _named_line(axes, axis.scale(base), "untuned base", figure_style.BASE, linestyle=(0, (2, 2)), linewidth=1.4)
    return f" Dashed line: the untuned base, {axis.show(base)}."


def _named_line(axes: Any, height: float, name: str, colour: str, **look: Any) -> None:
    axes.axhline(height, color=colour, zorder=1, **look)
    text: dict[str, Any] = {"ha": "right", "va": "top", "color": colour, "fontsize": 10}
    axes.annotate(name, (0.99, height), (0, -3), ("axes fraction", "data"), "offset points", **text)


def _set_quality_limits(axes: Any, axis: _Axis) -> None:
    """Leave room around the points and keep a minimum range, so that negligible differences look small."""
    axes.margins(y=0.14)
    low, high = axes.get_ylim()
    least = 4.0 if axis.share else 0.04 * max(abs(low), abs(high))
    missing = max(0.0, least - (high - low)) / 2
    axes.set_ylim(low - missing, high + missing)


def _scatter(
    comparison: Comparison, field: str, name: str, title: str, x_title: str, show: Callable, log: bool
) -> Plot | None:
    """Plot quality against a cost, one point per arm. `show` formats a cost."""
    styles, axis = figure_style.arm_styles(comparison), _Axis(comparison)
    costs, left_out = facts.comparable_figures(comparison, field)
    if not costs:
        return None
    figure, axes = figure_style.canvas()
    divisor, unit = (1, "") if log else _time_unit(max(costs.values()))
    points, bars = [], []
    for arm, cost in costs.items():
        x, y = cost / divisor, axis.scale(facts.mean(facts.arms(comparison)[arm]))
        error = axis.scale(_error(comparison, facts.arms(comparison)[arm]) or 0)
        if error:
            axes.errorbar([x], [y], yerr=[error], color=styles[arm].colour, linewidth=1.6, capsize=3.5, zorder=2)
            bars.append((x, y - error, y + error))
        figure_style.mark(axes, x, y, styles[arm])
        points.append((x, y, facts.shorten(arm, 22)))
    ranks = _join_ranks(comparison, axes, axis, costs) if field == "trainable_parameters" else ""
    base_caption = _base_line(comparison, axes, axis)
    _set_quality_limits(axes, axis)
    if log:
        axes.set_xscale("log")
        _log_ticks(axes, list(costs.values()), show)
    else:
        axes.set_xlim(left=0, right=1.12 * max(costs.values()) / divisor)
    axes.set(xlabel=f"{x_title}{unit}", ylabel=axis.title)
    figure_style.label_points(figure, axes, points, bars)
    arms = facts.arms(comparison)
    values = "; ".join(
        f"{facts.label(comparison, arm)} {axis.show(facts.mean(arms[arm]))} with {show(cost)}"
        for arm, cost in costs.items()
    )
    caption = f"Further {axis.better} and left is better.{ranks}{base_caption}{_bar_caption(comparison)}{left_out}"
    alt = f"{axis.title} against {x_title.lower()}: {values}.{ranks}{base_caption}"
    return Plot(name, title, caption, alt, figure)


def _join_ranks(comparison: Comparison, axes: Any, axis: _Axis, costs: dict[str, float]) -> str:
    """Draw a line through the ranks of each group and a ring at the smallest that is enough; return the caption."""
    ringed = []
    for group in rank_sentences.groups(comparison):
        names = [name for name in group["ranks"] if name in costs]
        heights = {name: axis.scale(facts.mean(facts.arms(comparison)[name])) for name in names}
        line = {"color": figure_style.GRID, "linewidth": 2.2, "zorder": 1}
        axes.plot([costs[name] for name in names], list(heights.values()), "-", **line)
        enough = group["enough"]
        if enough in heights:
            figure_style.ring(axes, [costs[enough]], [heights[enough]])
            ringed.append(f"r={group['ranks'][enough]}")
    if not ringed:
        return ""
    return f" Lines join the ranks of one arm. Ringed: the smallest rank that is enough, {fmt.listed(ringed)}."


def _time_unit(longest: float) -> tuple[float, str]:
    return (1, " (seconds)") if longest < 120 else (60, " (minutes)") if longest < 7200 else (3600, " (hours)")


def _log_ticks(axes: Any, values: list[float], show: Callable) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    low, high = math.log10(min(values)), math.log10(max(values))
    room = max(0.25, 0.12 * (high - low))
    axes.set_xlim(10 ** (low - room), 10 ** (high + room))
    decades = [10.0**power for power in range(math.ceil(low - room), math.floor(high + room) + 1)]
    ticks = decades if len(decades) > 1 else sorted(set(values))
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda x, _: show(x).replace(".0", ""))


def quality_by_parameters(comparison: Comparison) -> Plot | None:
    """Plot quality against trained parameters (logarithmic)."""
    title, x_title = "Quality against trained parameters", "Trained parameters, logarithmic"
    return _scatter(comparison, "trainable_parameters", "parameters", title, x_title, fmt.short_count, log=True)


def quality_by_time(comparison: Comparison) -> Plot | None:
    """Plot quality against training time."""
    title = "Quality against training time"
    return _scatter(comparison, "training_seconds", "time", title, "Training time", fmt.seconds, log=False)


def rank_curve(comparison: Comparison) -> Plot | None:
    """Plot quality by rank, for arms that differ only in rank."""
    groups = facts.rank_groups(comparison)
    if not groups:
        return None
    arms, styles, axis = facts.arms(comparison), figure_style.arm_styles(comparison), _Axis(comparison)
    figure, axes = figure_style.canvas()
    for group in groups:
        style = styles[group[-1]] if len(groups) > 1 else figure_style.Style(figure_style.VERMILLION, "o", "-", "")
        ranks, values = [arms[name]["rank"] for name in group], [axis.scale(facts.mean(arms[name])) for name in group]
        errors = [_error(comparison, arms[name]) for name in group]
        bars = None if any(error is None for error in errors) else [axis.scale(error) for error in errors]
        look = {"color": style.colour, "linestyle": style.line, "marker": style.marker, "markersize": 8}
        sizes = {"linewidth": 1.9, "elinewidth": 1.6, "capsize": 3.5}
        axes.errorbar(ranks, values, yerr=bars, markeredgecolor=figure_style.PAPER, **look, **sizes)
        if len(groups) > 1:
            text = {"textcoords": "offset points", "va": "center", "color": style.colour, "fontweight": "bold"}
            axes.annotate(facts.shorten(group[-1], 18), (ranks[-1], values[-1]), xytext=(8, 0), **text)
    full_caption = _full_line(comparison, axes, axis)
    ranks = sorted({arms[name]["rank"] for group in groups for name in group})
    _set_quality_limits(axes, axis)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks], minor=False)
    axes.minorticks_off()
    axes.margins(x=0.1)
    axes.set(xlabel="Rank, logarithmic", ylabel=axis.title)
    members = [arms[name] for group in groups for name in group]
    values = "; ".join(f"rank {arm['rank']} {axis.show(facts.mean(arm))}" for arm in members)
    rates = {arm.get("learning_rate") for arm in members}
    own = ", each rank at its own learning rate" if len(rates) > 1 else ""
    caption = f"Same method and targets, other ranks{own}.{full_caption}{_bar_caption(comparison)}"
    return Plot("rank", "Quality by rank", caption, f"{axis.title} by rank: {values}.{full_caption}", figure)


def _full_line(comparison: Comparison, axes: Any, axis: _Axis) -> str:
    """Draw full fine-tuning as a horizontal line; return its caption."""
    against = facts.reference(comparison)
    full = facts.mean(facts.arms(comparison).get(against or ""))
    if full is None:
        return ""
    _named_line(axes, axis.scale(full), "full", figure_style.BLUE, linestyle="--", linewidth=1.6)
    return f" Dashed line: full fine-tuning, {axis.show(full)}."
