"""A scan in words, as a table and as a plot: validation loss against learning rate, a line an arm."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.reporting import facts, figure_style
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.figure_style import Plot

if TYPE_CHECKING:
    from rich.console import Console

PLOT = "learning-rates.png"
ENDED = {"whole": "", "stopped": "stopped early", "out of time": "out of time", "diverged": "diverged"}


def write_scan_plots(data: dict[str, Any], folder: Path) -> None:
    """learning-rates.png beside scan.json, where there is a loss to draw."""
    from peft_recipes.reporting.write import write_atomically

    with figure_style.look():
        plot = loss_by_rate(data)
    if plot is not None:
        write_atomically(folder / PLOT, plot.png())


def loss_by_rate(data: dict[str, Any]) -> Plot | None:
    """Validation loss against learning rate; a run that was stopped early is hollow, the best is ringed."""
    points = {name: _points(arm) for name, arm in data["arms"].items()}
    points = {name: found for name, found in points.items() if found}
    if not points:
        return None
    styles = figure_style.arm_styles(data)
    figure, axes = figure_style.canvas()
    top = _top([loss for found in points.values() for _, loss, _ in found])
    for name, found in points.items():
        style, losses = styles[name], [min(loss, top) for _, loss, _ in found]
        axes.plot([rate for rate, _, _ in found], losses, linestyle=style.line, color=style.colour, linewidth=1.7)
        for (rate, loss, whole), height in zip(found, losses, strict=True):
            axes.plot([rate], [height], "^" if loss > top else style.marker, color=style.colour, markersize=8,
                      markerfacecolor=style.colour if whole else figure_style.PAPER, zorder=3,
                      clip_on=False)  # fmt: skip
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda rate, _: fmt.learning_rate(rate))
    axes.margins(x=0.1, y=0.1)
    best = _best_points(data, top)
    axes.plot([rate for rate, _, _ in best], [loss for _, loss, _ in best], "o", markersize=15,
              markerfacecolor="none", markeredgecolor=figure_style.INK, markeredgewidth=1.3, zorder=4)  # fmt: skip
    axes.set(xlabel="Learning rate, logarithmic", ylabel="Validation loss")
    figure_style.label_points(figure, axes, best)
    caption = (
        f"After {data['steps']} steps. Ringed: each arm's best. Hollow: stopped early, after a quarter or half of the "
        "steps. A triangle at the top: a loss beyond the plot."
    )
    return Plot("learning-rates", "Validation loss by learning rate", caption, " ".join(scan_words(data)), figure)


def _points(arm: dict[str, Any]) -> list[tuple[float, float, bool]]:
    """(rate, last validation loss, whether the run was whole) of the runs that were looked at."""
    return [
        (run["learning_rate"], run["validation"][-1]["loss"], run["ended"] == "whole")
        for run in arm["runs"]
        if run["validation"] and facts.number(run["validation"][-1]["loss"]) is not None
    ]


def _best_points(data: dict[str, Any], top: float) -> list[tuple[float, float, str]]:
    return [
        (arm["best"], min(arm["validation"]["loss"], top), facts.shorten(name, 18))
        for name, arm in data["arms"].items()
        if arm["best"] is not None
    ]


def _top(losses: list[float]) -> float:
    """The height of the plot: a run that all but diverged must not flatten the others."""
    ordered = sorted(losses)
    best, middle = ordered[0], ordered[len(ordered) // 2]
    return max(min(ordered[-1], best + 3 * (middle - best)), best + 1e-6)


def scan_words(data: dict[str, Any]) -> list[str]:
    """What was found, a sentence each: the best rates, those at an edge, what was not begun, ranks."""
    lines = [line for name, arm in data["arms"].items() for line in _arm_words(data, name, arm)]
    lines += _rank_words(data)
    left = {name: arm["not_begun"] for name, arm in data["arms"].items() if arm["not_begun"]}
    if left:
        told = "; ".join(f"{name} {', '.join(map(fmt.learning_rate, rates))}" for name, rates in left.items())
        lines.append(
            f"Not begun, since a whole run would have overrun the budget of {fmt.seconds(data['budget']['seconds'])}: "
            f"{told}. The same command with a larger --budget goes on with them."
        )
    if 0 < data["steps"] < data["recipe_steps"]:
        lines.append(
            f"The runs had {data['steps']} steps of the recipe's {data['recipe_steps']}: a short run favours a higher "
            "rate than a long one does."
        )
    return lines


def _arm_words(data: dict[str, Any], name: str, arm: dict[str, Any]) -> list[str]:
    if arm["best"] is None:
        return [f"{name}: no run gave a loss."]
    rate, loss = fmt.learning_rate(arm["best"]), fmt.quality(arm["validation"]["loss"], "loss")
    lines = [f"{name}: best at {rate}, validation loss {loss} after {arm['validation']['step']} steps."]
    if arm["at_the_edge"]:
        side = {"lowest": "lower", "highest": "higher"}[arm["at_the_edge"]]
        low, high = (arm["best"] / 30, arm["best"]) if side == "lower" else (arm["best"], arm["best"] * 30)
        lines.append(
            f"That is the {arm['at_the_edge']} rate that was tried of {name}: a {side} one may be better still "
            f"(--arms {arm['of']} --learning-rates {low:.0e}:{high:.0e}:4)."
        )
    return lines


def _rank_words(data: dict[str, Any]) -> list[str]:
    """The ranks of one arm side by side, where there are several."""
    groups: dict[str, list[tuple[int, str]]] = {}
    for name, arm in data["arms"].items():
        if arm["rank"] and arm["best"] is not None:
            groups.setdefault(arm["of"], []).append((arm["rank"], name))
    lines = []
    for of, ranks in groups.items():
        if len(ranks) < 2:
            continue
        shown = [f"r={rank} {fmt.quality(data['arms'][name]['validation']['loss'], 'loss')}"
                 for rank, name in sorted(ranks)]  # fmt: skip
        lines.append(
            f"{of} by rank, each at its best rate: {', '.join(shown)}. Which rank is enough, `compare` "
            "says, with intervals."
        )
    return lines


def render_scan(data: dict[str, Any], console: Console) -> None:
    """Print a scan to a rich console."""
    from rich.table import Table
    from rich.text import Text

    title = Text(facts.plain(data["recipe"]), style="bold")
    title.append(f"  scan: {data['steps']} steps a run, judged on the validation split", style="not bold")
    if data["embedded"]:
        title.append("  embedded stand-ins", style="not bold yellow")
    console.print(title)
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("arm", "rate", "validation loss", "steps", ""):
        shown.add_column(column, justify="left" if column in ("arm", "") else "right")
    for name, arm in data["arms"].items():
        for run in arm["runs"]:
            last = run["validation"][-1] if run["validation"] else None
            best = run["learning_rate"] == arm["best"]
            note = "best" if best else ENDED[run["ended"]]
            shown.add_row(
                name, fmt.learning_rate(run["learning_rate"]),
                fmt.quality(last["loss"], "loss") if last else fmt.NOTHING, str(last["step"]) if last else fmt.NOTHING,
                note, style="bold" if best else "",
            )  # fmt: skip
            name = ""
    console.print(shown)
    console.print()
    for line in scan_words(data):
        console.print(Text(line))
    spent = fmt.seconds(data["budget"]["spent_seconds"])
    console.print(Text(f"{spent} of the budget of {fmt.seconds(data['budget']['seconds'])} were used.", style="dim"))
