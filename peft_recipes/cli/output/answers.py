"""Console output of predictions, answers, merges and combinations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from peft_recipes.inference.generate import length_and_speed
from peft_recipes.inference.predictions import in_words
from peft_recipes.reporting import facts
from peft_recipes.reporting.formats import human_bytes


def show_predictions(names: list[tuple[str, ...]], results: list[dict[str, Any] | None]) -> None:
    """Print a line for each text, pair or image: what was predicted, its probability, the input; or the entities."""
    console = Console(highlight=False)
    if any("entities" in result for result in results if result is not None):
        _show_entities(
            console, [name[0] for name in names], [result["entities"] if result else [] for result in results]
        )
        return
    words = [in_words(result) for result in results]
    width = max(len(predicted) for predicted, _ in words)
    for name, (predicted, probability) in zip(names, words, strict=True):
        shown = escape(facts.shorten(" | ".join(name), max(console.width - width - 12, 20)))
        figure = f"{probability}  " if probability else ""
        console.print(f"[bold]{escape(predicted):{width}}[/]  {figure}[dim]{shown}[/]", soft_wrap=True)


def _show_entities(console: Console, texts: list[str], found: list[list[dict[str, Any]]]) -> None:
    """Print each text, and below it a line for each of its entities: label, probability, text, position."""
    width = max((len(entity["label"]) for entities in found for entity in entities), default=0)
    for text, entities in zip(texts, found, strict=True):
        console.print(escape(facts.shorten(text, max(console.width, 20))), soft_wrap=True)
        for entity in entities:
            label, place = escape(entity["label"]), f"{entity['start']}-{entity['end']}"
            console.print(f"  [bold]{label:{width}}[/]  {entity['score']:6.1%}  {escape(facts.plain(entity['text']))}  "
                          f"[dim]{place}[/]", soft_wrap=True)  # fmt: skip
        if not entities:
            console.print("  [dim](nothing)[/]")


def show_answers(rows: list[dict[str, Any]]) -> None:
    """Print each prompt with the answers of the base and the adapters, and their speed."""
    console = Console(highlight=False)
    for row in rows:
        console.print(f"\n[bold]{escape(facts.plain(row['prompt']))}[/]")
        for form, answer in row["answers"].items():
            console.print(f"\n[cyan]{escape(form)}[/]  [dim]{length_and_speed(answer)}[/]")
            for line in (answer["text"] or "(nothing)").split("\n"):
                console.print(escape(facts.plain(line)), soft_wrap=True)


def show_merge(result: dict[str, Any], output: Path) -> None:
    """Print how much merging changed the outputs, and how to load the merged model."""
    console = Console(highlight=False)
    console.print(f"[bold]{escape(result['adapter'])}[/] ({result['method']}) merged into {escape(result['base'])}")
    gap, share, inputs = result["largest_logit_difference"], result["share_of_outputs"], result["inputs"]
    size = f"{gap:.2g} ({share:.1g} of their size)"
    console.print(f"  largest logit difference {size} on {inputs['count']} inputs ({inputs['source']})", soft_wrap=True)
    if moved := result["dequantised"]:
        console.print(f"  the base was {moved['from']}: its full weights move the logits by "
                      f"{moved['largest_logit_difference']:.2g} ({moved['share_of_outputs']:.1g} of their size)",
                      soft_wrap=True)  # fmt: skip
    if moved := result["rounded"]:
        console.print(f"  stored in {result['dtype']}, whose rounding moves the logits by "
                      f"{moved['largest_logit_difference']:.2g} ({moved['share_of_outputs']:.1g} of their size)",
                      soft_wrap=True)  # fmt: skip
    if result["before"]:
        for name, value in result["before"].items():
            console.print(f"  test {name}: {value:.4f} before, {result['after'][name]:.4f} merged")
    for note in result["notes"]:
        console.print(f"  Note: {escape(note)}", soft_wrap=True)
    console.print(f"  {result['dtype']}, {human_bytes(result['bytes'])}")
    console.print(
        f"  {escape(result['loaded_by'])}({escape(json.dumps(str(output), ensure_ascii=False))})", soft_wrap=True
    )


def show_combination(result: dict[str, Any], output: Path) -> None:
    """Print the metrics of the base, the own adapter and the combination on each test set."""
    console = Console(highlight=False)
    weights = ", ".join(f"{name} {weight:g}" for name, weight in result["weights"].items())
    console.print(
        f"[bold]{result['method']}[/] of {escape(weights)} on {escape(result['base'])}, rank {result['rank']}"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("test set of", "metric", "base", "own adapter", "combined"):
        table.add_column(name, justify="left" if name in ("test set of", "metric") else "right")
    for name, scores in result["test_sets"].items():
        if scores["metric"] is None:
            table.add_row(name, "-", "-", "-", "-")
            continue
        values = [(scores[form] or {}).get(scores["metric"]) for form in ("base", "own", "combined")]
        table.add_row(name, scores["metric"], *("-" if value is None else f"{value:.4f}" for value in values))
    console.print(table)
    for name, scores in result["test_sets"].items():
        if scores.get("note"):
            console.print(f"  {escape(name)}: {scores['note']}")
    console.print(f"  {escape(str(output))}", soft_wrap=True)
