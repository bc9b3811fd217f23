"""Console output of `data` (examples, splits, lengths, classes, notes) and of `new` (what was chosen, and why)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from peft_recipes.reporting import formats
from peft_recipes.reporting.data import duplicate_lines, split_rows, truncation_line
from peft_recipes.reporting.facts import plain

if TYPE_CHECKING:
    from peft_recipes.drafting.draft import Draft

_WIDEST = 500  # columns of a table that a narrow terminal wraps
_BAR = 40  # characters of the longest bar
_LABELLED, _SPECIAL = "bold green", "cyan"
_CLASSES = 20  # more classes than these are counted, not listed


def show_data(data: dict[str, Any]) -> None:
    """Print what `look` found: first the examples, then the figures."""
    console = Console(highlight=False)
    what = f"{data['recipe']}: {data['task']} of {data['model']} on {data['dataset']}"
    console.print(
        f"[bold]{escape(what)}[/bold]" + (" (embedded stand-ins)" if data["embedded"] else ""), soft_wrap=True
    )
    if data["format"]:
        console.print(f"Format: {escape(data['format'])}", soft_wrap=True)
    if data["columns"]:
        console.print(f"Columns: {escape(', '.join(data['columns']))}", soft_wrap=True)
    for number, example in enumerate(data.get("examples", ()), 1):
        console.print()
        _show_example(console, example, number)
    console.print()
    _show_splits(console, data)
    _show_histogram(console, data)
    _show_classes(console, data)
    for line in duplicate_lines(data):
        console.print(escape(line), soft_wrap=True)
    for note in data["notes"]:
        if data["format"] and data["format"] in note:
            continue  # shown at the top
        console.print(f"Note: {escape(note)}", soft_wrap=True)


def _show_example(console: Console, example: dict[str, Any], number: int) -> None:
    label = f", {plain(example['label'])}" if example["label"] is not None else ""
    console.print(f"[bold]Training example {number}[/bold] ({escape(example['id'])}){escape(label)}")
    for part in example["parts"]:
        labelled = f", {part['labelled']} labelled" if part["labelled"] else ""
        name = f"{part['name']}, " if part["name"] else ""
        console.print(f"[dim]{name}{part['tokens']} tokens{labelled}:[/dim]")
        console.print(_as_text(part["pieces"], colour=_has_colour(console)), soft_wrap=True)
    if "size" in example:
        width, height = example["size"]
        shape = " x ".join(map(str, example["pixel_values"]))
        console.print(f"{width} x {height} pixels; the model sees {shape}")


def _has_colour(console: Console) -> bool:
    return console.is_terminal and console.color_system is not None and not console.no_color


def _as_text(pieces: list[dict[str, Any]], colour: bool) -> Text:
    """The pieces of a sequence; labelled ones coloured, or in double brackets where there is no colour."""
    text, inside = Text(), False
    for piece in pieces:
        tag = f"/{plain(piece['tag'])}" if "tag" in piece else ""
        words = plain(piece["text"])
        if tag:  # a word and its tag, set apart from its neighbours
            space = words[: len(words) - len(words.lstrip())]
            text.append(space)
            words = words.strip() + tag
            text.append(words if colour else f"[[{words}]]", _LABELLED if colour else "")
            continue
        if not colour and piece["labelled"] != inside:
            text.append("[[" if piece["labelled"] else "]]")
            inside = piece["labelled"]
        style = " ".join(name for name, has in ((_LABELLED, piece["labelled"]), (_SPECIAL, piece["special"])) if has)
        text.append(words, style if colour else "")
    if inside:
        text.append("]]")
    return text


def _show_splits(console: Console, data: dict[str, Any]) -> None:
    header, rows = split_rows(data)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(header):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    width = Measurement.get(console, console.options.update(max_width=_WIDEST), table).maximum
    Console(highlight=False, width=max(width, console.width)).print(table)
    if line := truncation_line(data):
        console.print(line, soft_wrap=True)


def _show_histogram(console: Console, data: dict[str, Any]) -> None:
    """The lengths of the training examples as bars; those beyond max_length are marked."""
    bins = data["splits"]["train"]["histogram"]
    if not bins:
        return
    console.print("\nTokens of a training example, before truncation:")
    most = max(one["examples"] for one in bins)
    mark = "█" if console.encoding.startswith("utf") else "#"
    width = len(f"{bins[-1]['to']:,}")
    for one in bins:
        bar = mark * round(_BAR * one["examples"] / most) or ("." if one["examples"] else "")
        cut = "  truncated" if one["from"] > data["max_length"] and one["examples"] else ""
        console.print(f"  {one['from']:>{width},} to {one['to']:>{width},}  {bar} {one['examples']:,}{cut}")
    console.print()


def _show_classes(console: Console, data: dict[str, Any]) -> None:
    """The classes with their counts in each split, or the numbers of a regression."""
    splits = data["splits"]
    if numbers := splits["train"]["numbers"]:
        spread = ", ".join(f"{name} {numbers[key]:g}" for name, key in (("from", "min"), ("median", "median"),
                                                                        ("to", "max")))  # fmt: skip
        console.print(f"Numbers to learn: {spread}\n")
    classes = splits["train"]["classes"]
    if not classes:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("tag" if data["task"] == "token-classification" else "class")
    for split in splits:
        table.add_column(split, justify="right")
    for name in list(classes)[:_CLASSES]:
        counts = ((split["classes"] or {}).get(name, 0) for split in splits.values())
        table.add_row(escape(name), *map(formats.count, counts))
    console.print(table)
    if (more := len(classes) - _CLASSES) > 0:
        console.print(f"and {more:,} more classes (--json has them all)")
    console.print()


def show_draft(draft: Draft) -> None:
    """Print what a draft chose and why, and the next commands."""
    console, recipe, why = Console(highlight=False), draft.recipe, draft.why
    console.print(f"[bold]{escape(str(draft.path))}[/bold]: {recipe.task} of {escape(recipe.model)} on "
                  f"{escape(recipe.data_name)}", soft_wrap=True)  # fmt: skip
    training = recipe.training
    chosen = [
        ("task", recipe.task, "task"),
        *((key, getattr(recipe.dataset, key), f"dataset.{key}") for key in ("text", "label", "problem_type")),
        ("metric", recipe.metric, "metric"),
        ("validation", recipe.dataset.validation, "dataset.validation"),
        ("test", recipe.dataset.test, "dataset.test"),
        ("max_length", recipe.max_length, "max_length"),
        ("batch", training.get("per_device_train_batch_size"), "training.per_device_train_batch_size"),
        ("epochs", training.get("num_train_epochs"), "training.num_train_epochs"),
        ("arms", ", ".join(recipe.arms), "full" if "full" in why else "arms"),
    ]
    if "columns" in why:
        console.print(f"  columns: {escape(why['columns'])}", soft_wrap=True)
    for name, value, key in chosen:
        if key in why:
            value = ", ".join(value) if isinstance(value, list) else "all" if value is None else value
            console.print(f"  {name}: {escape(str(value))} [dim]({escape(why[key])})[/dim]", soft_wrap=True)
    for note in draft.notes:
        if why.get("columns", " ") in note:
            continue  # said above
        console.print(f"Note: {escape(note)}", soft_wrap=True)
    console.print("\nNext:")
    for command in draft.to_dict()["next"]:
        console.print(f"  [bold]{escape(command)}[/bold]", soft_wrap=True)
