"""What the command line prints of adapters in use: predictions, answers, a merge, a combination."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from peft_recipes.inference.generate import length_and_speed
from peft_recipes.reporting import facts


def show_predictions(names: list[str], found: list[dict[str, Any]]) -> None:
    """One line a text or image: label, probability, and what it was."""
    console = Console(highlight=False)
    width = max(len(result["label"]) for result in found)
    for name, result in zip(names, found, strict=True):
        said = escape(facts.shorten(name, max(console.width - width - 12, 20)))
        console.print(f"[bold]{escape(result['label']):{width}}[/]  {result['probability']:6.1%}  [dim]{said}[/]",
                      soft_wrap=True)  # fmt: skip


def show_answers(rows: list[dict[str, Any]]) -> None:
    """Each prompt, and below it what each form answered, and how fast."""
    console = Console(highlight=False)
    for row in rows:
        console.print(f"\n[bold]{escape(facts.plain(row['prompt']))}[/]")
        for form, made in row["answers"].items():
            console.print(f"\n[cyan]{escape(form)}[/]  [dim]{length_and_speed(made)}[/]")
            for line in (made["text"] or "(nothing)").split("\n"):
                console.print(escape(facts.plain(line)), soft_wrap=True)


def show_merge(made: dict[str, Any], output: Path) -> None:
    """What merging changed, and where the model is."""
    console = Console(highlight=False)
    console.print(f"[bold]{escape(made['adapter'])}[/] ({made['method']}) merged into {escape(made['base'])}")
    inputs = made["inputs"]
    console.print(
        f"  largest logit difference {made['largest_logit_difference']:.2g} ({made['share_of_outputs']:.1g} of their "
        f"size) on {inputs['count']} inputs ({inputs['source']})",
        soft_wrap=True,
    )
    if moved := made["dequantised"]:
        console.print(f"  the base was {moved['from']}: its full weights move the logits by "
                      f"{moved['largest_logit_difference']:.2g} ({moved['share_of_outputs']:.1g} of their size)",
                      soft_wrap=True)  # fmt: skip
    if made["before"]:
        for name, value in made["before"].items():
            console.print(f"  test {name}: {value:.4f} before, {made['after'][name]:.4f} merged")
    for note in made["notes"]:
        console.print(f"  Note: {escape(note)}", soft_wrap=True)
    console.print(
        f"  {escape(made['loaded_by'])}({escape(json.dumps(str(output), ensure_ascii=False))})", soft_wrap=True
    )


def show_combination(made: dict[str, Any], output: Path) -> None:
    """Each test set: the base, the adapter that it belongs to, the combination."""
    console = Console(highlight=False)
    weights = ", ".join(f"{name} {weight:g}" for name, weight in made["weights"].items())
    console.print(f"[bold]{made['method']}[/] of {escape(weights)} on {escape(made['base'])}, rank {made['rank']}")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("test set of", "metric", "base", "own adapter", "combined"):
        table.add_column(name, justify="left" if name in ("test set of", "metric") else "right")
    for name, found in made["test_sets"].items():
        if found["metric"] is None:
            table.add_row(name, "-", "-", "-", "-")
            continue
        values = [(found[form] or {}).get(found["metric"]) for form in ("base", "own", "combined")]
        table.add_row(name, found["metric"], *("-" if value is None else f"{value:.4f}" for value in values))
    console.print(table)
    for name, found in made["test_sets"].items():
        if found.get("note"):
            console.print(f"  {escape(name)}: {found['note']}")
    console.print(f"  {escape(str(output))}", soft_wrap=True)
