"""Console output of `evaluate`: the base and the adapter side by side."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.markup import escape

from peft_recipes.reporting import facts, sentences
from peft_recipes.reporting import formats as fmt


def show_evaluation(result: dict[str, Any]) -> None:
    """Print both values of each benchmark or split, and the difference with its interval and verdict."""
    console = Console(highlight=False)
    console.print(f"[bold]{escape(result['adapter'])}[/] on {escape(result['base'])}", soft_wrap=True)
    for name, row in result["results"].items():
        console.print(f"\n[bold]{escape(facts.plain(name))}[/]  [dim]{_what(row)}[/]", soft_wrap=True)
        shown = "accuracy" if row["share"] else "loss"
        values = [fmt.quality(row[form], shown) for form in ("base", "adapter")]
        console.print(f"  base {values[0]}, adapter {values[1]}", soft_wrap=True)
        if difference := row["difference"]:
            interval = sentences.interval_and_verdict(
                difference["ci95"], difference["margin"], row["share"], row["verdict"]
            )
            console.print(f"  {sentences.change(difference['estimate'], shown)}, {interval}", soft_wrap=True)
    if any(row["difference"] for row in result["results"].values()):
        console.print("\n[dim]Adapter minus base, paired by example. The intervals cover the choice of examples.[/]",
                      soft_wrap=True)  # fmt: skip
    for note in result["notes"]:
        console.print(f"Note: {escape(note)}", soft_wrap=True)


def _what(row: dict[str, Any]) -> str:
    better = "" if row["higher_is_better"] else ", lower is better"
    return f"{fmt.metric_title(row['metric'])} of {fmt.count(row['examples'])} examples{better}"
