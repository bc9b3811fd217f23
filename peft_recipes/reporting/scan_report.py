"""Report of a learning-rate scan: sentences, table, and a plot of validation loss against learning rate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from peft_recipes.reporting import facts, figure_style
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.figure_style import Plot
from peft_recipes.reporting.terminal import heading
from peft_recipes.reporting.write import write_atomically

PLOT = "learning-rates.png"
ENDED = {"whole": "", "stopped": "stopped early"}  # other ends are shown as they are


def write_scan_plots(data: dict[str, Any], folder: Path) -> None:
    """Write learning-rates.png next to scan.json, if any run has a loss."""
    with figure_style.look():
        plot = loss_by_learning_rate(data)
    if plot is not None:
        write_atomically(folder / PLOT, plot.png())


def loss_by_learning_rate(data: dict[str, Any]) -> Plot | None:
    """Plot validation loss against learning rate: hollow if stopped early, a ring around each arm's best."""
    runs = {name: _points(arm) for name, arm in data["arms"].items()}
    runs = {name: points for name, points in runs.items() if points}
    if not runs:
        return None
    styles = figure_style.arm_styles(data)
    figure, axes = figure_style.canvas()
    top = _top([loss for points in runs.values() for _, loss, _ in points])
    for name, points in runs.items():
        style, losses = styles[name], [min(loss, top) for _, loss, _ in points]
        axes.plot([rate for rate, _, _ in points], losses, linestyle=style.line, color=style.colour, linewidth=1.7)
        for (rate, loss, complete), height in zip(points, losses, strict=True):
            look = {"markersize": 8, "markerfacecolor": style.colour if complete else figure_style.PAPER, "zorder": 3}
            axes.plot([rate], [height], "^" if loss > top else style.marker, color=style.colour, clip_on=False, **look)
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda rate, _: fmt.learning_rate(rate))
    axes.margins(x=0.1, y=0.1)
    best = [
        (arm["best"], min(arm["validation"]["loss"], top), facts.shorten(name, 18))
        for name, arm in data["arms"].items()
        if arm["best"] is not None
    ]
    figure_style.ring(axes, [rate for rate, _, _ in best], [loss for _, loss, _ in best], size=15)
    axes.set(xlabel="Learning rate, logarithmic", ylabel="Validation loss")
    figure_style.label_points(figure, axes, best)
    caption = (
        f"After {data['steps']} steps. Ringed: each arm's best. Hollow: stopped early, after a quarter or half of the "
        "steps. Triangle at the top: a loss above the plot."
    )
    return Plot("learning-rates", "Validation loss by learning rate", caption, " ".join(scan_words(data)), figure)


def _points(arm: dict[str, Any]) -> list[tuple[float, float, bool]]:
    """Return (learning rate, last validation loss, whether the run is complete) of the evaluated runs."""
    return [
        (run["learning_rate"], run["validation"][-1]["loss"], run["ended"] == "whole")
        for run in arm["runs"]
        if run["validation"] and facts.number(run["validation"][-1]["loss"]) is not None
    ]


def _top(losses: list[float]) -> float:
    """Return the upper limit of the plot, so that a run that almost diverged doesn't flatten the others."""
    ordered = sorted(losses)
    best, middle = ordered[0], ordered[len(ordered) // 2]
    return max(min(ordered[-1], best + 3 * (middle - best)), best + 1e-6)


def scan_words(data: dict[str, Any]) -> list[str]:
    """Return the results as sentences: best learning rates, those at an edge, ranks, runs not started."""
    if line := too_small(data):
        return [line]
    lines = [line for name, arm in data["arms"].items() for line in _arm_words(data, name, arm)]
    lines += _rank_words(data)
    waiting = {name: arm["not_begun"] for name, arm in data["arms"].items() if arm["not_begun"]}
    if waiting:
        rates = "; ".join(f"{name} {', '.join(map(fmt.learning_rate, rates))}" for name, rates in waiting.items())
        lines.append(
            f"Not started, because a run would have exceeded the budget of {fmt.seconds(data['budget']['seconds'])}: "
            f"{rates}. The same command with a larger --budget continues with them."
        )
    if 0 < data["steps"] < data["recipe_steps"]:
        lines.append(
            f"The runs had {data['steps']} steps of the recipe's {data['recipe_steps']}: short runs favour higher "
            "learning rates than long ones."
        )
    return lines


def too_small(data: dict[str, Any]) -> str:
    """Return the sentence about a budget in which no run was begun; empty if any was."""
    budget, arms = data["budget"], data["arms"]
    if data["unfinished"] or any(arm["runs"] for arm in arms.values()):
        return ""
    enough, measured = budget.get("enough_seconds"), [name for name in arms if name in data["probes"]]
    spent = "it ended while the first steps of each arm were measured"
    if len(measured) == len(arms):
        spent = "after the first steps of each arm were measured, too little was left for a run"
    larger = math.ceil(1.5 * (enough or 2 * max(budget["seconds"], budget["spent_seconds"])) / 60)
    return (
        f"The budget of {fmt.seconds(budget['seconds'])} was too small: {spent}. Nothing measured is lost: the same "
        f"command with a larger --budget continues (try --budget {larger}m)."
    )


def _arm_words(data: dict[str, Any], name: str, arm: dict[str, Any]) -> list[str]:
    if arm["best"] is None:
        failed = dict.fromkeys(run["error"] for run in arm["runs"] if run["ended"] == "failed")
        return [f"{name}: no run gave a loss{f' ({facts.error_line(next(iter(failed)))})' if failed else ''}."]
    rate, loss = fmt.learning_rate(arm["best"]), fmt.quality(arm["validation"]["loss"], "loss")
    lines = [f"{name}: best at {rate}, validation loss {loss} after {arm['validation']['step']} steps."]
    if failed := {run["learning_rate"]: run["error"] for run in arm["runs"] if run["ended"] == "failed"}:
        rates = ", ".join(map(fmt.learning_rate, failed))
        lines.append(f"{name} failed at {rates}: {facts.error_line(next(iter(failed.values())))}.")
    if arm["at_the_edge"]:
        side = {"lowest": "lower", "highest": "higher"}[arm["at_the_edge"]]
        low, high = (arm["best"] / 30, arm["best"]) if side == "lower" else (arm["best"], arm["best"] * 30)
        lines.append(
            f"That is the {arm['at_the_edge']} learning rate tried for {name}: a {side} one may be better "
            f"(--arms {arm['of']} --learning-rates {low:.0e}:{high:.0e}:4)."
        )
    return lines


def _rank_words(data: dict[str, Any]) -> list[str]:
    """Return a sentence for each arm that was scanned at several ranks."""
    groups: dict[str, list[tuple[int, str]]] = {}
    for name, arm in data["arms"].items():
        if arm["rank"] and arm["best"] is not None:
            groups.setdefault(arm["of"], []).append((arm["rank"], name))
    lines = []
    for of, ranks in ((of, ranks) for of, ranks in groups.items() if len(ranks) > 1):
        losses = [
            f"r={rank} {fmt.quality(data['arms'][name]['validation']['loss'], 'loss')}" for rank, name in sorted(ranks)
        ]
        lines.append(
            f"{of} by rank, each at its best learning rate: {', '.join(losses)}. To see which rank is enough, with "
            "intervals, use `compare`."
        )
    return lines


def render_scan(data: dict[str, Any], console: Console) -> None:
    """Print a scan to a rich console."""
    title = f"  scan: {data['steps']} steps per run, evaluated on the validation split"
    console.print(heading(data["recipe"], title, data["embedded"]))
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("arm", "learning rate", "validation loss", "steps", ""):
        shown.add_column(column, justify="left" if column in ("arm", "") else "right")
    for name, arm in data["arms"].items():
        for run in arm["runs"]:
            last = run["validation"][-1] if run["validation"] else None
            best = run["learning_rate"] == arm["best"]
            loss, step = (fmt.quality(last["loss"], "loss"), str(last["step"])) if last else (fmt.NOTHING, fmt.NOTHING)
            note = "best" if best else ENDED.get(run["ended"], run["ended"])
            shown.add_row(name, fmt.learning_rate(run["learning_rate"]), loss, step, note, style="bold" if best else "")
            name = ""  # only in the first line of an arm
    if shown.row_count:
        console.print(shown)
        console.print()
    for line in scan_words(data):
        console.print(Text(line))
    spent = fmt.seconds(data["budget"]["spent_seconds"])
    console.print(Text(f"{spent} of the budget of {fmt.seconds(data['budget']['seconds'])} used.", style="dim"))
