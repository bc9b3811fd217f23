"""Plots that compare the arms: difference from full, forgetting, memory, checkpoint size."""

from __future__ import annotations

from typing import Any

from peft_recipes.reporting import facts, figure_style, sentences
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.facts import Comparison
from peft_recipes.reporting.figure_style import Plot


def against_full(comparison: Comparison) -> Plot | None:
    """Plot each arm's difference from its reference with its interval; a band shows the margin."""
    differences = {name: facts.difference(comparison, name) for name in facts.measured(comparison)}
    differences = {name: difference for name, difference in differences.items() if difference}
    if not differences:
        return None
    styles, names = figure_style.arm_styles(comparison), list(differences)
    scale, unit = sentences.difference_scale(comparison, names[0])
    figure, axes = figure_style.canvas(height=max(2.1, 1.25 + _row_height(names) * len(names)))
    margin = scale * abs(facts.number(differences[names[0]].get("margin")) or 0)
    if margin:
        axes.axvspan(-margin, margin, color=figure_style.BASE, alpha=0.16, linewidth=0, zorder=0)
    axes.axvline(0, color=figure_style.MUTED, linewidth=1.2, zorder=1)
    axes.update_datalim([(-1.25 * margin, 0), (1.25 * margin, 0)])  # both ends of the band are visible
    for row, (name, difference) in enumerate(differences.items()):
        interval = [scale * bound for bound in difference["ci95"]]
        line = {"color": styles[name].colour, "linewidth": 2, "markersize": 8, "markeredgewidth": 2, "zorder": 2}
        axes.plot(interval, [row, row], "|-", **line)
        figure_style.mark(axes, scale * difference["estimate"], row, styles[name])
    _name_rows(axes, names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    reference = sentences.reference_name(comparison, names[0])
    unit_words = {" points": " (points)", " %": " (%)", "": ""}[unit]
    axes.set_xlabel(f"Difference in {fmt.metric_title(facts.metric(comparison))} from {reference}{unit_words}")
    higher = comparison.get("higher_is_better", True)
    direction = "Right of zero is better" if higher else "Left of zero is better (a lower loss)"
    caption = f"{direction}. Lines: 95 % intervals. Grey band: the margin within which an arm counts as equivalent."
    texts = [
        f"{facts.label(comparison, name)} {sentences.describe_difference(comparison, name)}, "
        f"{differences[name].get('verdict')}"
        for name in names
    ]
    return Plot("difference", f"Difference from {reference}", caption, "; ".join(texts) + ".", figure)


def _row_height(names: list[str]) -> float:
    """Return inches per row; rows of many arms are lower, so that the figure fits a screen."""
    return 0.46 if len(names) <= 12 else 0.3


def _name_rows(axes: Any, names: list[str]) -> None:
    axes.set_yticks(range(len(names)), [facts.shorten(name, 18) for name in names])
    axes.tick_params(axis="y", labelcolor=figure_style.INK, length=0)


def forgetting(comparison: Comparison) -> Plot | None:
    """Plot each arm's gain on the test split against its change on each extra split and benchmark, one panel each."""
    changes = {split: _changes(comparison, split) for split in facts.extra_splits(comparison)}
    changes = {split: points for split, points in changes.items() if points}
    if not changes:
        return None
    styles = figure_style.arm_styles(comparison)
    figure, each = figure_style.panels(len(changes))
    gained, texts = _unit(comparison, "test"), []
    for axes, (split, points) in zip(each, changes.items(), strict=True):
        shown, unit = facts.shorten(split, 20), _unit(comparison, split)
        axes.axhline(0, color=figure_style.MUTED, linewidth=1.2, zorder=1)
        for x, y, name in points:
            figure_style.mark(axes, x, y, styles[name], size=10)
        axes.margins(x=0.16, y=0.2)
        axes.set(xlabel=f"Gained on test ({gained})", ylabel=f"Change on {shown} ({unit})")
        texts += [
            f"{facts.label(comparison, name)} {fmt.signed(x)} on test, {fmt.signed(y)} on {shown}"
            for x, y, name in points
        ]
    for axes, points in zip(each, changes.values(), strict=True):
        figure_style.label_points(figure, axes, [(x, y, facts.shorten(name, 22)) for x, y, name in points])
    lost = fmt.listed([facts.shorten(split, 20) for split in changes])
    caption = f"Compared with the untuned base. Further right: learned more. Below the line: forgot some of {lost}."
    units = fmt.listed(list(dict.fromkeys([gained, *(_unit(comparison, split) for split in changes)])))
    alt = f"Change from the base ({units}): {'; '.join(texts)}."
    return Plot("forgetting", "Learned and forgotten", caption, alt, figure)


def _changes(comparison: Comparison, split: str) -> list[tuple[float, float, str]]:
    """Each measured arm's gain on test and on a split, in points or the metric's unit, and its name."""
    gains = [
        (facts.gain(comparison, name), facts.gain(comparison, name, split), name) for name in facts.measured(comparison)
    ]
    across, up = (100 if fmt.is_share(facts.shown_as(comparison, each)) else 1 for each in ("test", split))
    return [(across * x, up * y, name) for x, y, name in gains if x is not None and y is not None]


def _unit(comparison: Comparison, split: str) -> str:
    return "points" if fmt.is_share(facts.shown_as(comparison, split)) else facts.split_metric(comparison, split)


def memory_bars(comparison: Comparison) -> Plot | None:
    """Plot the peak memory of each arm."""
    return _bars(comparison, "peak_memory_bytes", "memory", "Peak memory while training")


def checkpoint_bars(comparison: Comparison) -> Plot | None:
    """Plot the checkpoint size of each arm."""
    return _bars(comparison, "checkpoint_bytes", "checkpoint", "Checkpoint on disk")


def _bars(comparison: Comparison, field: str, name: str, title: str) -> Plot | None:
    sizes, left_out = facts.comparable_figures(comparison, field)
    if not sizes:
        return None
    styles, names = figure_style.arm_styles(comparison), list(sizes)
    figure, axes = figure_style.canvas(height=max(1.5, 0.55 + _row_height(names) * len(names)))
    for row, (arm, size) in enumerate(sizes.items()):
        look = {"color": styles[arm].colour, "hatch": styles[arm].hatch, "edgecolor": figure_style.PAPER}
        axes.barh(row, size, height=0.62, linewidth=0, **look)
        axes.annotate(fmt.human_bytes(size), (size, row), xytext=(6, 0), textcoords="offset points", va="center")
    _name_rows(axes, names)
    axes.set(ylim=(len(names) - 0.45, -0.55), xlim=(0, 1.22 * max(sizes.values())))
    axes.xaxis.set_visible(False)
    axes.grid(visible=False)
    axes.spines[["bottom", "left"]].set_visible(False)
    texts = "; ".join(f"{facts.label(comparison, arm)} {fmt.human_bytes(size)}" for arm, size in sizes.items())
    return Plot(name, title, f"Shorter is better.{left_out}", f"{title}: {texts}.", figure)
