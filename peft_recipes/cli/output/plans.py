"""Console output of `list`, `plan` and `methods`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from peft_recipes.reporting import formats

if TYPE_CHECKING:
    from peft_recipes.recipe.recipe import Recipe


_WIDEST = 500  # columns of a table that a narrow terminal wraps


def show_recipes(recipes: list[Recipe]) -> None:
    """Print three lines for each recipe."""
    console = Console(highlight=False)
    for recipe in recipes:
        console.print(f"[bold]{recipe.name}[/bold]  {escape(recipe.title)}")
        console.print(f"    {recipe.task}: {escape(recipe.model)} on {escape(recipe.data_name)}", soft_wrap=True)
        console.print(f"    arms: {', '.join(recipe.arms)}")
    console.print("\nTry one without a Hub: [bold]peft-recipes compare mnist-shift --embedded[/bold]")


def _trial(trial: dict[str, Any]) -> str:
    total = formats.seconds(trial["estimated_seconds"]) if trial["estimated_seconds"] else "?"
    answers = f", answers up to {formats.seconds(trial['answer_seconds'])}" if trial.get("answer_seconds") else ""
    return f"{total} ({formats.seconds(trial['seconds_per_step'])} a step){answers}"


def _sent(memory: dict[str, Any]) -> str:
    sent = memory.get("traffic")
    return formats.human_bytes(sent["total"]) if sent else "-"


def show_plan(plan: dict[str, Any]) -> None:
    """Print a plan as a table, and the modules that each arm trains."""
    console = Console(highlight=False)
    title = f"{plan['recipe']}: {plan['model']} on {plan['dataset']}"
    console.print(f"[bold]{escape(title)}[/bold]" + (" (embedded stand-ins)" if plan["embedded"] else ""))
    has = plan["hardware"]
    console.print(f"on {has['device']} ({has['device_name']}), {has['precision']}, {has['threads']} threads")
    total = next(iter(plan["arms"].values()))["total_parameters"]
    console.print(f"{total:,} parameters in the base with its task head\n")
    spread = plan.get("processes", 1) > 1
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("arm")
    tried = any("trial" in arm for arm in plan["arms"].values())
    for name in ("trains", "share", "head", "checkpoint", "steps", "tokens", "peak memory*", "learning rate"):
        table.add_column(name, justify="right")
    if spread:
        table.add_column("sends a step", justify="right")
    if tried:
        table.add_column("training, by a trial", justify="right")
    for name, arm in plan["arms"].items():
        table.add_row(
            name,
            f"{arm['trainable_parameters']:,}",
            f"{arm['trainable_parameters'] / arm['total_parameters']:.2%}",
            f"{arm['head_parameters']:,}" if arm["head_parameters"] else "-",
            formats.human_bytes(arm["checkpoint_bytes"]),
            "?" if arm["steps"] is None else f"{arm['steps']:,}",
            "-" if arm["tokens"] is None else f"{arm['tokens']:,}",
            formats.human_bytes(arm["memory"]["total"]) + ("" if arm["memory"]["fits"] else " does not fit"),
            f"{arm['learning_rate']:g}",
            *([_sent(arm["memory"])] if spread else []),
            *([_trial(arm["trial"])] if tried else []),
        )
    _print_whole(table, console)
    memory = next(iter(plan["arms"].values()))["memory"]
    has = f" This machine has {formats.human_bytes(memory['machine'])}." if memory["machine"] else ""
    what = "of the largest batch: weights, gradients, optimizer, activations, the allocator's freed blocks, libraries"
    if spread:
        what = f"of one of {plan['processes']} processes ({plan['distributed']}), its own batch and buffers"
        has = f" Each has {formats.human_bytes(memory['machine'])}." if memory["machine"] else ""
    console.print(f"* estimated, {what}.{has}\n")
    for name, arm in plan["arms"].items():
        modules = arm["modules"]
        console.print(f"{name} trains {len(modules)} module{'s' * (len(modules) != 1)}: {escape(_shortened(modules))}")
    for note in plan["notes"]:
        console.print(f"Note: {escape(note)}")
    if "power" in plan:
        _show_power(plan["power"], console)


def _show_power(power: dict[str, Any], console: Console) -> None:
    """Print what a verdict takes: seeds and time with the pilot's test examples, or more of those examples."""
    margin, first = f"{power['margin']:g}", next(iter(power["arms"].values()))
    units = "points" if power["unit"] == "points" else "% of full's mean"
    unit = "point" if (margin, units) == ("1", "points") else units
    examples = formats.count(first["pilot"]["examples"])
    metric, chance = power["metric"].replace("_", " "), f"{100 * power['power']:.0f} %"
    verdicts = {"equivalent": "equivalent", "different": f"{margin} {unit} better or worse"}
    console.print(f"\nWhat a verdict within {margin} {unit} ({metric}) takes, with {chance} power:", style="bold")
    seeds, more = _power_table("Seeds", "Time"), _power_table(*(f"{count} seeds" for count in first["examples"]))
    for name, arm in power["arms"].items():
        for claim, words in verdicts.items():
            wanted, seconds = arm["seeds"][claim], arm["seconds_per_seed"]
            time = [None if seconds is None or count is None else seconds * count for count in wanted.values()]
            label = (escape(name), words)
            seeds.add_row(*label, _needed(list(wanted.values()), formats.count), _needed(time, formats.seconds))
            examples_of = [list(each[claim].values()) for each in arm["examples"].values()]
            more.add_row(*label, *[_needed(bounds, formats.count) for bounds in examples_of])
    console.print(f"\nWith the {examples} test examples that there are:")
    _print_whole(seeds, console)
    console.print("\nTest examples, with a number of seeds:")
    _print_whole(more, console)
    pilots = sorted({len(arm["pilot"]["seeds"]) for arm in power["arms"].values()})
    console.print(
        f"\nA to B: what the pilot runs ({formats.listed([str(count) for count in pilots])} seeds) show, and what is "
        "enough if runs vary as much as their upper 80 % confidence limit. -: more than 100 seeds, or no number is "
        "enough."
    )
    for name, arm in power["arms"].items():
        smallest = _needed(list(arm["margin_of_10_seeds"]["equivalent"].values()), formats.significant)
        shown = f"with 10 seeds and these examples it can be shown to be equivalent within {smallest} {units}."
        console.print(f"{escape(name)}: {shown}")
    for note in power["notes"]:
        console.print(f"Note: {escape(note)}")


def _power_table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("Arm", "Verdict"):
        table.add_column(name)
    for name in columns:
        table.add_column(name, justify="right")
    return table


def _print_whole(table: Table, console: Console) -> None:
    """Print a table that wraps in a narrow console: a cut number would say nothing."""
    width = Measurement.get(console, console.options.update(max_width=_WIDEST), table).maximum
    Console(highlight=False, width=max(width, console.width)).print(table)


def _needed(bounds: list[float | None], said: Callable[[float], str]) -> str:
    """Return "5 to 9", "5", "5 to -" or "-"."""
    shown = ["-" if bound is None else said(bound) for bound in bounds]
    return " to ".join(dict.fromkeys(shown))


def _shortened(modules: list[str], most: int = 4) -> str:
    shown = ", ".join(modules[:most])
    return shown if len(modules) <= most else f"{shown}, ... {modules[-1]}"


def show_methods(table: dict[str, Any]) -> None:
    """Print a few lines for each method of the table."""
    console = Console(highlight=False)
    for row in table["methods"]:
        merged = "" if row["merges"] else ", can't be merged"
        console.print(
            f"[bold]{row['name']}[/bold]  {escape(row['title'])}: learning rate {row['learning_rate']:g}{merged}"
        )
        options = {**row["options"], **row["arm"]}
        arguments = ", ".join(f"{key}={value}" for key, value in options.items())
        console.print(f"    {row['config']}({escape(arguments)}): {escape(row['defaults'])}", soft_wrap=True)
        if row["cannot"]:
            console.print(f"    can't: {escape('; '.join(row['cannot']))}", soft_wrap=True)
        where = f", arXiv:{row['arxiv']}" if row["arxiv"] else ""
        console.print(f"    [dim]{escape(row['paper'])}{where}[/dim]", soft_wrap=True)
    left_out = table["left_out"]
    for why in dict.fromkeys(left_out.values()):
        names = ", ".join(name for name, reason in left_out.items() if reason == why)
        console.print(f"not in the table: {names}: {escape(why)}", soft_wrap=True)
    console.print("\nOn any recipe: [bold]peft-recipes compare RECIPE --arms full,lora,dora[/bold], or --arms all")
