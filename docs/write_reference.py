"""Markdown of the reference pages, from the code itself: commands, public names, tasks, architectures.

`make docs` calls it through docs/site_hooks.py; `python docs/write_reference.py` prints all of it.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterable
from typing import Any

# The public names by what they are for. A name that is missing here goes under the last heading.
PUBLIC_NAMES = {
    "Recipes": ("load_recipe", "targets", "main", "RecipeError"),
    "Before training": ("plan", "scan"),
    "Training and comparing": ("train", "Run", "compare", "Comparison", "read_comparison"),
    "After training": ("AdapterSet", "base_folder", "spectrum", "extract", "publish", "publish_all", "reproduce"),
}
ON_RECIPE_PAGE = ("Recipe", "Arm", "Dataset", "Pretraining")


def commands() -> str:
    """Every command with its arguments and options, in the order of `peft-recipes --help`."""
    from typer.main import get_command

    from peft_recipes.cli.app import app

    group = get_command(app)
    return "\n".join(line for name, command in group.commands.items() for line in _command(name, command))


def _command(name: str, command: Any) -> Iterable[str]:
    arguments = [p for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option" and p.name != "help"]
    yield f"## {name}\n"
    yield f"{_cell(command.help)}\n"
    yield "```text"
    yield " ".join(["peft-recipes", name, *(a.metavar or a.name.upper() for a in arguments), "[OPTIONS]"])
    yield "```\n"
    if arguments:
        yield "| argument | |\n|:---|:---|"
        for argument in arguments:
            yield f"| `{argument.metavar or argument.name.upper()}` | {_cell(argument.help)} |"
        yield ""
    yield "| option | default | |\n|:---|:---|:---|"
    for option in options:
        names = ", ".join(f"`{flag}`" for flag in (*option.opts, *option.secondary_opts))
        value = "" if option.is_flag else f" `{option.metavar or option.name.upper()}`"
        repeated = " May be repeated." if option.multiple else ""
        yield f"| {names}{value} | {_default(option)} | {_cell(option.help)}{repeated} |"
    yield ""


def _default(option: Any) -> str:
    if option.required:
        return "required"
    value = option.default() if callable(option.default) else option.default
    return "" if value is None or value is False or value in ("", (), []) else f"`{value}`"


def _cell(text: str | None) -> str:
    """Text for a table cell: one line, no pipe of its own."""
    return re.sub(r"\s+", " ", text or "").strip().replace("|", "\\|")


def api() -> str:
    """A heading and a mkdocstrings block for each public name. Raises ValueError for an undocumented one."""
    import peft_recipes

    if missing := undocumented():
        raise ValueError(f"public names without a docstring: {', '.join(missing)}")
    listed = [name for names in PUBLIC_NAMES.values() for name in names]
    unknown = sorted(set(listed) - set(peft_recipes.__all__))
    if unknown:
        raise ValueError(f"docs/write_reference.py lists names that are not public: {', '.join(unknown)}")
    more = [name for name in peft_recipes.__all__ if name not in (*listed, *ON_RECIPE_PAGE)]
    lines = [f"{_and([f'`{name}`' for name in ON_RECIPE_PAGE])} are on the page [Recipe fields](recipe.md).\n"]
    for heading, names in {**PUBLIC_NAMES, **({"More": more} if more else {})}.items():
        lines.append(f"## {heading}\n")
        lines += [f"::: peft_recipes.{_path(name)}\n" for name in names]
    return "\n".join(lines)


def undocumented() -> list[str]:
    """The public names that have no docstring of their own (a dataclass makes one up: its signature)."""
    import peft_recipes

    found = []
    for name in peft_recipes.__all__:
        docstring = inspect.getdoc(getattr(peft_recipes, name)) or ""
        if not docstring.strip() or docstring.startswith(f"{name}("):
            found.append(name)
    return found


def _path(name: str) -> str:
    import peft_recipes

    thing = getattr(peft_recipes, name)
    return f"{thing.__module__.removeprefix('peft_recipes.')}.{thing.__qualname__}"


def tasks() -> str:
    """The table of tasks: metrics, the class of the base, the class of the training options."""
    from peft_recipes.recipe.options import TASKS

    lines = [
        "| task | base model's class | training options | metrics (the first is the default) |",
        "|:---|:---|:---|:---|",
    ]
    lines += [
        f"| `{name}` | `{task.auto_class}` | `{task.arguments}` | {', '.join(f'`{m}`' for m in task.metrics)} |"
        for name, task in TASKS.items()
    ]
    return "\n".join(lines) + "\n"


def architectures() -> str:
    """The table of architectures."""
    from peft_recipes.models.architecture_table import ARCHITECTURES

    lines = ["| model type | attention | mlp | convolutions | layers |", "|:---|:---|:---|:---|:---|"]
    for name, row in ARCHITECTURES.items():
        cells = [_names(row.group(which)) for which in ("attention", "mlp", "convolutions")]
        lines.append(f"| `{name}` | {' | '.join(cells)} | {row.layer} |")
    return "\n".join(lines) + "\n"


def _names(group: list[str] | str) -> str:
    names = [group] if isinstance(group, str) else group
    return ", ".join(f"`{name}`" for name in names)


def _and(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}"


PARTS = {"commands": commands, "api": api, "tasks": tasks, "architectures": architectures}


def main() -> None:
    importlib.import_module("peft_recipes")
    for part in PARTS.values():
        print(part())


if __name__ == "__main__":
    main()
