"""The figures that hold the arms against each other: differences, what was forgotten, memory, checkpoints."""

from __future__ import annotations

from collections.abc import Collection

from peft_recipes.reporting import facts, figure_style, sentences
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.facts import Comparison
from peft_recipes.reporting.figure_style import Plot


def against_full(comparison: Comparison) -> Plot | None:
    """Each arm's difference with its interval, and the margin as a band: the verdicts as a picture."""
    told = {name: facts.difference(comparison, name) for name in facts.measured(comparison)}
    told = {name: found for name, found in told.items() if found}
    if not told:
        return None
    styles, names = figure_style.arm_styles(comparison), list(told)
    scale, unit = sentences.difference_scale(comparison, names[0])
    figure, axes = figure_style.canvas(height=max(2.1, 1.25 + _row(names) * len(names)))
    margin = scale * abs(facts.number(told[names[0]].get("margin")) or 0)
    if margin:
        axes.axvspan(-margin, margin, color=figure_style.BASE, alpha=0.16, linewidth=0, zorder=0)
    axes.axvline(0, color=figure_style.MUTED, linewidth=1.2, zorder=1)
    axes.update_datalim([(-1.25 * margin, 0), (1.25 * margin, 0)])  # so that the band's ends are seen
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
            [estimate],
            [place],
            style.marker,
            color=style.colour,
            markersize=9,
            markeredgecolor=figure_style.PAPER,
            zorder=3,
        )
    axes.set_yticks(range(len(names)), [facts.shorten(name, 18) for name in names])
    axes.tick_params(axis="y", labelcolor=figure_style.INK, length=0)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    shown_unit = {" points": "points", " %": "%", "": ""}[unit]
    metric = fmt.metric_title(facts.metric(comparison))
    unit_words = f" ({shown_unit})" if shown_unit else ""
    axes.set_xlabel(f"Difference in {metric} from {_reference_words(comparison, names[0])}{unit_words}")
    sense = (
        "Right of zero is better"
        if comparison.get("higher_is_better", True)
        else "Left of zero is better (a lower loss)"
    )
    caption = f"{sense}. Lines: 95 % intervals. Grey band: the margin within which an arm counts as equivalent."
    lines = [
        f"{facts.label(comparison, n)} {sentences.describe_difference(comparison, n)}, {told[n].get('verdict')}"
        for n in names
    ]
    return Plot(
        "difference",
        f"Difference from {_reference_words(comparison, names[0])}",
        caption,
        "; ".join(lines) + ".",
        figure,
    )


def _row(arms: Collection[str]) -> float:
    """Inches a row: many arms stand closer, so that the figure still fits a screen."""
    return 0.46 if len(arms) <= 12 else 0.3


def _reference_words(comparison: Comparison, name: str) -> str:
    against = facts.reference(comparison, name)
    if against is None:
        return "the reference"
    return (
        sentences.FULL_NAME
        if facts.is_full(against, facts.arms(comparison)[against])
        else facts.label(comparison, against)
    )


def forgetting(comparison: Comparison) -> Plot | None:
    """What each arm gained on the test split against what it lost on the first extra set."""
    metric, styles, points = facts.metric(comparison), figure_style.arm_styles(comparison), []
    for split in facts.extra_splits(comparison)[:1]:
        for name in facts.measured(comparison):
            learned, kept = facts.gain(comparison, name), facts.gain(comparison, name, split)
            if learned is not None and kept is not None:
                points.append((learned, kept, name))
    if not points:
        return None
    factor, unit = (100, "points") if fmt.is_share(metric) else (1, metric)
    split = facts.shorten(facts.extra_splits(comparison)[0], 20)
    figure, axes = figure_style.canvas()
    axes.axhline(0, color=figure_style.MUTED, linewidth=1.2, zorder=1)
    for learned, kept, name in points:
        style = styles[name]
        axes.plot(
            [factor * learned],
            [factor * kept],
            style.marker,
            color=style.colour,
            markersize=10,
            markeredgecolor=figure_style.PAPER,
        )
    axes.margins(x=0.16, y=0.2)
    axes.set(xlabel=f"Gained on test ({unit})", ylabel=f"Change on {split} ({unit})")
    named = [(factor * x, factor * y, facts.shorten(name, 22)) for x, y, name in points]
    figure_style.label_points(figure, axes, named)
    told = "; ".join(
        f"{facts.label(comparison, n)} {fmt.signed(factor * x)} on test, {fmt.signed(factor * y)} on {split}"
        for x, y, n in points
    )
    caption = f"Against the untuned base. Further right: learned more. Below the line: forgot some of {split}."
    return Plot("forgetting", "Learned and forgotten", caption, f"Change from the base ({unit}): {told}.", figure)


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
    styles = figure_style.arm_styles(comparison)
    figure, axes = figure_style.canvas(height=max(1.5, 0.55 + _row(values) * len(values)))
    for place, (arm, value) in enumerate(values.items()):
        axes.barh(
            place,
            value,
            height=0.62,
            color=styles[arm].colour,
            hatch=styles[arm].hatch,
            edgecolor=figure_style.PAPER,
            linewidth=0,
        )
        axes.annotate(fmt.human_bytes(value), (value, place), xytext=(6, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(values)), [facts.shorten(arm, 18) for arm in values])
    axes.tick_params(axis="y", labelcolor=figure_style.INK, length=0)
    axes.set(ylim=(len(values) - 0.45, -0.55), xlim=(0, 1.22 * max(values.values())))
    axes.xaxis.set_visible(False)
    axes.grid(visible=False)
    axes.spines[["bottom", "left"]].set_visible(False)
    told = "; ".join(f"{facts.label(comparison, arm)} {fmt.human_bytes(value)}" for arm, value in values.items())
    return Plot(name, title, "Shorter is better.", f"{title}: {told}.", figure)
