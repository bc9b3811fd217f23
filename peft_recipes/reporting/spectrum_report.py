"""A spectrum in words, as a table and as a plot: how much of full's change an adapter of some rank could hold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_recipes.reporting import facts, figure_style
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.figure_style import Plot

if TYPE_CHECKING:
    from rich.console import Console

PLOT = "spectrum.png"
_SHOWN_TARGETS, _SHOWN_MODULES = 6, 8
_RANKS = ("1", "2", "4", "8", "16", "32")


def write_spectrum_plot(data: dict[str, Any], folder: Path) -> None:
    """spectrum.png beside spectrum.json."""
    from peft_recipes.reporting.write import write_atomically

    with figure_style.look():
        plot = held_by_rank(data)
    write_atomically(folder / PLOT, plot.png())


def held_by_rank(data: dict[str, Any]) -> Plot:
    """The share of the squared change that a rank holds, a line a target, those that changed most."""
    shown = [row for row in data["targets"] if row["kind"] != "embedding"][:_SHOWN_TARGETS]
    figure, axes = figure_style.canvas()
    colours = (
        figure_style.BLUE,
        figure_style.VERMILLION,
        figure_style.GREEN,
        figure_style.PURPLE,
        figure_style.ORANGE,
        figure_style.SKY,
    )
    for row, colour, marker in zip(shown, colours, "so^DvP", strict=False):
        ranks = [int(rank) for rank in row["held"]]
        axes.plot(ranks, [100 * share for share in row["held"].values()], "-", marker=marker, color=colour,
                  markersize=6, linewidth=1.7, label=facts.shorten(row["target"], 24))  # fmt: skip
    axes.axhline(90, color=figure_style.MUTED, linestyle=(0, (2, 2)), linewidth=1.2, zorder=1)
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set(xlabel="Rank, logarithmic", ylabel="Squared change held (%)", ylim=(0, 103))
    if shown:
        axes.legend(frameon=False, fontsize=10, loc="lower right")
    caption = "Of what full fine-tuning changed in each kind of module. Dashed line: 90 %."
    return Plot("spectrum", "What a rank could hold", caption, " ".join(spectrum_words(data)), figure)


def spectrum_words(data: dict[str, Any]) -> list[str]:
    """What is to be seen, a sentence each."""
    if not data["squared_change"]:
        return ["Nothing changed: the trained weights are the base's."]
    ranks, outside = data["ranks"], data["outside"]
    held = ", ".join(f"r={rank} {fmt.percent(ranks['held'][rank])}" for rank in _RANKS if rank in ranks["held"])
    lines = [
        f"Adapters on every linear and convolutional layer could hold, of the change in these layers: {held}. "
        f"90 % takes r={ranks['enough_rank']}.",
        f"These layers have {fmt.percent(ranks['share_of_all'])} of the whole squared change"
        + _elsewhere(data)
        + f"; norms and biases have {fmt.percent(outside['share'])}.",
    ]
    most = [row for row in data["targets"] if row["relative_change"] is not None and not row["new"]]
    most = sorted(most, key=lambda row: -row["relative_change"])[:3]
    if most:
        told = ", ".join(f"{row['target']} ({fmt.percent(row['relative_change'])})" for row in most)
        lines.append(f"Changed most for their size, so the first to target: {told}.")
    return lines


def _elsewhere(data: dict[str, Any]) -> str:
    share = sum(row["share"] for row in data["targets"] if row["kind"] == "embedding")
    return f", embeddings {fmt.percent(share)}" if share else ""


def render_spectrum(data: dict[str, Any], console: Console) -> None:
    """Print a spectrum to a rich console: the targets, then the modules that changed most."""
    from rich.text import Text

    title = Text(f"{facts.plain(data['recipe'])}: what full fine-tuning changed, seed {data['seed']}", style="bold")
    if data["embedded"]:
        title.append("  embedded stand-ins", style="not bold yellow")
    console.print(title)
    console.print(_table(data["targets"], "target"))
    if len(data["modules"]) > len(data["targets"]):
        console.print(Text("\nThe modules that changed most for their size", style="bold"))
        changed = [row for row in data["modules"] if row["relative_change"] is not None]
        changed.sort(key=lambda row: -row["relative_change"])
        console.print(_table(changed[:_SHOWN_MODULES], "module"))
    console.print()
    for line in [*spectrum_words(data), *data["notes"]]:
        console.print(Text(line))


def _table(rows: list[dict[str, Any]], key: str) -> Any:
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, header_style="bold")
    ranks = [rank for rank in _RANKS if any(rank in row["held"] for row in rows)][:5]
    headings = [key, "share of the change", "change / weight", *(f"r={rank}" for rank in ranks), "r for 90 %"]
    for heading in headings:
        shown.add_column(heading, justify="left" if heading == key else "right")
    for row in rows:
        name = facts.plain(row[key]) + (f" ({row['modules']})" if row.get("modules", 1) > 1 else "")
        name += " (new head)" if row["new"] else " (embedding)" if row["kind"] == "embedding" else ""
        change = fmt.percent(row["relative_change"]) if row["relative_change"] is not None else fmt.NOTHING
        held = [fmt.percent(row["held"][rank]) if rank in row["held"] else "" for rank in ranks]
        shown.add_row(name, fmt.percent(row["share"]), change, *held, str(row["enough_rank"]))
    return shown


def extraction_words(data: dict[str, Any]) -> list[str]:
    """What the adapter holds, what was lost, and how it does beside the others."""
    change = data["change"]
    parts = [f"its rank cut off {fmt.percent(change['cut_off'])}"]
    if change["outside"]:
        kinds = [f"{kind} {fmt.percent(share)}" for kind, share in change["outside_by_kind"].items()]
        parts.append(f"{fmt.percent(change['outside'])} is in no target ({', '.join(kinds)})")
    head = f" and the head, which is stored whole, {fmt.percent(change['head'])}" if change["head"] else ""
    lines = [
        f"The adapter of rank {data['rank']} holds {fmt.percent(change['held'])} of the squared change{head}; lost: "
        f"{fmt.listed(parts)}.",
        f"Test {fmt.metric_title(data['metric'])} {_tested(data)}.",
    ]
    for row in data["beside"]:
        lines.append(f"Beside {row['arm']} ({fmt.quality(row['value'], data['metric'])}): {_against(data, row)}.")
    if len(data["beside"]) == 1:
        lines.append(f"No LoRA of rank {data['rank']} with this seed was trained beside the full run.")
    return lines


def _tested(data: dict[str, Any]) -> str:
    return fmt.quality(data["metrics"]["test"][data["metric"]], data["metric"])


def _against(data: dict[str, Any], row: dict[str, Any]) -> str:
    """The extracted adapter against another run, in the report's own words."""
    from peft_recipes.reporting.sentences import describe_difference

    if row["extracted_minus_it"] is None:
        return "tested on other examples"
    comparison = {
        "metric": data["metric"],
        "margin": data["margin"],
        "arms": {"full": {"method": "full", "metric": {"mean": row["value"]}},
                 "extracted": {"method": "LORA", "metric": {"mean": data["metrics"]["test"][data["metric"]]}}},
        "differences": {"extracted": {"against": "full", "margin": data["margin"], **row["extracted_minus_it"]}},
    }  # fmt: skip
    told = describe_difference(comparison, "extracted")
    return f"{told.verdict} (difference {told}, margin {told.margin}, one seed)"


def render_extraction(data: dict[str, Any], console: Console) -> None:
    """Print an extraction to a rich console."""
    from rich.text import Text

    title = Text(f"{facts.plain(data['recipe'])}: LoRA r={data['rank']} out of full fine-tuning", style="bold")
    if data["embedded"]:
        title.append("  embedded stand-ins", style="not bold yellow")
    console.print(title)
    for line in [*extraction_words(data), *data["notes"]]:
        console.print(Text(line))
