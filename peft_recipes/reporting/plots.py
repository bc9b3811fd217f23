"""The figures of a comparison. Each builder returns a `Plot`, or None where the comparison has nothing for it to show."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from peft_recipes.reporting import details, drawing, facts, words
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.curves import loss_curves, validation_curves
from peft_recipes.reporting.drawing import Plot
from peft_recipes.reporting.facts import Comparison


def plots(comparison: Comparison) -> list[Plot]:
    """Every figure that the comparison has data for, in the report's order."""
    with drawing.look():
        built = [build(comparison) for build in BUILDERS]
    return [plot for plot in built if plot is not None]


class _Axis:
    """The quality axis: fractions in percent, a loss as it is."""

    def __init__(self, comparison: Comparison):
        self.metric = comparison.get("metric", "loss")
        self.share = fmt.is_share(self.metric)
        self.title = f"Test {fmt.metric_title(self.metric)}{' (%)' if self.share else ''}"
        self.better = "up" if comparison.get("higher_is_better", True) else "down"

    def scale(self, value: float) -> float:
        return 100 * value if self.share else value

    def show(self, value: float | None) -> str:
        return fmt.quality(value, self.metric)


def _error(comparison: Comparison, arm: dict) -> float | None:
    """Half length of an arm's bar: one sd over seeds; for one seed of a fraction, its 95 % interval over test examples."""
    deviation, value = facts.spread(arm), facts.mean(arm)
    if deviation is not None:
        return deviation
    examples = facts.number((comparison.get("rows") or {}).get("test"))
    if fmt.is_share(comparison.get("metric", "")) and examples and value is not None and 0 <= value <= 1:
        return 1.96 * math.sqrt(value * (1 - value) / examples)  # normal approximation of a proportion
    return None


def _bar_words(comparison: Comparison) -> str:
    measured = facts.measured(comparison).values()
    seeds = max((facts.seeds_done(arm) for arm in measured), default=0)
    if any(facts.spread(arm) is not None for arm in measured):
        return f" Bars: one standard deviation over {seeds} seeds."
    if any(_error(comparison, arm) is not None for arm in measured):
        return " Bars: 95 % interval over the test examples, one seed."
    return ""


def _base_line(comparison: Comparison, axes: Any, axis: _Axis) -> str:
    """Draw the untuned base as a line across, so that the eye sees what tuning brought; its words for the caption."""
    base = facts.base_value(comparison)
    if base is None:
        return ""
    axes.axhline(axis.scale(base), color=drawing.BASE, linestyle=(0, (2, 2)), linewidth=1.4, zorder=1)
    _line_name(axes, axis.scale(base), "untuned base", drawing.BASE)
    return f" Dashed line: the untuned base, {axis.show(base)}."


def _line_name(axes: Any, height: float, name: str, colour: str) -> None:
    axes.annotate(name, (0.99, height), (0, -3), xycoords=("axes fraction", "data"), textcoords="offset points", ha="right",
                  va="top", color=colour, fontsize=10)  # fmt: skip


def _quality_limits(axes: Any, axis: _Axis) -> None:
    """Room around the points, and never so narrow a window that a difference of nothing looks like one."""
    axes.margins(y=0.14)
    low, high = axes.get_ylim()
    least = 4.0 if axis.share else 0.04 * max(abs(low), abs(high))
    lack = max(0.0, least - (high - low)) / 2
    axes.set_ylim(low - lack, high + lack)


def _scatter(
    comparison: Comparison, field: str, name: str, title: str, x_title: str, show: Callable, log: bool
) -> Plot | None:
    """Quality against one cost, a point an arm; `show` writes a cost in words and, on a logarithmic axis, at its ticks."""
    styles, axis = drawing.arm_styles(comparison), _Axis(comparison)
    costs = {arm: facts.number(found.get(field)) for arm, found in facts.measured(comparison).items()}
    costs = {arm: cost for arm, cost in costs.items() if cost is not None and cost > 0}
    if not costs:
        return None
    figure, axes = drawing.canvas()
    divisor, unit = (1, "") if log else _time_unit(max(costs.values()))
    points, bars = [], []
    for arm, cost in costs.items():
        x, y = cost / divisor, axis.scale(facts.mean(facts.arms(comparison)[arm]))
        error = axis.scale(_error(comparison, facts.arms(comparison)[arm]) or 0)
        if error:
            axes.errorbar([x], [y], yerr=[error], color=styles[arm].colour, linewidth=1.6, capsize=3.5, zorder=2)
            bars.append((x, y - error, y + error))
        axes.plot(
            [x],
            [y],
            styles[arm].marker,
            color=styles[arm].colour,
            markersize=9,
            markeredgecolor=drawing.PAPER,
            zorder=3,
        )
        points.append((x, y, facts.shorten(arm, 22), styles[arm].colour))
    below = _base_line(comparison, axes, axis)
    _quality_limits(axes, axis)
    if log:
        axes.set_xscale("log")
        _log_ticks(axes, list(costs.values()), show)
    else:
        axes.set_xlim(left=0, right=1.12 * max(costs.values()) / divisor)
    axes.set(xlabel=f"{x_title}{unit}", ylabel=axis.title)
    drawing.label_points(figure, axes, points, bars)
    arms = facts.arms(comparison)
    told = "; ".join(
        f"{facts.label(comparison, n)} {axis.show(facts.mean(arms[n]))} with {show(c)}" for n, c in costs.items()
    )
    caption = f"Further {axis.better} and left is better.{below}{_bar_words(comparison)}"
    return Plot(name, title, caption, f"{axis.title} against {x_title.lower()}: {told}.{below}", figure)


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


def against_full(comparison: Comparison) -> Plot | None:
    """Each arm's difference with its interval, and the margin as a band: the verdicts as a picture."""
    told = {name: facts.difference(comparison, name) for name in facts.measured(comparison)}
    told = {name: found for name, found in told.items() if found}
    if not told:
        return None
    styles, names = drawing.arm_styles(comparison), list(told)
    scale, unit = words.difference_scale(comparison, names[0])
    figure, axes = drawing.canvas(height=max(2.1, 1.25 + 0.46 * len(names)))
    margin = scale * abs(facts.number(told[names[0]].get("margin")) or 0)
    if margin:
        axes.axvspan(-margin, margin, color=drawing.BASE, alpha=0.16, linewidth=0, zorder=0)
    axes.axvline(0, color=drawing.MUTED, linewidth=1.2, zorder=1)
    axes.plot([-1.25 * margin, 1.25 * margin], [0, 0], alpha=0)  # so that the band's ends are seen
    for place, (name, found) in enumerate(told.items()):
        style, (low, high), estimate = (
            styles[name],
            (scale * bound for bound in found["ci95"]),
            scale * found["estimate"],
        )
        axes.plot(
            [low, high],
            [place, place],
            "|-",
            color=style.colour,
            linewidth=2,
            markersize=8,
            markeredgewidth=2,
            zorder=2,
        )
        axes.plot(
            [estimate], [place], style.marker, color=style.colour, markersize=9, markeredgecolor=drawing.PAPER, zorder=3
        )
    axes.set_yticks(range(len(names)), [facts.shorten(name, 18) for name in names])
    axes.tick_params(axis="y", labelcolor=drawing.INK, length=0)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    shown_unit = {" points": "points", " %": "%", "": ""}[unit]
    metric = fmt.metric_title(comparison.get("metric", "loss"))
    axes.set_xlabel(
        f"Difference in {metric} from {_reference_words(comparison, names[0])}{f' ({shown_unit})' if shown_unit else ''}"
    )
    sense = (
        "Right of zero is better"
        if comparison.get("higher_is_better", True)
        else "Left of zero is better (a lower loss)"
    )
    caption = f"{sense}. Lines: 95 % intervals. Grey band: the margin within which an arm counts as equivalent."
    lines = [
        f"{facts.label(comparison, n)} {words.describe_difference(comparison, n)}, {told[n].get('verdict')}"
        for n in names
    ]
    return Plot(
        "difference",
        f"Difference from {_reference_words(comparison, names[0])}",
        caption,
        "; ".join(lines) + ".",
        figure,
    )


def _reference_words(comparison: Comparison, name: str) -> str:
    against = facts.reference(comparison, name)
    if against is None:
        return "the reference"
    return (
        words.FULL_NAME if facts.is_full(against, facts.arms(comparison)[against]) else facts.label(comparison, against)
    )


def quality_by_parameters(comparison: Comparison) -> Plot | None:
    """Quality against trained parameters, logarithmic."""
    return _scatter(comparison, "trainable_parameters", "parameters", "Quality against trained parameters",
                    "Trained parameters, logarithmic", fmt.short_count, log=True)  # fmt: skip


def quality_by_time(comparison: Comparison) -> Plot | None:
    """Quality against training time."""
    return _scatter(comparison, "training_seconds", "time", "Quality against training time", "Training time",
                    fmt.seconds, log=False)  # fmt: skip


def memory_bars(comparison: Comparison) -> Plot | None:
    """Peak memory of each arm."""
    return _bars(comparison, "peak_memory_bytes", "memory", "Peak memory while training")


def checkpoint_bars(comparison: Comparison) -> Plot | None:
    """Checkpoint size of each arm."""
    return _bars(comparison, "checkpoint_bytes", "checkpoint", "Checkpoint on disk")


def _bars(comparison: Comparison, field: str, name: str, title: str) -> Plot | None:
    values = {arm: facts.number(found.get(field)) for arm, found in facts.measured(comparison).items()}
    values = {arm: value for arm, value in values.items() if value}
    if not values:
        return None
    styles = drawing.arm_styles(comparison)
    figure, axes = drawing.canvas(height=max(1.5, 0.55 + 0.46 * len(values)))
    for place, (arm, value) in enumerate(values.items()):
        axes.barh(
            place,
            value,
            height=0.62,
            color=styles[arm].colour,
            hatch=styles[arm].hatch,
            edgecolor=drawing.PAPER,
            linewidth=0,
        )
        axes.annotate(fmt.human_bytes(value), (value, place), xytext=(6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(values)), [facts.shorten(arm, 18) for arm in values])
    axes.tick_params(axis="y", labelcolor=drawing.INK, length=0)
    axes.set(ylim=(len(values) - 0.45, -0.55), xlim=(0, 1.22 * max(values.values())))
    axes.xaxis.set_visible(False)
    axes.grid(visible=False)
    axes.spines[["bottom", "left"]].set_visible(False)
    told = "; ".join(f"{facts.label(comparison, arm)} {fmt.human_bytes(value)}" for arm, value in values.items())
    return Plot(name, title, "Shorter is better.", f"{title}: {told}.", figure)


def rank_curve(comparison: Comparison) -> Plot | None:
    """Quality by rank, for arms that differ in nothing else."""
    groups = facts.rank_groups(comparison)
    if not groups:
        return None
    arms, styles, axis = facts.arms(comparison), drawing.arm_styles(comparison), _Axis(comparison)
    figure, axes = drawing.canvas()
    for group in groups:
        style = styles[group[-1]] if len(groups) > 1 else drawing.Style(drawing.VERMILLION, "o", "-", "")
        ranks, values = [arms[name]["rank"] for name in group], [axis.scale(facts.mean(arms[name])) for name in group]
        errors = [_error(comparison, arms[name]) for name in group]
        bars = None if any(error is None for error in errors) else [axis.scale(error) for error in errors]
        axes.errorbar(ranks, values, yerr=bars, color=style.colour, linestyle=style.line, marker=style.marker, markersize=8,
                      markeredgecolor=drawing.PAPER, linewidth=1.9, elinewidth=1.6, capsize=3.5)  # fmt: skip
        if len(groups) > 1:
            axes.annotate(facts.shorten(group[-1], 18), (ranks[-1], values[-1]), xytext=(8, 0), textcoords="offset points",
                          va="center", color=style.colour, fontweight="bold")  # fmt: skip
    below = _full_line(comparison, axes, axis)
    ranks = sorted({arms[name]["rank"] for group in groups for name in group})
    _quality_limits(axes, axis)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ranks, [str(rank) for rank in ranks], minor=False)
    axes.minorticks_off()
    axes.margins(x=0.1)
    axes.set(xlabel="Rank, logarithmic", ylabel=axis.title)
    told = "; ".join(f"rank {arms[n]['rank']} {axis.show(facts.mean(arms[n]))}" for group in groups for n in group)
    caption = f"Same method and targets, the rank alone differs.{below}{_bar_words(comparison)}"
    return Plot("rank", "Quality by rank", caption, f"{axis.title} by rank: {told}.{below}", figure)


def _full_line(comparison: Comparison, axes: Any, axis: _Axis) -> str:
    against = facts.reference(comparison)
    full = facts.mean(facts.arms(comparison).get(against or ""))
    if full is None:
        return ""
    axes.axhline(axis.scale(full), color=drawing.BLUE, linestyle="--", linewidth=1.6, zorder=1)
    _line_name(axes, axis.scale(full), "full", drawing.BLUE)
    return f" Dashed line: full fine-tuning, {axis.show(full)}."


def forgetting(comparison: Comparison) -> Plot | None:
    """What each arm gained on the test split against what it lost on the first extra set."""
    metric, styles, points = comparison.get("metric", "loss"), drawing.arm_styles(comparison), []
    for split in facts.extra_splits(comparison)[:1]:
        for name in facts.measured(comparison):
            learned, kept = facts.gain(comparison, name), facts.gain(comparison, name, split)
            if learned is not None and kept is not None:
                points.append((learned, kept, name))
    if not points:
        return None
    factor, unit = (100, "points") if fmt.is_share(metric) else (1, metric)
    split = facts.shorten(facts.extra_splits(comparison)[0], 20)
    figure, axes = drawing.canvas()
    axes.axhline(0, color=drawing.MUTED, linewidth=1.2, zorder=1)
    for learned, kept, name in points:
        style = styles[name]
        axes.plot(
            [factor * learned],
            [factor * kept],
            style.marker,
            color=style.colour,
            markersize=10,
            markeredgecolor=drawing.PAPER,
        )
    axes.margins(x=0.16, y=0.2)
    axes.set(xlabel=f"Gained on test ({unit})", ylabel=f"Change on {split} ({unit})")
    named = [(factor * x, factor * y, facts.shorten(name, 22), styles[name].colour) for x, y, name in points]
    drawing.label_points(figure, axes, named)
    told = "; ".join(
        f"{facts.label(comparison, n)} {fmt.signed(factor * x)} on test, {fmt.signed(factor * y)} on {split}"
        for x, y, n in points
    )
    caption = f"Against the untuned base. Further right: learned more. Below the line: forgot some of {split}."
    return Plot("forgetting", "Learned and forgotten", caption, f"Change from the base ({unit}): {told}.", figure)


BUILDERS = (
    against_full, quality_by_parameters, loss_curves, validation_curves, quality_by_time, rank_curve, forgetting, memory_bars,
    checkpoint_bars,
)  # fmt: skip
NAMES = (
    "difference",
    "parameters",
    "loss",
    "validation",
    "time",
    "rank",
    "forgetting",
    "memory",
    "checkpoint",
    "samples",
)


def sample_sheet(comparison: Comparison) -> Plot | None:
    """The sample images in two rows, before and after the shift, for the Markdown (the page shows them itself)."""
    import io

    found = details.samples(comparison)[:8]
    if not found:
        return None
    with drawing.look():
        from matplotlib.figure import Figure
        from matplotlib.image import imread

        figure = Figure(figsize=(drawing.WIDTH, drawing.WIDTH / len(found) * 2 + 0.5), layout="constrained")
        cells = figure.subplots(2, len(found), squeeze=False)
        for column, sample in enumerate(found):
            for row, image in enumerate((sample.before, sample.after)):
                axes = cells[row][column]
                axes.imshow(imread(io.BytesIO(image)), cmap="gray", interpolation="nearest")
                axes.set(xticks=[], yticks=[])
            cells[0][column].set_title(sample.label, fontsize=11)
        cells[0][0].set_ylabel("before")
        cells[1][0].set_ylabel("after")
    alt = (
        f"{len(found)} examples, above before and below after the shift: {', '.join(sample.label for sample in found)}."
    )
    return Plot("samples", "Examples before and after the shift", "", alt, figure)
