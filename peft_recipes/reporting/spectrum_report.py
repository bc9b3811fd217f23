"""Reports of spectra and extractions: how much of the change of full fine-tuning fits into an adapter of a rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from peft_recipes.reporting import facts, figure_style
from peft_recipes.reporting import formats as fmt
from peft_recipes.reporting.figure_style import Plot
from peft_recipes.reporting.sentences import describe_difference
from peft_recipes.reporting.terminal import heading
from peft_recipes.reporting.write import write_atomically

PLOT = "spectrum.png"
_SHOWN_TARGETS, _SHOWN_MODULES = 6, 8
_RANKS = ("1", "2", "4", "8", "16", "32")


def write_spectrum_plot(data: dict[str, Any], folder: Path) -> None:
    """Write spectrum.png next to spectrum.json."""
    with figure_style.look():
        plot = held_by_rank(data)
    write_atomically(folder / PLOT, plot.png())


def held_by_rank(data: dict[str, Any]) -> Plot:
    """Plot the share of the squared change that fits into a rank, one line per target, for those that changed most."""
    shown = [row for row in data["targets"] if row["kind"] != "embedding"][:_SHOWN_TARGETS]
    figure, axes = figure_style.canvas()
    style = figure_style
    colours = (style.BLUE, style.VERMILLION, style.GREEN, style.PURPLE, style.ORANGE, style.SKY)
    for row, colour, marker in zip(shown, colours, "so^DvP", strict=False):
        ranks, shares = [int(rank) for rank in row["held"]], [100 * share for share in row["held"].values()]
        look = {"marker": marker, "color": colour, "markersize": 6, "linewidth": 1.7}
        axes.plot(ranks, shares, "-", label=facts.shorten(row["target"], 24), **look)
    axes.axhline(90, color=figure_style.MUTED, linestyle=(0, (2, 2)), linewidth=1.2, zorder=1)
    axes.set_xscale("log", base=2)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
    axes.set(xlabel="Rank, logarithmic", ylabel="Squared change that fits (%)", ylim=(0, 103))
    if shown:
        axes.legend(frameon=False, fontsize=10, loc="lower right")
    caption = "Share of the change by full fine-tuning, for each kind of module. Dashed line: 90 %."
    return Plot("spectrum", "Change that fits into a rank", caption, " ".join(spectrum_words(data)), figure)


def spectrum_words(data: dict[str, Any]) -> list[str]:
    """Return the results as sentences."""
    if not data["squared_change"]:
        return ["Nothing changed: the trained weights are the base's."]
    ranks, outside = data["ranks"], data["outside"]
    held = ", ".join(f"r={rank} {fmt.percent(ranks['held'][rank])}" for rank in _RANKS if rank in ranks["held"])
    embedding_share = sum(row["share"] for row in data["targets"] if row["kind"] == "embedding")
    embeddings = f", embeddings {fmt.percent(embedding_share)}" if embedding_share else ""
    lines = [
        f"Share of the change in all linear and convolutional layers that fits into adapters: {held}. "
        f"90 % takes r={ranks['enough_rank']}.",
        f"These layers have {fmt.percent(ranks['share_of_all'])} of the total squared change{embeddings}; "
        f"norms and biases have {fmt.percent(outside['share'])}.",
    ]
    most = [row for row in data["targets"] if row["relative_change"] is not None and not row["new"]]
    most = sorted(most, key=lambda row: -row["relative_change"])[:3]
    if most:
        targets = ", ".join(f"{row['target']} ({fmt.percent(row['relative_change'])})" for row in most)
        lines.append(f"Largest change relative to their size, so the first to target: {targets}.")
    return lines


def render_spectrum(data: dict[str, Any], console: Console) -> None:
    """Print a spectrum to a rich console: the targets, then the modules with the largest relative change."""
    title = f"{data['recipe']}: what full fine-tuning changed, seed {data['seed']}"
    console.print(heading(title, "", data["embedded"]))
    console.print(_table(data["targets"], "target"))
    if len(data["modules"]) > len(data["targets"]):
        console.print(Text("\nModules with the largest change relative to their size", style="bold"))
        changed = [row for row in data["modules"] if row["relative_change"] is not None]
        changed.sort(key=lambda row: -row["relative_change"])
        console.print(_table(changed[:_SHOWN_MODULES], "module"))
    console.print()
    for line in [*spectrum_words(data), *data["notes"]]:
        console.print(Text(line))


def _table(rows: list[dict[str, Any]], key: str) -> Any:
    shown = Table(box=None, pad_edge=False, header_style="bold")
    ranks = [rank for rank in _RANKS if any(rank in row["held"] for row in rows)][:5]
    headings = [key, "share of the change", "change / weight", *(f"r={rank}" for rank in ranks), "r for 90 %"]
    for column in headings:
        shown.add_column(column, justify="left" if column == key else "right")
    for row in rows:
        name = facts.plain(row[key]) + (f" ({row['modules']})" if row.get("modules", 1) > 1 else "")
        name += " (new head)" if row["new"] else " (embedding)" if row["kind"] == "embedding" else ""
        change = fmt.percent(row["relative_change"]) if row["relative_change"] is not None else fmt.NOTHING
        held = [fmt.percent(row["held"][rank]) if rank in row["held"] else "" for rank in ranks]
        shown.add_row(name, fmt.percent(row["share"]), change, *held, str(row["enough_rank"]))
    return shown


def extraction_words(data: dict[str, Any]) -> list[str]:
    """Return what the adapter contains, what was lost, and how it compares with the other runs."""
    change = data["change"]
    lost = [f"{fmt.percent(change['cut_off'])} by the rank"]
    if change["outside"]:
        kinds = [f"{kind} {fmt.percent(share)}" for kind, share in change["outside_by_kind"].items()]
        lost.append(f"{fmt.percent(change['outside'])} outside the targets ({', '.join(kinds)})")
    head = f", and the complete head another {fmt.percent(change['head'])}" if change["head"] else ""
    metric = data["metric"]
    lines = [
        f"The adapter of rank {data['rank']} contains {fmt.percent(change['held'])} of the squared change{head}; lost: "
        f"{fmt.listed(lost)}.",
        f"Test {fmt.metric_title(metric)} {fmt.quality(data['metrics']['test'][metric], metric)}.",
    ]
    for row in data["beside"]:
        lines.append(f"Compared with {row['arm']} ({fmt.quality(row['value'], metric)}): {_difference(data, row)}.")
    if len(data["beside"]) == 1:
        lines.append(f"There is no trained LoRA of rank {data['rank']} with this seed to compare with.")
    return lines


def _difference(data: dict[str, Any], row: dict[str, Any]) -> str:
    """Return the difference of the extracted adapter from another run, as a report words it."""
    if row["extracted_minus_it"] is None:
        return "tested on other examples"
    metric, margin = data["metric"], data["margin"]
    comparison = {
        "metric": metric,
        "margin": margin,
        "arms": {
            "full": {"method": "full", "metric": {"mean": row["value"]}},
            "extracted": {"method": "LORA", "metric": {"mean": data["metrics"]["test"][metric]}},
        },
        "differences": {"extracted": {"against": "full", "margin": margin, **row["extracted_minus_it"]}},
    }
    difference = describe_difference(comparison, "extracted")
    return f"{difference.verdict} (difference {difference}, margin {difference.margin}, one seed)"


def render_extraction(data: dict[str, Any], console: Console) -> None:
    """Print an extraction to a rich console."""
    title = f"{data['recipe']}: LoRA r={data['rank']} extracted from full fine-tuning"
    console.print(heading(title, "", data["embedded"]))
    for line in [*extraction_words(data), *data["notes"]]:
        console.print(Text(line))
