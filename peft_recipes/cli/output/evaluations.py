"""Console output of `evaluate`: the base and the adapter side by side."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from peft_recipes.reporting import facts, sentences
from peft_recipes.reporting import formats as fmt

_VERDICTS = {"worse": "forgot", "better": "gained", "equivalent": "equivalent", "not shown": "not shown"}


def show_evaluation(result: dict[str, Any]) -> None:
    """Print a row for each benchmark or split: both values, the difference with its interval, and the verdict."""
    console = Console(highlight=False)
    console.print(f"[bold]{escape(result['adapter'])}[/] on {escape(result['base'])}", soft_wrap=True)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "metric", "examples", "base", "adapter", "difference", "95 % interval", ""):
        table.add_column(name, justify="right" if name in ("examples", "base", "adapter") else "left")
    for name, row in result["results"].items():
        table.add_row(escape(facts.plain(name)), *_cells(row))
    console.print(table)
    if any(row["difference"] for row in result["results"].values()):
        console.print("[dim]Adapter minus base, paired by example; the interval covers the choice of examples.[/]",
                      soft_wrap=True)  # fmt: skip
    for note in result["notes"]:
        console.print(f"Note: {escape(note)}", soft_wrap=True)


def _cells(row: dict[str, Any]) -> list[str]:
    shown = "accuracy" if row["share"] else "loss"
    values = [fmt.quality(row[form], shown) for form in ("base", "adapter")]
    cells = [fmt.metric_title(row["metric"]), fmt.count(row["examples"]), *values]
    if (difference := row["difference"]) is None:
        return [*cells, fmt.NOTHING, fmt.NOTHING, ""]
    scale, digits = (100, 1) if row["share"] else (1, 3)
    low, high = (fmt.signed(scale * bound, digits) for bound in difference["ci95"])
    return [*cells, sentences.change(difference["estimate"], shown), f"{low} to {high}", _VERDICTS[row["verdict"]]]
